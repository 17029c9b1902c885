# SPDX-License-Identifier: Apache-2.0
"""One attempt at a run, whatever engine carries it: check, train, compare, export, report."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import hansa.version
from hansa import registry
from hansa.core import settle, storage
from hansa.core import tree as trees
from hansa.core.config import HomomorphicEncryptionSection, Job, SecureAggregationSection
from hansa.core.ports import Cohort, SiteReport
from hansa.core.strategy import Strategy
from hansa.core.tree import Tree
from hansa.core.values import TRAINING, RoundRecord, Snapshot
from hansa.errors import DataError, HansaError, MissingExtraError
from hansa.privacy.draws import Secret
from hansa.privacy.plan import PrivacyPlan, plan_of, terms_of_job
from hansa.runs import run as runs
from hansa.runs.baselines import Baselines
from hansa.runs.engine import Engine, inspect_all
from hansa.runs.masking import settled, told
from hansa.runs.pieces import check, workflow_of
from hansa.runs.progress import Progress, Watched
from hansa.runs.run import Run
from hansa.sinks.checkpoint import Checkpoints, early_stop
from hansa.sinks.metrics import Csv, JsonLines, read_records
from hansa.sinks.report import write as write_report
from hansa.workers.runner import Course
from hansa.workflows.evaluate import Scores
from hansa.workflows.scatter_gather import wanted

INITIAL = "initial.safetensors"
"""The parameters that a run's training starts from."""


