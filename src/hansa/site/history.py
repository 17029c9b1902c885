# SPDX-License-Identifier: Apache-2.0
"""What a site has answered for each signed job, kept for good, so that a server can't have it done over with others.

    work/history/DIGEST.jsonl     {"job"}, then a line for each plan that was answered: {"step", "plan"}

The digest is of what was signed, not of its ZIP file, and the file outlives the job: a job that leaves the agenda and
comes back goes on from it.

| case | result |
|---|---|
| a signed job under a second id | PolicyError |
| a second, different plan for a round that was answered | PolicyError |
| the same plan again: the server was restarted, the answer was lost | carried out again |
| a power cut or a full disk while a line is written | that line does not count, and is written over |
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

import blake3
import msgspec

from hansa.bundle import Bundle
from hansa.core import storage
from hansa.errors import PolicyError, StorageError
from hansa.transport.messages import Assignment


class _Job(msgspec.Struct):
    job: str


class _Answered(msgspec.Struct):
    step: str
    plan: str


class History:
    """The history of one signed job at this site.

    Args:
        folder: where the site keeps all of them; made if need be.
        bundle: what was signed.
        job: the id under which the server offers it.

    Raises:
        PolicyError: the site knows the same signed job under another id.
        StorageError: it can't be read or written.
    """

    def __init__(self, folder: Path, bundle: Bundle, job: str) -> None:
        signed = (bundle.signer.name, bundle.created, bundle.job.name, sorted(bundle.files.items()))
        self._path = folder / f"{blake3.blake3(msgspec.json.encode(signed)).hexdigest()}.jsonl"
        self._answered: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # ids that come at once are told apart
                file.seek(0)
                data = file.read()
                self._size = data.rfind(b"\n") + 1
                first, *lines = data[: self._size].splitlines() or [b""]
                if first:
                    self._claimed(msgspec.json.decode(first, type=_Job).job, job)
                else:
                    self._append(file, _Job(job))
                    storage.sync_directory(folder)
                for line in lines:
                    said = msgspec.json.decode(line, type=_Answered)
                    self._answered[said.step] = said.plan
        except OSError as error:
            raise storage.full(self._path, error) from error
        except msgspec.MsgspecError as error:
            raise StorageError(f"{self._path} is damaged: {error}.") from error

    def _claimed(self, known: str, job: str) -> None:
        if known != job:
            raise PolicyError(f"The server offers a signed job as {job}; this site knows it as {known[:100]}.")

    def check(self, given: Assignment) -> None:
        """Raise PolicyError if the round was answered for another plan."""
        if self._answered.get(_step(given), given.plan) != given.plan:
            raise PolicyError(
                f"This site has answered another plan to {given.kind} for round {given.round} of {given.course!r}, and "
                "answers one a round."
            )

    def note(self, given: Assignment) -> None:
        """Remember, durably, that the plan is answered; before the answer can leave.

        Raises:
            StorageError: the disk is full.
        """
        step = _step(given)
        if step in self._answered:
            return
        try:
            with self._path.open("r+b") as file:
                self._append(file, _Answered(step, given.plan))
        except OSError as error:
            raise storage.full(self._path, error) from error
        self._answered[step] = given.plan

    def _append(self, file: BinaryIO, line: msgspec.Struct) -> None:
        data = msgspec.json.encode(line) + b"\n"
        file.truncate(self._size)
        file.seek(self._size)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        self._size += len(data)


def _step(given: Assignment) -> str:
    return f"{given.kind} {given.round} {given.course}"
