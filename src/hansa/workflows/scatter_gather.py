# SPDX-License-Identifier: Apache-2.0
"""Scatter-gather: plan → train at the sites → fold → step, with an explicit policy of participation."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hansa.core import rng, settle
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.fold import Fold
from hansa.core.ports import Cohort, Handle
from hansa.core.stack import Stack
from hansa.core.strategy import Strategy
from hansa.core.tree import Layout, Tree
from hansa.core.values import Absence, Aggregate, Header, Logged, Plan, RoundRecord, Snapshot
from hansa.core.workflow import Workflow, aside
from hansa.errors import NonFiniteError, QuorumError, WireError
from hansa.privacy.plan import terms_of_job
from hansa.workflows import sums
from hansa.workflows.evaluate import TRAINING, Masks, Scores, evaluate
from hansa.workflows.secure import Question


def workflow() -> Workflow:
    """Return scatter-gather as a value; it needs no peers."""
    return Workflow(
        "scatter-gather",
        frozenset(),
        lambda job, strategy, cohort, peers, start, scratch: scatter_gather(job, strategy, cohort, start, scratch),
    )


async def scatter_gather(
    job: Job,
    strategy: Strategy,
    cohort: Cohort,
    start: Snapshot,
    scratch: Path | None = None,
    *,
    judges: Sequence[str] | None = None,
) -> AsyncGenerator[RoundRecord, None]:
    """Run rounds ``start.round + 1`` to ``job.rounds`` and yield a record of each.

    The next round begins only when the consumer asks for the next record, so a sink that writes a checkpoint
    has written it by then.

    Args:
        job: how many rounds, who is asked, and when the model is evaluated.
        strategy: the algorithm.
        cohort: the sites.
        start: where to go on from.
        scratch: a folder for updates that come early and for large accumulators.
        judges: the sites whose held-out data the model is judged on; all of the cohort by default.

    Raises:
        QuorumError: fewer sites answered than the policy asks for; it names each and its reason.
    """
    now, first = start, start.round + 1
    del start  # its model is let go of after the first round
    for number in range(first, job.rounds + 1):
        begun = time.perf_counter()
        if strategy.select is not None:
            asked = strategy.select(cohort.sites, number)
        else:
            asked = sample(cohort.sites, job.cohort.sample, job.seed, number)
        plan = _plan(job, strategy, now, number, asked)
        size = trees.num_bytes(plan.params)
        if job.secret_sums is None:
            gathered = await _gather(job, strategy, cohort, plan, asked, strategy.bound(now.state), scratch)
        else:
            gathered = await _gather_secretly(job, strategy, cohort, plan, asked, scratch)
        _require(job, strategy, gathered, asked, number)
        settled, notes = await aside(size, settle.step, strategy, now.model, now.state, gathered.aggregate, scratch)
        notes = {**notes, **gathered.aggregate.notes}
        if gathered.fold is not None:
            gathered.fold.discard()
        gathered.aggregate = replace(gathered.aggregate, sums={})
        acknowledged = {} if notes.get("forget") else {**now.acknowledged, **gathered.acknowledge}
        now = Snapshot(number, settled.model, settled.state, acknowledged)
        last = number == job.rounds
        scores = None
        if last or (job.evaluation.every and number % job.evaluation.every == 0):
            masks = Masks(job.secret_sums, scratch) if job.secret_sums and scratch else None
            scores = await evaluate(
                cohort, now.model, job=job.name, round=number, seed=job.seed, sites=judges, masks=masks
            )
        record = await _record(job, cohort, now, plan, asked, gathered, scores, notes, time.perf_counter() - begun)
        try:
            yield replace(record, files=settled.files)
        finally:
            settled.forget()


def sample(sites: Sequence[str], amount: int | float, seed: int, round: int) -> tuple[str, ...]:
    """Return the cohort of a round: a fraction of all sites, or a number of them, drawn without replacement."""
    count = wanted(amount, len(sites))
    if count >= len(sites):
        return tuple(sorted(sites))
    chosen = rng.generator(seed, "cohort", round).choice(len(sites), count, replace=False)
    return tuple(sorted(sites[i] for i in chosen))


def wanted(amount: int | float, total: int) -> int:
    """Return how many of ``total`` an amount means: a whole number is that many, a fraction is that share.

    >>> wanted(0.5, 5), wanted(3, 5), wanted(1.0, 5), wanted(1, 5)
    (3, 3, 5, 1)
    """
    return amount if isinstance(amount, int) else max(1, math.ceil(amount * total))


@dataclass
class _Gathered:
    fold: Fold | None
    aggregate: Aggregate
    accepted: list[str] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)
    acknowledge: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    logged: dict[str, Logged] = field(default_factory=dict)
    bytes_up: int = 0


def _plan(job: Job, strategy: Strategy, now: Snapshot, number: int, asked: Sequence[str]) -> Plan:
    return Plan(
        job=job.name,
        round=number,
        task="train",
        version=now.model.version,
        params=now.model.native(),
        parts=strategy.sent(now.state),
        seed=job.seed,
        deadline_s=job.cohort.deadline_s,
        acknowledged={site: now.acknowledged[site] for site in asked if site in now.acknowledged},
    )


def expected(strategy: Strategy, params: Tree) -> dict[str, Layout]:
    """Return the layout of each part that an update of ``params`` (native dtypes) has."""
    layout = trees.layout_of(trees.floating(params))
    return {**dict.fromkeys(strategy.weighed, layout), **strategy.extra}


async def _gather(
    job: Job,
    strategy: Strategy,
    cohort: Cohort,
    plan: Plan,
    asked: Sequence[str],
    bound: float | None,
    scratch: Path | None,
) -> _Gathered:
    overdue = {handle.header.site: handle for handle in cohort.late(plan.round)}
    welcome = {site: handle for site, handle in overdue.items() if job.cohort.late == "accept" and site not in asked}
    order = sorted({*asked, *welcome})
    size = trees.num_bytes(plan.params)
    layouts, population = expected(strategy, plan.params), len(cohort.sites)
    fold = (
        Fold(order, layouts, strategy.weighed, population, scratch, max_norm=bound, beside=strategy.extra)
        if strategy.combine is None
        else Stack(strategy.combine, order, layouts, population, scratch, max_norm=bound)
    )
    gathered = _Gathered(fold, Aggregate({}, strategy.weighed, 0.0, 0.0, population))
    for site, handle in sorted(overdue.items()):
        if site in welcome:
            await aside(size, _accept, gathered, strategy, plan, handle)
        else:
            handle.release()
    async for reply in cohort.ask(plan, asked):
        if isinstance(reply, Absence):
            gathered.absent.append(reply)
            fold.skip(reply.site)
        else:
            await aside(size, _accept, gathered, strategy, plan, reply)
        del reply  # or it would be held while the next site trains
    gathered.aggregate = await aside(size, fold.close)
    gathered.accepted.sort()
    return gathered


async def _gather_secretly(
    job: Job, strategy: Strategy, cohort: Cohort, plan: Plan, asked: Sequence[str], scratch: Path | None
) -> _Gathered:
    """Gather sums only; where nobody is asked, as after every site's last turn, there is nothing to gather."""
    assert job.secret_sums is not None, "the job keeps its updates from the server"
    assert scratch is not None, "a secret sum lies on the disk"
    gathered = _Gathered(None, Aggregate({}, strategy.weighed, 0.0, 0.0, len(cohort.sites)))
    for handle in cohort.late(plan.round):  # its masks or its key belong to a round whose sum is made
        handle.release()
    if not asked:
        return gathered
    question = Question(
        job.secret_sums,
        plan,
        asked,
        scratch,
        terms_of_job(job),
        expected(strategy, plan.params),
        strategy.weighed,
        lambda header: _problem(strategy, plan, header),
    )
    found = await sums.gather(question, cohort)
    gathered.accepted, gathered.absent = list(found.sites), found.absent
    gathered.acknowledge = dict.fromkeys(found.sites, plan.round)
    gathered.seconds, gathered.bytes_up = found.seconds, found.num_bytes
    gathered.sums, gathered.logged = found.seen, found.logged
    gathered.aggregate = replace(
        gathered.aggregate,
        sums=found.parts,
        weight=found.weight,
        count=float(len(found.sites)),
        metrics={} if job.privacy else found.metrics,
    )
    return gathered


