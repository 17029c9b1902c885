# SPDX-License-Identifier: Apache-2.0
"""What the simulated sites remember from round to round, on disk, keyed by course, site and round."""

from __future__ import annotations

import os
from pathlib import Path

from hansa.client.work import Memory
from hansa.core import wire
from hansa.core.tree import Parts
from hansa.errors import StorageError


class MemoryStore:
    """One file a (course, site, round, owner): ``course/site/000003.strategy.hansa``.

    A site that was acknowledged up to round r goes on from what it remembered then; files of later rounds come
    from work that was never accepted, or from a run that was killed, and are written over.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, course: str, site: str, round: int | None) -> Memory:
        """Return what ``site`` remembered after ``round`` (nothing for None)."""
        if round is None:
            return {}
        memory = {}
        for path in sorted((self._directory / course / site).glob(f"{round:06d}.*.hansa")):
            with path.open("rb") as file:
                memory[path.name.split(".", 2)[1]] = wire.read_parts(file, wire.read_envelope(file))
        return memory

    def save(self, course: str, site: str, round: int, memory: Memory, keep_from: int | None) -> None:
        """Write what ``site`` remembers after ``round``, and forget rounds before ``keep_from``."""
        folder = self._directory / course / site
        try:
            if memory:
                folder.mkdir(parents=True, exist_ok=True)
            for owner, parts in memory.items():
                path = folder / f"{round:06d}.{owner}.hansa"
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file:
                    wire.write(file, "memory", {"site": site, "round": round}, parts)
                temporary.replace(path)
        except OSError as error:
            raise StorageError(
                f"Can't write the site's memory to {folder}: {error.strerror}.", site=site, round=round
            ) from error
        if folder.is_dir():
            for entry in os.scandir(folder):
                number = entry.name.partition(".")[0]
                if number.isdigit() and int(number) < min(keep_from or 0, round):
                    Path(entry.path).unlink(missing_ok=True)


class Mailboxes:
    """The peers' mailboxes of a simulation: a folder a recipient, a file a topic."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, recipient: str, topic: str, parts: Parts) -> None:
        """Leave ``parts`` under ``topic`` for ``recipient``."""
        folder = self._directory / recipient
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{topic}.hansa"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            wire.write(file, "mail", {}, parts)
        temporary.replace(path)

    def take(self, recipient: str, topic: str) -> Parts:
        """Return what lies under ``topic`` for ``recipient``.

        Raises:
            StorageError: nothing does.
        """
        path = self._directory / recipient / f"{topic}.hansa"
        try:
            with path.open("rb") as file:
                return wire.read_parts(file, wire.read_envelope(file))
        except OSError as error:
            raise StorageError(f"Nothing lies under {topic!r} for {recipient!r}: {error.strerror}.") from error

    def clear(self) -> None:
        """Forget every message."""
        for path in self._directory.glob("*/*.hansa"):
            path.unlink(missing_ok=True)
