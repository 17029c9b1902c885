# SPDX-License-Identifier: Apache-2.0
"""Cyclic weight transfer: Chang et al. 2018, "Distributed deep learning networks among institutions for medical
imaging", JAMIA 25(8). The model goes from site to site through their mailboxes; the server only says whose turn
it is, and receives the model at the end of each round.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hansa.core import settle
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import SERVER, Cohort, Peers, topic
from hansa.core.strategy import Strategy
from hansa.core.values import Absence, Logged, Plan, RoundRecord, Snapshot
from hansa.core.workflow import Workflow
from hansa.errors import NonFiniteError, QuorumError
from hansa.workflows.evaluate import TRAINING, add, evaluate
from hansa.workflows.scatter_gather import sample, wanted


def workflow() -> Workflow:
    """Return cyclic weight transfer as a value."""
    return Workflow("cyclic", frozenset({Trait.RELAYS}), cyclic)


async def cyclic(
    job: Job,
    strategy: Strategy,
    cohort: Cohort,
    peers: Peers,
    start: Snapshot,
    scratch: Path | None = None,
) -> AsyncGenerator[RoundRecord, None]:
    """Run rounds in which each site trains on from where the one before it stopped.

    A site that fails is left out, and the next one takes its turn from the last message.

    Raises:
        QuorumError: fewer sites took their turn than the policy asks for.
    """
    now = start
    for number in range(start.round + 1, job.rounds + 1):
        begun = time.perf_counter()
        asked = sample(cohort.sites, job.cohort.sample, job.seed, number)
        plan = Plan(job.name, number, "train", now.model.version, {}, seed=job.seed)
        turn = await _turns(cohort, peers, plan, asked, now)
        needed = wanted(job.cohort.quorum, len(asked))
        if len(turn.accepted) < needed:
            reasons = "; ".join(f"{a.site}: {a.reason}" for a in turn.absent)
            raise QuorumError(
                f"{len(turn.accepted)} of {len(asked)} sites took their turn, the quorum is {needed} ({reasons}).",
                job=job.name,
                round=number,
            )
        params = (await peers.receive(SERVER, turn.inbox))["params"]
        broken = trees.first_non_finite(params)
        if broken:
            raise NonFiniteError(f"Tensor {broken!r} is NaN or infinite.", job=job.name, round=number)
        moved = now.model.advance(trees.widen(trees.floating(trees.lazily(params))))
        settled = settle.settle(moved, now.state, scratch)
        now = replace(now, round=number, model=settled.model)
        metrics = {TRAINING + k: v for k, v in (await cohort.summarise(add(turn.sums))).items()}
        by_site: dict[str, dict[str, float]] = {
            site: {TRAINING + k: v for k, v in (await cohort.summarise(sums)).items()}
            for site, sums in turn.sums.items()
        }
        if number == job.rounds or (job.evaluation.every and number % job.evaluation.every == 0):
            scores = await evaluate(cohort, now.model, job=job.name, round=number, seed=job.seed)
            metrics |= scores.overall
            for site, values in scores.by_site.items():
                by_site[site] = {**by_site.get(site, {}), **values}
        hops = len(turn.accepted) * trees.num_bytes(params)
        record = RoundRecord(
            job.name,
            number,
            tuple(asked),
            tuple(turn.accepted),
            tuple(turn.absent),
            metrics,
            by_site,
            {},
            hops,
            hops,
            time.perf_counter() - begun,
            now.model,
            now.state,
            {},
            settled.files,
            turn.logged,
        )
        try:
            yield record
        finally:
            settled.forget()


@dataclass
class _Turns:
    inbox: str
    accepted: list[str] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)
    sums: dict[str, Mapping[str, float]] = field(default_factory=dict)
    logged: dict[str, Logged] = field(default_factory=dict)


async def _turns(cohort: Cohort, peers: Peers, plan: Plan, asked: Sequence[str], now: Snapshot) -> _Turns:
    """Let each site train in turn; the last message ends in the server's mailbox."""
    turns = _Turns(topic(plan.job, SERVER))
    route = [*asked, SERVER]
    await peers.send(SERVER, route[0], turns.inbox, {"params": now.model.native()})
    for site, following in zip(asked, route[1:], strict=True):
        async for reply in cohort.ask(replace(plan, inbox=turns.inbox, outbox=following), [site]):
            if isinstance(reply, Absence):
                turns.absent.append(reply)
                await peers.send(site, following, turns.inbox, await peers.receive(site, turns.inbox))
            else:
                turns.accepted.append(site)
                turns.sums[site] = reply.header.sums
                if reply.header.logged:
                    turns.logged[site] = reply.header.logged
                turns.inbox = topic(plan.job, site)
                reply.release()
    return turns
