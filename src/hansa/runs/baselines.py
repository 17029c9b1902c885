# SPDX-License-Identifier: Apache-2.0
"""What a federated model is compared with: the model before training, each site alone, all data in one place.

All train with the job's own settings and as many local steps: a site alone makes rounds × steps, as it does in the
federation; the central model makes as many as all sites together. Every model is judged on every site's held-out
data, which gives two columns: a site's own, and everyone's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hansa.core import settle
from hansa.core.config import (
    Choice,
    CohortSection,
    EvaluationSection,
    HomomorphicEncryptionSection,
    Job,
    SecureAggregationSection,
)
from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE
from hansa.core.tree import Tree
from hansa.core.values import Model, Snapshot
from hansa.errors import PolicyError, QuorumError, SiteError
from hansa.privacy.plan import terms_of_job
from hansa.runs.engine import Engine
from hansa.runs.progress import Progress
from hansa.workers.messages import CourseForm
from hansa.workers.runner import Course, form_of
from hansa.workflows.evaluate import Masks, Scores, evaluate, scores_of
from hansa.workflows.scatter_gather import scatter_gather

Save = Callable[[str, Scores], None]

PLAIN = Choice(name="fedavg")
"""The strategy of every baseline; it has no filters."""


def course_form(job: Job, name: str, kind: str, site: str) -> CourseForm:
    """Return the strategy and filters of the course ``name`` of a signed job: the job itself, or a baseline of it.

    Baselines have no filters, so what they may be used for is narrow: the base model is only judged, and a site's own
    model is trained at that site alone.

    Args:
        job: the signed job.
        name: the job's name, or a baseline's.
        kind: ``train`` or ``evaluate``.
        site: who is to do it.

    Raises:
        PolicyError: the job asks for no such baseline, or not for that of this site.
    """
    secure = None if job.secret_sums is None else job.secret_sums.model_dump(mode="json")
    if name == job.name:
        filters = [item.model_dump(mode="json") for item in job.filters]
        return CourseForm(name, job.strategy.model_dump(mode="json"), filters, form_of(terms_of_job(job)), secure)
    judged = (name == "base" and job.baselines.base) or (name.startswith("local.") and job.baselines.local)
    if judged and (kind == "evaluate" or name == f"local.{site}"):
        return CourseForm(name, PLAIN.model_dump(mode="json"), [], secure=secure)
    raise PolicyError(f"The job asks {site} for no baseline {name[:100]!r} to {kind}.", job=job.name)


@dataclass(frozen=True)
class Baselines:
    """Trains and judges a job's baselines, each once.

    Attributes:
        job: the job; its strategy, filters and cohort policy are left out of the baselines.
        engine: runs the sites.
        start: the parameters that the federation started from.
        scratch: a folder for what training spools.
        done: baselines that an earlier attempt finished, by name.
        save: called with each name and its scores as soon as they are known.
        secure: the words on secret sums, where scores leave sites masked or encrypted.
    """

    job: Job
    engine: Engine
    start: Tree
    scratch: Path
    done: Mapping[str, Scores]
    save: Save
    secure: SecureAggregationSection | HomomorphicEncryptionSection | None

    async def run(self, progress: Progress) -> dict[str, str]:
        """Train and judge whatever the job asks for and is not done yet; return why some could not be, by name.

        A site that can't train alone (its loss becomes NaN, say) is no reason to lose the federated model.
        """
        wanted = self.job.baselines
        todo: list[tuple[str, Callable[[], Awaitable[Scores]]]] = []
        if wanted.base:
            todo.append(("base", lambda: self._judge("base", Model.start(self.start))))
        if wanted.central:
            rounds = self.job.rounds * len(self.engine.sites)
            todo.append(("central", lambda: self._train("central", EVERYONE, rounds, progress)))
        if wanted.local:
            for site in self.engine.sites:
                name = f"local.{site}"
                todo.append((name, lambda n=name, s=site: self._train(n, s, self.job.rounds, progress)))  # type: ignore[misc]
        open_ones = [(name, work) for name, work in todo if name not in self.done]
        progress.stage("baselines", sum(self._length(name) for name, _ in open_ones))
        failed: dict[str, str] = {}
        tasks = [asyncio.create_task(self._finish(name, work, failed, progress)) for name, work in open_ones]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # none goes on beside whoever tries again
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return dict(sorted(failed.items()))

    def _length(self, name: str) -> int:
        if name == "base":
            return 0
        return self.job.rounds * (len(self.engine.sites) if name == "central" else 1)

    async def _finish(
        self, name: str, work: Callable[[], Awaitable[Scores]], failed: dict[str, str], progress: Progress
    ) -> None:
        try:
            self.save(name, await work())
        except (QuorumError, SiteError) as error:
            failed[name] = error.message
            progress.say(f"The baseline {name} could not be made: {error.message}")

    async def _judge(self, name: str, model: Model) -> Scores:
        cohort = self.engine.cohort(Course(name, tuple(self.engine.sites), PLAIN, secure=self.secure))
        masks = Masks(self.job.secret_sums, self.scratch) if self.job.secret_sums else None
        return await evaluate(cohort, model, job=name, round=0, seed=self.job.seed, masks=masks)

    async def _train(self, name: str, site: str, rounds: int, progress: Progress) -> Scores:
        job = self.job.model_copy(
            update={
                "name": name,
                "rounds": rounds,
                "cohort": CohortSection(),
                "evaluation": EvaluationSection(every=0),
            }
        )
        course = Course(name, (site,), PLAIN)
        strategy, _ = course.pieces()
        strategy = replace(strategy, traits=strategy.traits - {Trait.WHOLE_WORK})  # of one, any part is the mean
        scratch = self.scratch / name
        scratch.mkdir(parents=True, exist_ok=True)
        start = Snapshot(0, *settle.start(strategy, self.start, scratch))
        cohort = self.engine.cohort(course)
        async for record in scatter_gather(job, strategy, cohort, start, scratch, judges=self.engine.sites):
            progress.advance(f"{name}: round {record.round} of {rounds}")
            last = record
        return scores_of(last.metrics, last.site_metrics)