def _accept(gathered: _Gathered, strategy: Strategy, plan: Plan, handle: Handle) -> None:
    assert gathered.fold is not None, "updates are seen one by one"
    header = handle.header
    problem = _problem(strategy, plan, header)
    if problem is not None:
        return _reject(gathered, handle, problem)
    age = plan.version - header.version
    try:
        gathered.fold.add(handle, 1.0 if age == 0 else (1.0 + age) ** -0.5)
    except (WireError, NonFiniteError) as error:
        return _reject(gathered, handle, error.message)
    gathered.accepted.append(header.site)
    gathered.acknowledge[header.site] = header.round
    gathered.sums[header.site] = header.sums
    gathered.seconds[header.site] = header.seconds
    if header.logged:
        gathered.logged[header.site] = header.logged
    gathered.bytes_up += header.num_bytes
    return None


def _problem(strategy: Strategy, plan: Plan, header: Header) -> str | None:
    """Return why an update is not to be summed, as far as its header tells."""
    if header.completed < 1 and Trait.WHOLE_WORK in strategy.traits:
        return (
            f"did {header.completed:.0%} of its work, and {strategy.name} needs all of it "
            "(fedprox and scaffold accept partial work)"
        )
    if header.version > plan.version:
        return f"claims to start from model version {header.version}, the newest is {plan.version}"
    return None


