# SPDX-License-Identifier: Apache-2.0
"""What is attacked: a job on this machine, its data, its model, and what an adversary sees of it.

Nothing of a job's protection is made again here: :meth:`Subject.carry_out` runs the job's own workflow, strategy,
filters, clip, noise and masks in engine ``local``, and shows an attack every update as it reaches the server, what the
server's rule is given (under a privacy plan: the noised sums), and the model that comes of it.

| case | result |
|---|---|
| a job with masks, or encrypted updates | ``seen`` gets those, ``released`` their sum in the clear |
| a workflow whose sites send nothing to the server | ``seen`` and ``released`` are never called |
| a finished run | its final model is attacked, with the data of the sites that are reachable from here |
| a job that can't run | the error that ``hansa check`` gives |
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hansa import registry
from hansa.core import config, settle
from hansa.core.config import Job
from hansa.core.filter import Filter
from hansa.core.ports import Cohort, Program, Reply, SiteReport
from hansa.core.strategy import Notes, Strategy
from hansa.core.tree import Array, Parts, Tree
from hansa.core.values import Aggregate, Model, Plan, RoundRecord, Snapshot, Update
from hansa.errors import JobError
from hansa.privacy.draws import Secret
from hansa.privacy.plan import PrivacyPlan, Terms, terms_of_job
from hansa.runs.carrier import promise, refusal
from hansa.runs.masking import settled
from hansa.runs.pieces import check, workflow_of
from hansa.runs.progress import Progress, Silent, Watched
from hansa.runs.run import Run
from hansa.simulation.local import Local
from hansa.sinks.checkpoint import Checkpoints
from hansa.workers.runner import Course

Rows = NDArray[np.int64]


@runtime_checkable
class Transparent(Protocol):
    """A program whose training examples can be told apart, as attacks need; all recipes but ``script`` are."""

    def count(self, site: str) -> int:
        """Return how many training examples a site has."""
        ...

    def batch(self, site: str, rows: Rows) -> Mapping[str, Array]:
        """Return training examples as the model takes them: name -> array, the rows along its first axis."""
        ...

    def losses(self, params: Tree, site: str, rows: Rows) -> Array:
        """Return the loss of a model with ``params`` on each of these training examples, float64."""
        ...

    def holding(self, rows: Mapping[str, Rows]) -> Program:
        """Return the same program where each site named here has only these of its training examples."""
        ...


@dataclass(frozen=True)
class Subject:
    """A job as an attack sees it.

    Attributes:
        job: the resolved job; whether it is masked is settled, as for a deployment.
        program: its training code, with the data of all sites.
        params: the model that is attacked, native dtypes: of a run the final one, of a job the one it starts from.
        reports: what each site tells of its data.
        run: the finished run, where there is one.
        left: what is freed when the audit is over.
    """

    job: Job
    program: Program
    params: Tree
    reports: tuple[SiteReport, ...]
    run: Run | None
    left: contextlib.ExitStack = field(repr=False, compare=False)

    @property
    def sites(self) -> Sequence[str]:
        """All sites, sorted."""
        return self.program.sites

    @cached_property
    def plan(self) -> PrivacyPlan | None:
        """What the job promises; None for nothing."""
        return promise(self.job, len(self.sites), self.reports)

    @property
    def terms(self) -> Terms | None:
        """What server and sites agree on; None without a plan, and under dp-sgd, whose terms are each site's."""
        return terms_of_job(self.job)

    @property
    def strategy(self) -> Strategy:
        """The algorithm, without the plan around it."""
        strategy, _ = replace(self._course(self.program), terms=None).pieces()
        return strategy

    @property
    def filters(self) -> list[Filter]:
        """What updates pass before they leave, in order; masks come after."""
        _, filters = self._course(self.program).pieces()
        return filters

    @property
    def protection(self) -> str:
        """How updates are protected, in a few words, for a finding's ``setting``."""
        found = []
        if self.plan is not None:
            terms = self.plan.terms
            found.append(f"{terms.section.mechanism}, clip {terms.section.clip:g}, noise {terms.noise_multiplier:.3g}")
        if self.job.masks is not None:
            found.append("masked")
        if self.job.homomorphic_encryption is not None:
            found.append("encrypted")
        if self.job.filters:
            found.append("filters: " + ", ".join(item.name for item in self.job.filters))
        return "; ".join(found) or "no protection"

    def promised(self, adversary: str) -> float | None:
        """Return the ε promised against one of the plan's adversaries (``the public``, ``the sites``, ``the server``);
        None for nothing."""
        claims = () if self.plan is None else self.plan.claims
        return next((claim.epsilon for claim in claims if claim.adversary == adversary), None)

    def changed(self, *overrides: str) -> Subject:
        """Return the subject of the job with other settings (``train.steps=1``), from the same model.

        What was changed belongs into the finding's ``setting``.
        """
        return self.of(config.parse(config.override(self.job.model_dump(mode="json"), overrides)))

    def of(self, job: Job) -> Subject:
        """Return the subject of another job over the same data, from the same model."""
        return _loaded(job, self.run, self.params, self.left)

    def carry_out(
        self,
        *,
        program: Program | None = None,
        sites: Sequence[str] | None = None,
        params: Tree | None = None,
        rounds: int | None = None,
        seen: Callable[[Update], None] | None = None,
        released: Callable[[int, Aggregate], None] | None = None,
        recorded: Callable[[RoundRecord], None] | None = None,
        progress: Progress | None = None,
    ) -> Tree:
        """Carry rounds of the job out under its own protection and return the model after the last (native dtypes).

        Args:
            program: training code, and sites, in place of the job's.
            sites: who there is; all of the program's sites by default.
            params: what training starts from; the attacked model by default.
            rounds: how many; the job's by default. ε is of all of the job's.
            seen: is called with every update as the server gets it; it is not to be changed.
            released: is called with each round's number and what the server's rule is given.
            recorded: is called with each round's record, after the two above.
            progress: a step is counted for every round.

        Raises:
            HansaError: as a run of the job would.
        """
        job = self.job if rounds is None else self.job.model_copy(update={"rounds": rounds})
        with tempfile.TemporaryDirectory(prefix="hansa-audit-") as folder:
            chosen = self.params if params is None else params
            watched = _Watch(job, program or self.program, chosen, seen, released, recorded, progress or Silent())
            course = self._course(program or self.program, sites)
            return asyncio.run(watched.rounds(Path(folder), course))

    def _course(self, program: Program, sites: Sequence[str] | None = None) -> Course:
        job = self.job
        there = tuple(sorted(program.sites if sites is None else sites))
        return Course(job.name, there, job.strategy, tuple(job.filters), terms_of_job(job), job.secret_sums)

    def check(self) -> None:
        """Raise what keeps the job from running, if anything does."""
        job = self.job
        sites = tuple(sorted(self.program.sites))
        check(job, self.program.traits, Course(job.name, sites, job.strategy, tuple(job.filters)))


