# SPDX-License-Identifier: Apache-2.0
"""Runs: a job carried out by an engine, with everything it gives on disk.

    runs/NAME-0001/
      job.json            the resolved job, from which the run can be repeated
      run.json            id, state (running, finished, failed, interrupted), times, versions, error
      metrics.jsonl       one record a round;  metrics.csv the same as rows;  tensorboard/ if asked for
      checkpoints/        what --resume goes on from
      sites.json          counts and label histograms of the sites
      baselines.json      scores of finished baselines
      model/ adapter/     the result, as its library saves it
      report.json report.html
      work/               memories of the sites, spooled updates, logs

A run is locked while it works. Killed at any instant, it goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hansa.version
from hansa.core import config, storage
from hansa.core.config import Job
from hansa.errors import HansaError, InterruptedRunError, JobError, StorageError, nearest
from hansa.sinks.metrics import read_records

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    directory: Path

    @property
    def id(self) -> str:
        """The run's name, as ``hansa runs`` lists it."""
        return self.directory.name

    @property
    def job(self) -> Job:
        """The resolved job."""
        return config.parse(storage.read_json(self.directory / "job.json"))

    @property
    def status(self) -> dict[str, Any]:
        """State, times, versions and error."""
        return dict(storage.read_json(self.directory / "run.json"))

    @property
    def state(self) -> str:
        """What became of it: running, finished, failed, interrupted, or killed (it can't have said so itself)."""
        state = str(self.status["state"])
        return "killed" if state == "running" and not self._locked else state

    @property
    def _locked(self) -> bool:
        try:
            with (self.directory / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of all finished rounds."""
        return read_records(self.directory / "metrics.jsonl")

    @property
    def report(self) -> dict[str, Any]:
        """The report; of a run that is not finished, what is known so far (``model`` is None)."""
        path = self.directory / "report.json"
        return dict(storage.read_json(path)) if path.exists() else self._report_so_far()

    def _report_so_far(self) -> dict[str, Any]:
        stored = {
            name: storage.read_json(path) if path.exists() else empty
            for name, empty in (("sites", []), ("baselines", {}))
            for path in (self.directory / f"{name}.json",)
        }
        return {
            "format": FORMAT,
            "run": self.id,
            "job": self.job.model_dump(mode="json"),
            "hansa": self.status["hansa"],
            "platform": platform.platform(),
            "created": now(),
            "seconds": sum(record["seconds"] for record in self.records),
            "sites": stored["sites"],
            "rounds": self.records,
            "model": None,
            "baselines": stored["baselines"],
            "failed_baselines": {},
            "samples": [],
        }

    @property
    def model_directory(self) -> Path:
        """Where the result is, as its library saves it."""
        return self.directory / "model"


def list_runs(folder: Path) -> list[Run]:
    """Return the runs in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    runs = [Run(path) for path in folder.iterdir() if is_run(path)]
    return sorted(runs, key=lambda run: (run.status["started"], run.id))


def is_run(path: Path) -> bool:
    """Say whether a run is at ``path``."""
    return (path / "run.json").exists()


def last_unfinished(folder: Path) -> Run:
    """Return the run in ``folder`` that was begun last of those that can go on.

    Raises:
        JobError: there is none.
    """
    open_ones = [run for run in list_runs(folder) if run.state not in ("finished", "running")]
    if not open_ones:
        raise JobError(f"There is no unfinished run in {folder}. `hansa runs` lists the runs.")
    return open_ones[-1]


def find_run(folder: Path, name: str) -> Run:
    """Return the run called ``name``, or at the path ``name``.

    Raises:
        JobError: there is none; the nearest name is suggested.
    """
    for path in (Path(name), folder / name):
        if is_run(path):
            return Run(path)
    known = [run.id for run in list_runs(folder)]
    raise JobError(f"There is no run {name!r} in {folder}.{nearest(name, known) or ' `hansa runs` lists them.'}")


def create(job: Job) -> Path:
    """Make the folder of a new run of ``job`` in its output.dir (StorageError)."""
    folder = Path(job.output.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            directory = folder / f"{job.name}-{number:04d}"
            try:
                directory.mkdir()
                break
            except FileExistsError:
                number += 1
    except OSError as error:
        raise StorageError(f"Can't create a run in {folder}: {error.strerror}. Set output.dir.") from error
    describe(directory, directory.name, job)
    return directory


def describe(directory: Path, id: str, job: Job) -> None:
    """Make the folder ``directory`` that of a new run of ``job`` (StorageError)."""
    storage.write_atomic(directory / "job.json", job.to_json().encode())
    _write_status(directory, id=id, state="running", started=now())


def resume_from(job: Job, resume: bool | str) -> Path:
    """Return the folder of the run to go on with: the last unfinished (True), or the one of that name (JobError)."""
    folder = Path(job.output.dir)
    if isinstance(resume, str):
        found = find_run(folder, resume)
    else:
        candidates = [r for r in list_runs(folder) if r.status["state"] != "finished" and r.job == job]
        if not candidates:
            raise JobError(
                f"There is no unfinished run of this very job in {folder}. Name the run, or start a new one.",
                job=job.name,
            )
        found = candidates[-1]
    if found.job != job:
        raise JobError(
            f"The job has changed since run {found.id} began; a resumed run must be of the same job. "
            f"Start a new run, or use {found.directory / 'job.json'}.",
            job=job.name,
        )
    return found.directory


def now() -> str:
    """Return the time as ISO 8601 text, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write_status(directory: Path, **values: Any) -> None:
    path = directory / "run.json"
    earlier = storage.read_json(path) if path.exists() else {"format": FORMAT, "id": directory.name}
    storage.write_json(path, {**earlier, "hansa": hansa.version.VERSION, **values})


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run's lock; StorageError if another process holds it."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"Run {directory.name} is at work in another process.") from None
        yield


@contextlib.contextmanager
def status(directory: Path) -> Iterator[None]:
    """Write to run.json what becomes of the run while the body works."""
    _write_status(directory, state="running", error=None)
    try:
        yield
    except HansaError as error:
        _note_failure(directory, state="failed", error=str(error))
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        _note_failure(directory, state="interrupted", error="stopped by the user")
        raise InterruptedRunError(
            f"Stopped. The finished rounds are safe: `hansa run --resume {directory}` goes on."
        ) from None
    except OSError as error:
        _note_failure(directory, state="failed", error=str(error))
        raise storage.full(Path(error.filename or directory), error) from error
    except BaseException as error:
        _note_failure(directory, state="failed", error=f"{type(error).__name__}: {error}")
        raise
    _write_status(directory, state="finished", ended=now())


def _note_failure(directory: Path, **values: Any) -> None:
    with contextlib.suppress(StorageError):  # the disk may be what failed; the first error matters more
        _write_status(directory, ended=now(), **values)
