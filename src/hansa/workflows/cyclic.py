# SPDX-License-Identifier: Apache-2.0
"""Cyclic weight transfer: Chang et al. 2018, "Distributed deep learning networks among institutions for medical
imaging", JAMIA 25(8). The model goes from site to site through their mailboxes; the server only says whose turn
it is, and receives the model at the end of each round.

| case | result |
|---|---|
| a site can't be reached, refuses, or fails in its turn | left out; the next one goes on from the last message |
| a site is lost before it has handed its message on | its turn is undone, and named; the message before it is used |
| nobody's message is left, or fewer than the quorum's | QuorumError, before the server is sent any model |
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
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
        await peers.put(plan, {"params": now.model.native()})
        turn = _Turns(cohort, peers, plan)
        for site in asked:
            await turn.give(site)
        while True:
            needed = wanted(job.cohort.quorum, len(asked))
            if len(turn.accepted) < needed:
                reasons = "; ".join(f"{a.site}: {a.reason}" for a in turn.absent)
                raise QuorumError(
                    f"{len(turn.accepted)} of {len(asked)} sites took their turn, the quorum is {needed} ({reasons}).",
                    job=job.name,
                    round=number,
                )
            if await turn.send(SERVER) is None:
                break
        params = (await peers.take(plan, turn.accepted[-1]))["params"]
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
    """The turns of one round: whose is over, in order, and what they gave beside the model."""

    cohort: Cohort
    peers: Peers
    plan: Plan
    accepted: list[str] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)
    sums: dict[str, Mapping[str, float]] = field(default_factory=dict)
    logged: dict[str, Logged] = field(default_factory=dict)

    async def give(self, site: str) -> None:
        """Let ``site`` train on from the last message; whatever fails, somebody is absent then."""
        while (failed := await self.send(site)) is not None:
            if failed.site == site:
                return
        inbox = topic(self.plan.job, self._last)
        plan = replace(self.plan, inbox=inbox, outbox=topic(self.plan.job, site))
        async for reply in self.cohort.ask(plan, [site]):
            if isinstance(reply, Absence):
                self.absent.append(reply)
            else:
                self.accepted.append(site)
                self.sums[site] = reply.header.sums
                if reply.header.logged:
                    self.logged[site] = reply.header.logged
                reply.release()

    async def send(self, recipient: str) -> Absence | None:
        """Have the last message brought to ``recipient``; whoever it fails for is absent, his turn undone."""
        failed = await self.peers.send(self.plan, self._last, recipient)
        if failed is not None:
            self.absent.append(failed)
            if failed.site == self._last:
                self.accepted.pop()
                self.sums.pop(failed.site)
                self.logged.pop(failed.site, None)
        return failed

    @property
    def _last(self) -> str:
        return self.accepted[-1] if self.accepted else SERVER
