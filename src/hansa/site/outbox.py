# SPDX-License-Identifier: Apache-2.0
"""Finished answers, durable before their first byte leaves, so that no retry and no restart trains again.

    outbox/TASK.hansa      the update that answers the task
    outbox/TASK.msgpack    what became of a task that has none
    outbox/.TASK.hansa     an update that is being made, or that was when the agent was killed

A file appears by one rename after it is durable, and goes when the server has acknowledged the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hansa.core import storage
from hansa.errors import StorageError
from hansa.transport.messages import Inspected, Missing

_ANSWER, _UPDATE = ".msgpack", ".hansa"


class Outcome(msgspec.Struct):
    """What became of a task: an update lies beside it, or one of the three."""

    missing: Missing | None = None
    inspected: Inspected | None = None
    letter: bytes | None = None


@dataclass(frozen=True)
class Entry:
    """A finished answer on disk."""

    outcome: Outcome
    update: Path | None


class Outbox:
    """The answers of one job that the server has not acknowledged yet.

    Args:
        directory: where they lie.
        spares: who gets the updates that have been acknowledged.
    """

    def __init__(self, directory: Path, spares: storage.Spares) -> None:
        self._directory = directory
        self._spares = spares
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f".*{_ANSWER}*"):  # what was being written when the agent was killed
            path.unlink()

    def find(self, task: str) -> Entry | None:
        """Return the finished answer to ``task``, if there is one.

        Raises:
            StorageError: it is there and can't be read.
        """
        update, answer = self._directory / f"{task}{_UPDATE}", self._directory / f"{task}{_ANSWER}"
        if update.exists():
            return Entry(Outcome(), update)
        try:
            return Entry(msgspec.msgpack.decode(answer.read_bytes(), type=Outcome), None)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"The finished answer in {answer} can't be read: {error}.") from error

    def begin(self, task: str) -> Path:
        """Return where an update that answers ``task`` is to be made; nothing is there.

        Raises:
            StorageError: what was there can't be deleted.
        """
        path = self._directory / f".{task}{_UPDATE}"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage.full(path, error) from error
        return path

    def keep(self, task: str) -> None:
        """Make an update durable where `begin` said, before it is an answer; :meth:`kept` finds it after a kill.

        Raises:
            StorageError: the disk is full.
        """
        made = self._directory / f".{task}{_UPDATE}"
        try:
            storage.sync([made])
            storage.sync_directory(self._directory)
        except OSError as error:
            raise storage.full(made, error) from error

    def kept(self, task: str) -> bool:
        """Say whether an update is where `begin` said; it is whole only if what says so was written after `keep`."""
        return (self._directory / f".{task}{_UPDATE}").exists()

    def finish(self, task: str, outcome: Outcome, notes: Sequence[Path] = ()) -> Entry:
        """Make the answer durable and return it.

        Args:
            task: what is answered.
            outcome: what became of it; if nothing else, the update has been made where `begin` said.
            notes: files that must be durable before there is an update.

        Raises:
            StorageError: the disk is full.
        """
        made, update = self._directory / f".{task}{_UPDATE}", self._directory / f"{task}{_UPDATE}"
        try:
            if outcome == Outcome():
                storage.sync([made, *notes])
                made.rename(update)
                storage.sync_directory(self._directory)
                return Entry(outcome, update)
            made.unlink(missing_ok=True)  # half an update, or a spare file
        except OSError as error:
            raise storage.full(update, error) from error
        storage.write_atomic(self._directory / f"{task}{_ANSWER}", msgspec.msgpack.encode(outcome))
        return Entry(outcome, None)

    def acknowledged(self, task: str) -> None:
        """Forget the answer: it is durable at the server, or nobody waits for it."""
        with contextlib.suppress(OSError):
            self._spares.give(self._directory / f"{task}{_UPDATE}")
            for name in (f"{task}{_ANSWER}", f".{task}{_UPDATE}"):
                (self._directory / name).unlink(missing_ok=True)

    def keep_only(self, tasks: Iterable[str]) -> None:
        """Forget the answers that nobody waits for any more."""
        wanted = set(tasks)
        for path in self._directory.iterdir():
            task = path.stem.removeprefix(".")
            if task not in wanted and path.suffix in (_ANSWER, _UPDATE):
                self.acknowledged(task)
