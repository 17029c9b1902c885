# SPDX-License-Identifier: Apache-2.0
"""Finished answers, durable before their first byte leaves, so that no retry and no restart trains again.

    outbox/TASK.hansa      the update that answers the task
    outbox/TASK.msgpack    what became of a task that has none
    outbox/.TASK.hansa     an update that is being made, or that was when the agent was killed

A file appears by one rename after it is durable, and goes when the server has acknowledged the answer.

| case | result |
|---|---|
| the folder can't be synced after the rename, or the agent is killed just then | synced before the answer is found |
| a file of another name, an answer or update of another release, a damaged one | named in the log, and left |
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hansa.core import storage, wire
from hansa.errors import HansaError, StorageError, WireError
from hansa.transport.messages import Inspected, Missing

_ANSWER, _UPDATE = ".msgpack", ".hansa"

_LOG = logging.getLogger("hansa.site")


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

    @property
    def num_bytes(self) -> int:
        """How large the update is, if there is one."""
        return 0 if self.update is None else storage.num_bytes(self.update)


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
        self._unsynced: set[str] = set()  # tasks whose answers have their name, but perhaps not for good
        for path in sorted(directory.glob("[!.]*")):
            self._unsynced.add(path.stem)
            try:
                if path.suffix not in (_ANSWER, _UPDATE):
                    raise WireError("The name is that of none.")
                self._read(path)
            except HansaError as error:
                _LOG.warning("%s is no answer of this release: %s It is left there.", path, error.message)

    @staticmethod
    def _read(path: Path) -> Outcome:
        """Return what became of a task (HansaError: it can't be told)."""
        if path.suffix == _UPDATE:
            wire.Spooled(path)
            return Outcome()
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Outcome)
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"The finished answer in {path} can't be read: {error}.") from error

    def find(self, task: str) -> Entry | None:
        """Return the finished answer to ``task``, if there is one.

        Raises:
            StorageError: it is there and can't be read, or not be made durable.
        """
        update, answer = self._directory / f"{task}{_UPDATE}", self._directory / f"{task}{_ANSWER}"
        found = next((path for path in (update, answer) if path.exists()), None)
        if found is None:
            return None
        if task in self._unsynced:
            try:
                storage.sync_directory(self._directory)
            except OSError as error:
                raise storage.full(found, error) from error
            self._unsynced.discard(task)
        return Entry(Outcome(), update) if found == update else Entry(self._read(answer), None)

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
                self._unsynced.add(task)
                made.rename(update)
                storage.sync_directory(self._directory)
                self._unsynced.discard(task)
                return Entry(outcome, update)
            made.unlink(missing_ok=True)  # half an update, or a spare file
        except OSError as error:
            raise storage.full(update, error) from error
        self._unsynced.add(task)
        storage.write_atomic(self._directory / f"{task}{_ANSWER}", msgspec.msgpack.encode(outcome))
        self._unsynced.discard(task)
        return Entry(outcome, None)

    def acknowledged(self, task: str) -> None:
        """Forget the answer: it is durable at the server, or nobody waits for it."""
        self._unsynced.discard(task)
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