class Sink(Protocol):
    """An observer of rounds."""

    def write(self, record: RoundRecord) -> None:
        """Take one record; called once a round, in order."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


async def carry_out(
    run: Run,
    open_engine: Callable[[Path], Engine],
    progress: Progress,
    strategy: Strategy | None = None,
    sinks: Sequence[Sink] = (),
    *,
    simulated: bool = False,
) -> None:
    """Bring ``run`` to its end, from wherever it stands.

    Args:
        run: the run; it is locked meanwhile.
        open_engine: returns the engine, not yet entered, given a folder for its own files.
        progress: shows what happens.
        strategy: an algorithm in place of the job's.
        sinks: further observers of rounds.
        simulated: whether the sites are this machine's, so that what the job leaves open is settled here, and what is
            masked by default need not be hidden from anybody.

    Raises:
        HansaError: of the kind that says what went wrong; finished rounds are on disk.
    """
    with runs.locked(run.directory), runs.status(run.directory):
        work = run.directory / "work"
        work.mkdir(exist_ok=True)
        async with open_engine(work) as engine:
            job = run.job
            if simulated:
                job = settled(job, len(engine.sites), own_strategy=strategy is not None)
            check(
                job, engine.traits, Course(job.name, tuple(engine.sites), strategy or job.strategy, tuple(job.filters))
            )
            hidden = None if simulated and job.masks is not None and job.masks.by_default else job.secret_sums
            await _Carrier(job, run.directory, engine, progress, strategy, sinks, hidden).carry_out()


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
        hidden: SecureAggregationSection | HomomorphicEncryptionSection | None,
    ) -> None:
        self._job = job
        self._directory = directory
        self._work = directory / "work"
        self._engine = engine
        self._progress = progress
        self._course = Course(
            job.name,
            tuple(engine.sites),
            strategy or job.strategy,
            tuple(job.filters),
            terms_of_job(job),
            hidden,
        )
        self._secret = directory / "work" / "protection.key"
        self._given_sinks = sinks
        self._begun = time.perf_counter()
        evaluation = job.evaluation
        self._spares = storage.Spares(self._work / storage.SPARES)
        self._checkpoints = Checkpoints(
            directory / "checkpoints", job.output.keep, evaluation.metric, evaluation.mode, self._spares
        )

    async def carry_out(self) -> None:
        """Train, compare, export, report."""
        self._progress.say(told(self._job, len(self._engine.sites)))
        sites = await self._inspect()
        plan = self._promise(sites)
        strategy, _ = self._course.pieces(Secret.kept(self._secret) if self._course.terms else None)
        initial = await self._initial()
        last = await self._train(strategy, initial)
        chosen = self._chosen(last)
        scores, failed = await self._baselines(initial)
        seconds = time.perf_counter() - self._begun
        await self._finish(chosen, initial, sites, scores, failed, seconds, plan)
        self._secret.unlink(missing_ok=True)

    async def _inspect(self) -> list[SiteReport]:
        self._progress.stage("checking the sites' data", 0)
        reports, errors = await inspect_all(self._engine)
        error = refusal(self._job, len(reports), errors)
        enough = len(reports) >= wanted(self._job.cohort.quorum, len(self._engine.sites))
        if error is not None and (self._engine.needs_all or not enough):
            raise error
        for site, reason in errors.items():
            self._progress.say(f"{site} does not take part so far: {reason.message}")
        storage.write_json(self._directory / "sites.json", [asdict(report) for report in reports])
        return reports

    def _promise(self, sites: Sequence[SiteReport]) -> PrivacyPlan | None:
        plan = promise(self._job, len(self._engine.sites), sites)
        if plan is not None:
            for claim in plan.claims:
                self._progress.say(f"Privacy: {claim}")
            for warning in plan.warnings:
                self._progress.say(f"Privacy: {warning}")
        return plan

    async def _initial(self) -> Tree:
        path = self._directory / INITIAL
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            storage.save_tree(temporary, await self._engine.initial())
            temporary.replace(path)
        return storage.load_tree(path)

    async def _train(self, strategy: Strategy, initial: Tree) -> Snapshot:
        start = self._checkpoints.load()
        if start is None:
            start = Snapshot(0, *settle.start(strategy, initial, self._work))
        else:
            self._progress.say(f"Going on after round {start.round}.")
        self._checkpoints.forget_after(start.round)
        with contextlib.ExitStack() as stack:
            stack.callback(self._spares.clear)
            lines = JsonLines(self._directory / "metrics.jsonl", after=start.round)
            stack.callback(lines.close)
            sinks: list[Sink] = [Csv(self._directory / "metrics.csv", lines.records), *self._given_sinks]
            if self._job.output.tensorboard:
                module = registry.load_object("hansa.sinks.tensorboard:TensorBoard")
                sinks.append(module(self._directory / "tensorboard"))
            sinks.append(self._checkpoints)
            for sink in sinks:
                stack.callback(sink.close)
            self._progress.stage("federated training", self._job.rounds, start.round)
            now = start
            if self._enough(lines.records):
                return now
            async with contextlib.aclosing(self._rounds(strategy, start)) as rounds:
                async for record in rounds:
                    for sink in (lines, *sinks):
                        sink.write(record)
                    now = Snapshot(record.round, record.model, record.state, record.acknowledged)
                    self._progress.round(record)
                    self._progress.advance()
                    if self._enough(lines.records):
                        self._progress.say(f"Stopped early: {self._job.evaluation.metric} no longer improves.")
                        break
        return now

    def _enough(self, records: list[dict[str, Any]]) -> bool:
        evaluation = self._job.evaluation
        return early_stop(records, evaluation.metric, evaluation.mode, evaluation.patience)

    def _rounds(self, strategy: Strategy, start: Snapshot) -> AsyncGenerator[RoundRecord, None]:
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

        secure = self._course.secure
        baselines = Baselines(self._job, self._engine, initial, self._work, dict(done), save, secure)
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
        plan: PrivacyPlan | None,
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
        records = read_records(self._directory / "metrics.jsonl")
        if plan is not None and plan.secret_cohorts:
            records = [_without_cohort(record) for record in records]
        report = {
            "format": runs.FORMAT,
            "run": self._directory.name,
            "job": self._job.model_dump(mode="json"),
            "hansa": hansa.version.VERSION,
            "platform": platform.platform(),
            "created": runs.now(),
            "seconds": seconds,
            "sites": [asdict(site) if plan is None else asdict(replace(site, labels={})) for site in sites],
            "privacy": None if plan is None else plan.as_json(),
            "secure_aggregation": told(self._job, len(self._engine.sites)),
            "rounds": records,
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


def _without_cohort(record: dict[str, Any]) -> dict[str, Any]:
    """Return a round's record without what tells who took part; the run's own metrics keep it for the operator."""
    judged = {
        site: {name: value for name, value in values.items() if not name.startswith(TRAINING)}
        for site, values in record["site_metrics"].items()
    }
    hidden = {"asked": [], "accepted": [], "absent": [], "bytes_down": 0, "bytes_up": 0, "seconds": 0.0}
    return {**record, **hidden, "site_metrics": judged}


def promise(job: Job, num_sites: int, reports: Sequence[SiteReport]) -> PrivacyPlan | None:
    """Return a job's privacy plan over the sites that have reported, or None if it promises nothing.

    Raises:
        PrivacyError: a piece of the plan contradicts another.
    """
    fewest = min((report.counts.get("train", 0) for report in reports), default=0)
    return plan_of(job, num_sites, fewest or None)


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


def digest(params: Tree) -> str:
    """Return the SHA-256 of all tensors' names, dtypes, shapes and bytes, in the order of their names."""
    state = hashlib.sha256()
    for name in sorted(params):
        leaf = params[name]
        state.update(f"{name}\0{leaf.dtype.name}\0{leaf.shape}\0".encode())
        for _, values in trees.blocks(leaf):
            state.update(values.tobytes())
    return state.hexdigest()
