# SPDX-License-Identifier: Apache-2.0
"""What the simulated sites remember from round to round, on disk, keyed by course, site and round."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hansa.client.work import Memory
from hansa.core import wire
from hansa.core.storage import full, link
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
            memory[path.name.split(".", 2)[1]] = wire.open_parts(path)[1]
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


class MemoryPacks:
    """What many small sites remember, a file for all sites of one chunk: ``course/packs/000003.OWNER@SITE.hansa``.

    The tensors of a file have a leading axis, a row a site, and its metadata name the sites. A file is deleted once
    the server has accepted later work from every site in it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._accepted: dict[tuple[str, str], int] = {}

    def load(self, course: str, accepted: Mapping[str, int]) -> dict[str, Memory]:
        """Return what each site remembered after the round that ``accepted`` names for it."""
        found: dict[str, dict[str, Parts]] = {}
        for round in sorted(set(accepted.values())):
            for path in sorted(self._folder(course).glob(f"{round:06d}.*.hansa")):
                owner = path.name.partition("@")[0].partition(".")[2]
                with path.open("rb") as file:
                    envelope = wire.read_envelope(file)
                    rows = [(i, s) for i, s in enumerate(envelope.meta["sites"]) if accepted.get(s) == round]
                    stacked = wire.read_parts(file, envelope) if rows else {}
                for i, site in rows:
                    own = {
                        part: {name: leaf[i].copy() for name, leaf in tree.items()} for part, tree in stacked.items()
                    }
                    found.setdefault(site, {})[owner] = own
        return dict(found)

    def save(self, course: str, round: int, memories: Mapping[str, Memory], accepted: Mapping[str, int]) -> None:
        """Write what the sites of one chunk remember after ``round``, and forget what is no longer needed.

        Raises:
            StorageError: the disk is full or the folder can't be written.
        """
        folder = self._folder(course)
        try:
            for owner in sorted({owner for memory in memories.values() for owner in memory}):
                sites = [site for site, memory in memories.items() if owner in memory]
                each = [memories[site][owner] for site in sites]
                stacked = {
                    part: {name: np.stack([parts[part][name] for parts in each]) for name in tree}
                    for part, tree in each[0].items()
                }
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{round:06d}.{owner}@{sites[0]}.hansa"
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file:
                    wire.write(file, "memory", {"round": round, "sites": sites}, stacked)
                temporary.replace(path)
        except OSError as error:
            raise StorageError(
                f"Can't write the sites' memories to {folder}: {error.strerror}.", round=round
            ) from error
        self._accepted.update({(course, site): number for site, number in accepted.items()})

    def forget(self, course: str) -> None:
        """Delete every file of which all sites have had later work accepted."""
        for path in sorted(self._folder(course).glob("*.hansa")):
            round = int(path.name.partition(".")[0])
            if round >= max(self._accepted.values(), default=0):
                continue
            with path.open("rb") as file:
                sites = wire.read_envelope(file).meta["sites"]
            if all(self._accepted.get((course, site), round) > round for site in sites):
                path.unlink(missing_ok=True)

    def _folder(self, course: str) -> Path:
        return self._directory / course / "packs"


class Mailboxes:
    """The mailboxes of the nodes on this machine: a folder a node, a file a topic.

    Args:
        directory: where the folders are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, node: str, topic: str) -> Path:
        """Return where the message under ``topic`` is, or would be, in the mailbox of ``node``."""
        return self._directory / node / f"{topic}.hansa"

    def put(self, node: str, topic: str, round: int, parts: Parts) -> None:
        """Leave ``parts`` under ``topic`` in the mailbox of ``node``, in place of an earlier round's.

        Raises:
            StorageError: the disk is full.
        """
        path = self.path(node, topic)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                wire.write(file, "mail", {"round": round}, parts)
            temporary.replace(path)
        except OSError as error:
            raise full(temporary, error) from error

    def send(self, sender: str, recipient: str, topic: str) -> None:
        """Put the message under ``topic`` from one mailbox into another, both on this machine."""
        path = self.path(recipient, topic)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        link(self.path(sender, topic), path)

    def take(self, node: str, topic: str, round: int) -> Parts:
        """Return what lies under ``topic`` in the mailbox of ``node``.

        Raises:
            StorageError: nothing of this round does.
        """
        path = self.path(node, topic)
        if path.exists():
            envelope, parts = wire.open_parts(path)
            if (envelope.kind, envelope.meta.get("round")) == ("mail", round):
                return parts
        raise StorageError(f"Nothing of round {round} lies under {topic!r} for {node!r}.")