@contextlib.contextmanager
def opened(job: Job, run: Run | None = None) -> Iterator[Subject]:
    """Give the subject of a job, or of a finished run of it, and free its program at the end.

    Raises:
        HansaError: the job can't run here, or the run has no final model.
    """
    with contextlib.ExitStack() as left:
        subject = _loaded(job, run, None, left)
        subject.check()
        yield subject


def _loaded(job: Job, run: Run | None, params: Tree | None, left: contextlib.ExitStack) -> Subject:
    program: Program = registry.load("recipes", job.recipe.name)(job)
    left.callback(program.close)
    reports = tuple(program.inspect(site) for site in sorted(program.sites))
    error = refusal(job, len(reports), {})
    if error is not None:
        raise error
    job = settled(job, len(program.sites))
    if params is None:
        params = program.initial() if run is None else _final(run)
    return Subject(job, program, params, reports, run, left)


def _final(run: Run) -> Tree:
    """Return the model that a finished run chose."""
    chosen = run.report["model"]
    if chosen is None:
        raise JobError(f"Run {run.id} is not finished, so it has no model to audit. `hansa run --resume {run.id}`.")
    evaluation = run.job.evaluation
    folder = Checkpoints(run.directory / "checkpoints", run.job.output.keep, evaluation.metric, evaluation.mode)
    found = folder.load(chosen["round"])
    if found is None:
        raise JobError(f"Run {run.id} has no checkpoint of round {chosen['round']} any more. Audit its job.json.")
    return found.model.native()


class _Watch:
    """Rounds of a job, watched."""

    def __init__(
        self,
        job: Job,
        program: Program,
        params: Tree,
        seen: Callable[[Update], None] | None,
        released: Callable[[int, Aggregate], None] | None,
        recorded: Callable[[RoundRecord], None] | None,
        progress: Progress,
    ) -> None:
        self._job, self._program, self._params = job, program, params
        self._seen, self._released, self._recorded, self._progress = seen, released, recorded, progress

    async def rounds(self, folder: Path, course: Course) -> Tree:
        plain, _ = replace(course, terms=None).pieces()
        course = replace(course, strategy=self._watched(plain))
        strategy, _ = course.pieces(Secret.fresh() if course.terms else None)
        async with Local(self._job, folder, self._program) as engine:
            cohort: Cohort = engine.cohort(course)
            if self._seen is not None:
                cohort = Watched(cohort, _Shown(self._seen))
            start = Snapshot(0, *settle.start(strategy, self._params, folder))
            model = start.model
            rounds = workflow_of(self._job).rounds(self._job, strategy, cohort, engine.peers, start, folder)
            async with contextlib.aclosing(rounds) as records:
                async for record in records:
                    model = record.model
                    if self._recorded is not None:
                        self._recorded(record)
                    self._progress.advance()
            return {name: np.array(leaf) for name, leaf in model.native().items()}

    def _watched(self, strategy: Strategy) -> Strategy:
        """Return the strategy with its step shown; a privacy plan goes around it, so noise is in what it is given."""
        released = self._released
        if released is None:
            return strategy

        def step(model: Model, state: Parts, aggregate: Aggregate) -> tuple[Model, Parts, Notes]:
            released(model.version + 1, aggregate)
            return strategy.step(model, state, aggregate)

        return replace(strategy, step=step)


class _Shown(Silent):
    """Shows each update of training, as it comes."""

    def __init__(self, seen: Callable[[Update], None]) -> None:
        self._seen = seen

    def reply(self, plan: Plan, reply: Reply) -> None:
        if isinstance(reply, Update) and plan.task == "train":
            self._seen(reply)
