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
import hashlib
import platform
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import hansa.version
from hansa import registry
from hansa.core import config, storage
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Piece, Trait, check_fit
from hansa.core.ports import Cohort, Program, SiteReport
from hansa.core.strategy import Strategy
from hansa.core.tree import Tree
from hansa.core.values import Model, RoundRecord, Snapshot
from hansa.core.workflow import Workflow
from hansa.errors import DataError, HansaError, InterruptedRunError, JobError, MissingExtraError, StorageError, nearest
from hansa.simulation.baselines import Baselines
from hansa.simulation.engine import Course, Engine, inspect_all
from hansa.simulation.engines import open_engine
from hansa.simulation.progress import Progress, Silent, Watched
from hansa.sinks.checkpoint import Checkpoints, early_stop
from hansa.sinks.metrics import Csv, JsonLines, read_records
from hansa.sinks.report import write as write_report
from hansa.workflows.evaluate import Scores

FORMAT = 1


class Sink(Protocol):
    """An observer of rounds."""

    def write(self, record: RoundRecord) -> None:
        """Take one record; called once a round, in order."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


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
            "created": _now(),
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


def run(
    job: Job,
    *,
    resume: bool | str = False,
    progress: Progress | None = None,
    program: Program | None = None,
    strategy: Strategy | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """Carry ``job`` out and return the finished run.

    Args:
        job: what to do.
        resume: go on with the last unfinished run of the same job (True), or with the run of that name.
        progress: shows what happens; nothing by default.
        program: training code in place of the job's recipe (engines in this process only).
        strategy: an algorithm in place of the job's.
        sinks: further observers of rounds.

    Raises:
        HansaError: of the kind that says what went wrong; finished rounds are on disk.
    """
    return asyncio.run(carry_out(job, resume, progress or Silent(), program, strategy, sinks))


async def carry_out(
    job: Job,
    resume: bool | str,
    progress: Progress,
    program: Program | None = None,
    strategy: Strategy | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """Do what :func:`run` does, inside a running event loop."""
    directory = _resumed(job, resume) if resume else _created(job)
    with _locked(directory), _status(directory):
        work = directory / "work"
        work.mkdir(exist_ok=True)
        progress.say(f"Run {directory.name} in {directory}")
        async with open_engine(job, work, program) as engine:
            await _Carrier(job, directory, engine, progress, strategy, sinks).carry_out()
    return Run(directory)


class _Carrier:
    """One attempt at one run."""

    def __init__(
        self,
        job: Job,
        directory: Path,
        engine: Engine,
        progress: Progress,
        strategy: Strategy | None,
        sinks: Sequence[Sink],
    ) -> None:
        self._job = job
        self._directory = directory
        self._work = directory / "work"
        self._engine = engine
        self._progress = progress
        self._course = Course(job.name, tuple(engine.sites), strategy or job.strategy, tuple(job.filters))
        self._given_sinks = sinks
        self._begun = time.perf_counter()
        evaluation = job.evaluation
        self._checkpoints = Checkpoints(directory / "checkpoints", job.output.keep, evaluation.metric, evaluation.mode)

    async def carry_out(self) -> None:
        """Check, train, compare, export, report."""
        check(self._job, self._engine, self._course)
        sites = await self._inspect()
        strategy, _ = self._course.pieces()
        initial = await self._initial()
        last = await self._train(strategy, initial)
        chosen = self._chosen(last)
        scores, failed = await self._baselines(initial)
        seconds = time.perf_counter() - self._begun
        await self._finish(chosen, initial, sites, scores, failed, seconds)

    async def _inspect(self) -> list[SiteReport]:
        self._progress.stage("checking the sites' data", 0)
        reports, errors = await inspect_all(self._engine)
        error = refusal(self._job, len(reports), errors)
        if error is not None:
            raise error
        storage.write_json(self._directory / "sites.json", [asdict(report) for report in reports])
        return reports

    async def _initial(self) -> Tree:
        path = self._directory / "initial.safetensors"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            storage.save_tree(temporary, await self._engine.initial())
            temporary.replace(path)
        return storage.load_tree(path)

    async def _train(self, strategy: Strategy, initial: Tree) -> Snapshot:
        start = self._checkpoints.load()
        if start is None:
            model = Model.start(initial)
            start = Snapshot(0, model, strategy.init(model))
        else:
            self._progress.say(f"Going on after round {start.round}.")
        self._checkpoints.forget_after(start.round)
        lines = JsonLines(self._directory / "metrics.jsonl", after=start.round)
        rows = Csv(self._directory / "metrics.csv", lines.records)
        sinks: list[Sink] = [lines, rows, *self._given_sinks]
        if self._job.output.tensorboard:
            module = registry.load_object("hansa.sinks.tensorboard:TensorBoard")
            sinks.append(module(self._directory / "tensorboard"))
        sinks.append(self._checkpoints)
        self._progress.stage("federated training", self._job.rounds, start.round)
        now = start
        if not self._enough(lines.records):
            async for record in self._rounds(strategy, start):
                for sink in sinks:
                    sink.write(record)
                now = Snapshot(record.round, record.model, record.state, record.acknowledged)
                self._progress.round(record)
                self._progress.advance()
                if self._enough(lines.records):
                    self._progress.say(f"Stopped early: {self._job.evaluation.metric} no longer improves.")
                    break
        for sink in sinks:
            sink.close()
        return now

    def _enough(self, records: list[dict[str, Any]]) -> bool:
        evaluation = self._job.evaluation
        return early_stop(records, evaluation.metric, evaluation.mode, evaluation.patience)

    def _rounds(self, strategy: Strategy, start: Snapshot) -> AsyncIterator[RoundRecord]:
        cohort: Cohort = Watched(self._engine.cohort(self._course), self._progress)
        workflow = workflow_of(self._job)
        return workflow.rounds(self._job, strategy, cohort, self._engine.peers, start, self._work)

    def _chosen(self, last: Snapshot) -> Snapshot:
        best = self._checkpoints.best
        if self._job.output.model == "best" and best:
            return self._checkpoints.load(best["round"]) or last
        return last

    async def _baselines(self, initial: Tree) -> tuple[dict[str, Scores], dict[str, str]]:
        path = self._directory / "baselines.json"
        stored = storage.read_json(path) if path.exists() else {}
        done = {name: Scores(entry["overall"], entry["by_site"]) for name, entry in stored.items()}

        def save(name: str, scores: Scores) -> None:
            done[name] = scores
            storage.write_json(path, {n: {"overall": s.overall, "by_site": s.by_site} for n, s in sorted(done.items())})

        baselines = Baselines(self._job, self._engine, initial, self._work, dict(done), save)
        failed = await baselines.run(self._progress)
        return done, failed

    async def _finish(
        self,
        chosen: Snapshot,
        initial: Tree,
        sites: Sequence[SiteReport],
        baselines: Mapping[str, Scores],
        failed: Mapping[str, str],
        seconds: float,
    ) -> None:
        self._progress.stage("saving the model and the report", 0)
        params = chosen.model.native()
        export = self._directory / ".export"
        shutil.rmtree(export, ignore_errors=True)
        export.mkdir()
        await self._engine.export(params, export)
        for item in export.iterdir():
            target = self._directory / item.name
            if target.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            item.replace(target)
        export.rmdir()
        report = {
            "format": FORMAT,
            "run": self._directory.name,
            "job": self._job.model_dump(mode="json"),
            "hansa": hansa.version.VERSION,
            "platform": platform.platform(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "sites": [asdict(site) for site in sites],
            "rounds": read_records(self._directory / "metrics.jsonl"),
            "model": {
                "round": chosen.round,
                "parameters": sum(leaf.size for leaf in params.values()),
                "bytes": trees.num_bytes(params),
                "sha256": digest(params),
            },
            "baselines": {n: {"overall": s.overall, "by_site": s.by_site} for n, s in sorted(baselines.items())},
            "failed_baselines": dict(failed),
            "samples": await self._samples(initial, params),
        }
        storage.write_json(self._directory / "report.json", report)
        try:
            write_report(self._directory, report)
        except MissingExtraError as error:
            self._progress.say(f"report.json is written, report.html is not. {error.message}")

    async def _samples(self, initial: Tree, params: Tree) -> list[dict[str, str]]:
        before = await self._engine.show(initial)
        after = await self._engine.show(params)
        return [{"prompt": p, "before": before[p], "after": after[p]} for p in before]


def refusal(job: Job, ready: int, errors: Mapping[str, HansaError]) -> HansaError | None:
    """Return the error that says why sites can't take part, of the kind of the first, or None if all can.

    Args:
        job: the job.
        ready: how many sites can take part.
        errors: site -> why it can't.
    """
    if errors:
        lines = "\n".join(f"  {site}: {error.message}" for site, error in errors.items())
        kind = type(next(iter(errors.values())))
        return kind(f"{len(errors)} of {ready + len(errors)} sites can't take part:\n{lines}", job=job.name)
    if not ready:
        return DataError("The job has no sites. Check data.train and partition.", job=job.name)
    return None


def check(job: Job, engine: Engine, course: Course) -> None:
    """Raise FitError if the pieces of ``job`` do not compose."""
    check_fit(pieces_of(job, engine.traits, course))


def pieces_of(job: Job, program_traits: frozenset[Trait], course: Course) -> list[Piece]:
    """Return every piece of a job with its traits."""
    strategy, filters = course.pieces()
    plain = job.train.optimizer == "sgd" and not job.train.momentum
    steps = frozenset() if plain else frozenset({Trait.ADAPTIVE_STEPS})
    cohort: set[Trait] = set()
    if job.cohort.deadline_s is not None:
        cohort.add(Trait.TIMED)
    if job.cohort.late == "accept":
        cohort.add(Trait.STALE)
    workflow = workflow_of(job)
    vectorised = {Trait.VECTORISED} if job.engine.name == "batched" else set()
    return [
        Piece("strategy", strategy.name, strategy.traits),
        *(Piece("filter", piece.name, piece.traits) for piece in filters),
        Piece("recipe", job.recipe.name, program_traits - {Trait.VECTORISED} - steps),
        Piece("optimizer", job.train.optimizer, steps),
        Piece("workflow", workflow.name, workflow.traits),
        Piece("cohort", "policy", frozenset(cohort)),
        Piece("engine", job.engine.name, frozenset(vectorised)),
    ]


def workflow_of(job: Job) -> Workflow:
    """Return the workflow that the job names."""
    chosen: Workflow = registry.build("workflows", job.workflow.name, job.workflow.options)
    return chosen


def digest(params: Tree) -> str:
    """Return the SHA-256 of all tensors' names, dtypes, shapes and bytes, in the order of their names."""
    state = hashlib.sha256()
    for name in sorted(params):
        leaf = params[name]
        state.update(f"{name}\0{leaf.dtype.name}\0{leaf.shape}\0".encode())
        for _, values in trees.blocks(leaf):
            state.update(values.tobytes())
    return state.hexdigest()


def _created(job: Job) -> Path:
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
    storage.write_atomic(directory / "job.json", job.to_json().encode())
    _write_status(directory, state="running", started=_now())
    return directory


def _resumed(job: Job, resume: bool | str) -> Path:
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write_status(directory: Path, **values: Any) -> None:
    path = directory / "run.json"
    earlier = storage.read_json(path) if path.exists() else {"format": FORMAT, "id": directory.name}
    storage.write_json(path, {**earlier, "hansa": hansa.version.VERSION, **values})


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"Run {directory.name} is at work in another process.") from None
        yield


@contextlib.contextmanager
def _status(directory: Path) -> Iterator[None]:
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
    _write_status(directory, state="finished", ended=_now())


def _note_failure(directory: Path, **values: Any) -> None:
    with contextlib.suppress(StorageError):  # the disk may be what failed; the first error matters more
        _write_status(directory, ended=_now(), **values)
