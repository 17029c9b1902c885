# SPDX-License-Identifier: Apache-2.0
"""Finished answers, durable before their first byte leaves, so that no retry and no restart trains again.

    outbox/TASK/answer.msgpack     what became of the task
    outbox/TASK/update.hansa       the update, where there is one

A folder appears by one rename after its files are durable, and goes when the server has acknowledged the answer.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hansa.core import storage
from hansa.errors import StorageError
from hansa.transport.messages import Inspected, Missing

ANSWER, UPDATE = "answer.msgpack", "update.hansa"


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
        for path in directory.glob(".*"):  # what was being written when the agent was killed
            shutil.rmtree(path, ignore_errors=True)

    def find(self, task: str) -> Entry | None:
        """Return the finished answer to ``task``, if there is one.

        Raises:
            StorageError: it is there and can't be read.
        """
        folder = self._directory / task
        if not folder.is_dir():
            return None
        try:
            outcome = msgspec.msgpack.decode((folder / ANSWER).read_bytes(), type=Outcome)
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"The finished answer in {folder} can't be read: {error}.") from error
        update = folder / UPDATE
        return Entry(outcome, update if update.exists() else None)

    def begin(self, task: str) -> Path:
        """Return an empty folder in which the answer is made; an update goes to ``UPDATE`` in it.

        Raises:
            StorageError: the disk is full or the folder can't be written.
        """
        folder = self._directory / f".{task}"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise storage.full(folder, error) from error
        return folder

    def finish(self, task: str, outcome: Outcome) -> Entry:
        """Make the answer durable and return it.

        Raises:
            StorageError: the disk is full.
        """
        folder = self._directory / f".{task}"
        try:
            if outcome.missing is not None:  # what lies there is half an update, or a spare file
                (folder / UPDATE).unlink(missing_ok=True)
            (folder / ANSWER).write_bytes(msgspec.msgpack.encode(outcome))
        except OSError as error:
            raise storage.full(folder, error) from error
        storage.publish(folder, self._directory / task)
        entry = self.find(task)
        assert entry is not None, "it was just put there"
        return entry

    def acknowledged(self, task: str) -> None:
        """Forget the answer: it is durable at the server, or nobody waits for it."""
        gone = self._directory / f".{task}"
        with contextlib.suppress(OSError):  # renamed first, so that a crash leaves it whole or out of sight
            (self._directory / task).rename(gone)
            self._spares.give(gone / UPDATE)
        shutil.rmtree(gone, ignore_errors=True)

    def keep_only(self, tasks: Iterable[str]) -> None:
        """Forget the answers that nobody waits for any more."""
        wanted = set(tasks)
        for path in self._directory.iterdir():
            if path.name not in wanted and not path.name.startswith("."):
                self.acknowledged(path.name)
