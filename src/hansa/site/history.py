# SPDX-License-Identifier: Apache-2.0
"""What a site has answered for each signed job, kept for good, so that a server can't have it done over with others.

    work/history/DIGEST.jsonl     {"job", "created"}, then for each plan that was answered {"step", "plan", "task"}
    work/history/DIGEST.secagg/   where the site stands in the job's secure aggregation, and what it has revealed
    work/history/horizon.json     when the newest job was signed that has been forgotten

The digest is of what was signed, not of its ZIP file, and the file outlives the job: a job that leaves the agenda and
comes back goes on from it. What is old, or too much, is forgotten once the job is on no agenda. What was signed no
later than something forgotten is taken up no more, so that nothing forgotten is done over, whatever a clock says.

| case | result |
|---|---|
| a signed job under a second id | PolicyError |
| a second, different plan for a round that was answered | PolicyError |
| the same plan again: the server was restarted, the answer was lost | carried out again; |
| | to train under noise that the site draws (local, dp-sgd), outside masks: PolicyError |
| the agent is killed between this note and the answer, under such noise | the very update that was noted is the |
| | answer: it was durable before the note; no noise is drawn and nothing is charged again |
| the same before this note, under masks that were read already | made again it has other values, which are refused |
| | under the same masks: the site is absent from that attempt |
| a job that is resumed while its round is evaluated | the server keeps that round's model (`hansa.server.store`) |
| a signed job that this site has forgotten, or never heard of, and as old as one that it has | PolicyError |
| a power cut between the horizon and what it lets go of | the files are forgotten the next time |
| a power cut or a full disk while a line is written | that line does not count, and is written over |
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import msgspec

from hansa.bundle import Bundle
from hansa.core import storage
from hansa.errors import PolicyError, StorageError
from hansa.transport.messages import Assignment

KEPT_DAYS = 90
"""For how long a job's history is kept after the job was signed, once the job is over."""

MOST_KEPT = 10_000
"""How many histories of jobs that are over are kept."""

_HORIZON = "horizon.json"


class _Job(msgspec.Struct):
    job: str
    created: datetime


class _Horizon(msgspec.Struct):
    created: datetime


class _Answered(msgspec.Struct):
    step: str
    plan: str
    task: str = ""


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
        self._path = folder / f"{bundle.digest}.jsonl"
        self._answered: dict[str, _Answered] = {}
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
                    _check_horizon(folder, bundle.created)
                    self._append(file, _Job(job, bundle.created))
                    storage.sync([self._path, folder])
                for line in lines:
                    said = msgspec.json.decode(line, type=_Answered)
                    self._answered[said.step] = said
        except OSError as error:
            raise storage.full(self._path, error) from error
        except msgspec.MsgspecError as error:
            raise StorageError(f"{self._path} is damaged: {error}.") from error
        except PolicyError:
            if not self._size:
                self._path.unlink(missing_ok=True)
            raise

    def _claimed(self, known: str, job: str) -> None:
        if known != job:
            raise PolicyError(f"The server offers a signed job as {job}; this site knows it as {known[:100]}.")

    @property
    def digest(self) -> str:
        """The digest of what was signed."""
        return self._path.stem

    @property
    def secagg(self) -> Path:
        """The folder of the states of secure aggregation."""
        return self._path.with_suffix(".secagg")

    def check(self, given: Assignment, *, once: bool = False) -> None:
        """Raise PolicyError if the round was answered for another plan; or at all, where that is to happen ``once``."""
        if once and _step(given) in self._answered:
            raise PolicyError(
                f"This site has answered round {given.round} of {given.course!r}. Made again, with other noise, it "
                "would tell more than the job's privacy plan accounts for."
            )
        known = self._answered.get(_step(given))
        if known is not None and known.plan != given.plan:
            raise PolicyError(
                f"This site has answered another plan to {given.kind} for round {given.round} of {given.course!r}, and "
                "answers one a round."
            )

    def has(self, given: Assignment) -> bool:
        """Say whether this very task was noted as answered."""
        return self._answered.get(_step(given)) == _Answered(_step(given), given.plan, given.task)

    def trained(self, course: str) -> set[int]:
        """Return the rounds of a course for which an update was made."""
        return {
            int(number)
            for kind, number, name in (step.split(" ", 2) for step in self._answered)
            if (kind, name) == ("train", course)
        }

    def note(self, given: Assignment) -> Path:
        """Write down that the plan is answered, and return the file: it is to be synced before the answer can leave.

        Raises:
            StorageError: the disk is full.
        """
        line = _Answered(_step(given), given.plan, given.task)
        if line.step not in self._answered:
            try:
                with self._path.open("r+b") as file:
                    self._append(file, line)
            except OSError as error:
                raise storage.full(self._path, error) from error
            self._answered[line.step] = line
        return self._path

    def _append(self, file: BinaryIO, line: msgspec.Struct) -> None:
        data = msgspec.json.encode(line) + b"\n"
        file.truncate(self._size)
        file.seek(self._size)
        file.write(data)
        file.flush()
        self._size += len(data)


def prune(folder: Path, jobs: Collection[str], now: datetime) -> None:
    """Forget what is old, or too much, of jobs that are over.

    Args:
        folder: where the site keeps all histories.
        jobs: ids of the jobs that are on the agenda; theirs are kept.
        now: what counts as old by it. A wrong clock makes jobs be forgotten early, and never done over.

    Raises:
        StorageError: it can't be read or written.
    """
    over: list[tuple[datetime, Path]] = []
    try:
        for path in folder.glob("*.jsonl"):
            with path.open("rb") as file:
                first = file.readline()
            with contextlib.suppress(msgspec.MsgspecError):  # a damaged one is looked at by who runs into it
                known = msgspec.json.decode(first, type=_Job)
                if known.job not in jobs:
                    over.append((known.created, path))
        over.sort()
        oldest = now - timedelta(days=KEPT_DAYS)
        gone = [item for i, item in enumerate(over) if item[0] < oldest or i < len(over) - MOST_KEPT]
        if not gone:
            return
        horizon = max(gone[-1][0], _horizon(folder) or gone[-1][0])
        storage.write_atomic(folder / _HORIZON, msgspec.json.encode(_Horizon(horizon)))
        for _, path in gone:
            shutil.rmtree(path.with_suffix(".secagg"), ignore_errors=True)
            path.unlink(missing_ok=True)
    except OSError as error:
        raise storage.full(folder, error) from error


def _horizon(folder: Path) -> datetime | None:
    try:
        return msgspec.json.decode((folder / _HORIZON).read_bytes(), type=_Horizon).created
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise StorageError(f"{folder / _HORIZON} is damaged: {error}.") from error


def _check_horizon(folder: Path, created: datetime) -> None:
    horizon = _horizon(folder)
    if horizon is not None and created <= horizon:
        raise PolicyError(
            f"The job was signed at {created:%Y-%m-%d %H:%M} UTC. This site has forgotten what it answered to jobs "
            f"signed by {horizon:%Y-%m-%d %H:%M}, and takes up none of that age. Submit the job again."
        )


def _step(given: Assignment) -> str:
    return f"{given.kind} {given.round} {given.course}"
