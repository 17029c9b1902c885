# SPDX-License-Identifier: Apache-2.0
"""Judge a model on the sites' held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hansa.core.config import HomomorphicEncryptionSection, SecureAggregationSection
from hansa.core.ports import Cohort
from hansa.core.values import TRAINING as TRAINING
from hansa.core.values import Absence, Model, Plan
from hansa.errors import QuorumError
from hansa.workflows import sums as secret
from hansa.workflows.secure import Question


@dataclass(frozen=True)
class Scores:
    """Metrics of one model: over everyone's data, and site by site, with the sums behind them."""

    overall: Mapping[str, float]
    by_site: Mapping[str, Mapping[str, float]]
    absent: Sequence[Absence] = field(default_factory=tuple)


@dataclass(frozen=True)
class Masks:
    """The job's words on secret sums, and a folder that outlives a crash."""

    section: SecureAggregationSection | HomomorphicEncryptionSection
    scratch: Path


async def evaluate(
    cohort: Cohort,
    model: Model,
    *,
    job: str,
    round: int,
    seed: int,
    sites: Sequence[str] | None = None,
    masks: Masks | None = None,
) -> Scores:
    """Ask ``sites`` (all by default) to evaluate ``model``, and add their sums up.

    Of secret sums there are no scores of single sites where anybody is to be kept from them, and none at all of sums
    that the job does not name.

    Raises:
        QuorumError: no site could evaluate it.
    """
    plan = Plan(job, round, "evaluate", model.version, model.native(), seed=seed)
    if masks is not None:
        if not masks.section.metrics:
            return Scores({}, {})
        found = await secret.gather(Question(masks.section, plan, sites or cohort.sites, masks.scratch), cohort)
        seen = {site: await cohort.summarise(found.seen[site]) for site in sorted(found.seen)}
        overall = await cohort.summarise(found.metrics) if found.metrics else {}
        return Scores(overall, seen, tuple(found.absent))
    sums: dict[str, Mapping[str, float]] = {}
    absent = []
    async for reply in cohort.ask(plan, sites or cohort.sites):
        if isinstance(reply, Absence):
            absent.append(reply)
        else:
            sums[reply.header.site] = reply.header.sums
            reply.release()
    if not sums:
        reasons = "; ".join(f"{a.site}: {a.reason}" for a in absent)
        raise QuorumError(f"No site could evaluate the model ({reasons}).", job=job, round=round)
    by_site = {site: await cohort.summarise(sums[site]) for site in sorted(sums)}
    return Scores(await cohort.summarise(add(sums)), by_site, tuple(absent))


def scores_of(metrics: Mapping[str, float], site_metrics: Mapping[str, Mapping[str, float]]) -> Scores:
    """Return the scores in a round's metrics, those of local training left out."""

    def judged(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if not name.startswith(TRAINING)}

    by_site = {site: judged(values) for site, values in site_metrics.items()}
    return Scores(judged(metrics), {site: values for site, values in by_site.items() if values})


def add(sums: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Add the sums of several sites up, in the order of their names."""
    total: dict[str, float] = {}
    for site in sorted(sums):
        for name, value in sums[site].items():
            total[name] = total.get(name, 0.0) + value
    return total