def _reject(gathered: _Gathered, handle: Handle, reason: str) -> None:
    assert gathered.fold is not None, "updates are seen one by one"
    gathered.absent.append(Absence(handle.header.site, "rejected", reason))
    gathered.fold.skip(handle.header.site)
    handle.release()


def _require(job: Job, strategy: Strategy, gathered: _Gathered, asked: Sequence[str], number: int) -> None:
    needed = wanted(job.cohort.quorum, len(asked)) if asked else 0
    instead = "lower cohort.quorum"
    if strategy.combine is not None and strategy.combine.least > needed:
        needed, instead = strategy.combine.least, f"ask more sites: {strategy.combine.name!r} needs so many updates"
    if len(gathered.accepted) < needed:
        if gathered.fold is not None:
            gathered.fold.discard()
        reasons = "\n".join(f"  {a.site}: {a.kind}: {a.reason}" for a in gathered.absent)
        raise QuorumError(
            f"{len(gathered.accepted)} of {len(asked)} sites answered, the quorum is {needed}.\n{reasons}\n"
            f"Mend the cause and resume, or {instead}.",
            job=job.name,
            round=number,
        )


async def _record(
    job: Job,
    cohort: Cohort,
    now: Snapshot,
    plan: Plan,
    asked: Sequence[str],
    gathered: _Gathered,
    scores: Scores | None,
    notes: Mapping[str, Any],
    seconds: float,
) -> RoundRecord:
    trained = await _summary(cohort, gathered.aggregate.metrics)
    metrics = {TRAINING + name: value for name, value in trained.items()}
    by_site = {
        site: {TRAINING + name: value for name, value in (await _summary(cohort, sums)).items()}
        | {TRAINING + "seconds": gathered.seconds[site]}
        for site, sums in sorted(gathered.sums.items())
    }
    if scores:
        metrics |= scores.overall
        for site, values in scores.by_site.items():
            by_site[site] = {**by_site.get(site, {}), **values}
    sent = trees.num_bytes(plan.params) + sum(trees.num_bytes(tree) for tree in plan.parts.values())
    return RoundRecord(
        job=job.name,
        round=now.round,
        asked=tuple(asked),
        accepted=tuple(gathered.accepted),
        absent=tuple(gathered.absent),
        metrics=metrics,
        site_metrics=by_site,
        notes={name: value for name, value in notes.items() if name != "forget"},
        bytes_down=sent * len(asked),
        bytes_up=gathered.bytes_up,
        seconds=seconds,
        model=now.model,
        state=now.state,
        acknowledged=now.acknowledged,
        logged=dict(sorted(gathered.logged.items())),
    )


async def _summary(cohort: Cohort, sums: Mapping[str, float]) -> Mapping[str, float]:
    """Return the metrics of ``sums``; sites that keep theirs to themselves, and nobody, have none."""
    return await cohort.summarise(sums) if sums else {}
