# SPDX-License-Identifier: Apache-2.0
"""Membership inference: whether the model tells that an example was trained on. LiRA, online.

Carlini et al. 2022, "Membership inference attacks from first principles", arXiv:2112.03570, Algorithm 1. Shadow models
are trained by the job's own training, each without those of the site's examples that a fair coin leaves out. For every
example, with φ = log(p / (1 − p)) of the probability p = e^−loss that a model gives its label:

    Λ = log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²)

Each model is the target once, with means from the others; deviations are of all examples together, as §VI-C of the
paper has it for few shadows. Models start where the job starts. They saw nobody else's data, which is what is left to
those who know every other site's updates, whom a promise holds against too. Where only a sum is made (masks, robust
rules, a number of sites), all sites take part as they would.

    TPR ≤ e^ε FPR + δ at every FPR, for whoever gets the model, if it is (ε, δ)-DP

A violation is held against chance by :func:`hansa.audit.estimate.lower_bound` on half of the models, scored by the
other half: coins of different models are independent, so they are canaries of one mechanism.

| case | result |
|---|---|
| functional training without protection | shadows are one computation, rounds on end: momentum is not begun afresh |
| more than ``MOST`` examples at the site | so many are tossed for; the others are in every model |
| batches | as much smaller as the models' data are, so that rates and passes are the job's |
| dp-sgd | noise of the whole job's plan; the bound is of the model with the fewest examples, whose ε is the largest |
| a site with fewer than ``FEWEST`` examples | skipped |
| an example that all other models have, or lack | its mean is that of all examples |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hansa.audit import estimate, uploads
from hansa.audit.estimate import Coins
from hansa.audit.finding import Finding, Measure, Picture, Skipped, Verdict
from hansa.audit.subject import Subject, Transparent
from hansa.client.functional import Examples, FunctionalProgram
from hansa.core import tree as trees
from hansa.core.config import EvaluationSection
from hansa.core.fit import Trait
from hansa.core.tree import Tree
from hansa.core.values import Plan, Update
from hansa.errors import SiteError
from hansa.privacy.plan import plan_of
from hansa.runs.progress import Progress
from hansa.simulation.batched import chunks, perform_many
from hansa.strategies.fedavg import fedavg

NAME = "membership inference"

SHADOWS, FEW_SHADOWS = 48, 16
"""Models of a program whose shadows are one computation, or a small one; and of others."""
SMALL = 1 << 20
"""Bytes of a small model."""
MOST, FEWEST = 400, 16
LOW = 0.01
"""The false-positive rate at which the true-positive rate is told."""
RESAMPLED = 400

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Shadows:
    """Models and what they say of the site's examples.

    Attributes:
        site: whose examples.
        inside: (models, examples), which were trained on.
        confidence: (models, examples), φ.
        epsilon: what is promised of each model; None for nothing.
        delta: the promise's δ.
    """

    site: str
    inside: Coins
    confidence: Values
    epsilon: float | None
    delta: float

    def scores(self, targets: slice = slice(None), shadows: slice | None = None) -> Values:
        """Return Λ of every example for the models ``targets``, by means from ``shadows``; by default all others."""
        kept = slice(None) if shadows is None else shadows
        inside, phi = self.inside[kept], self.confidence[kept]
        own = (self.inside[targets], self.confidence[targets]) if shadows is None else None
        means, spread = {}, {}
        for kind in (True, False):
            chosen = inside == kind
            total, count = (phi * chosen).sum(0)[None], chosen.sum(0)[None].astype(np.float64)
            everybody = float(phi[chosen].mean()) if chosen.any() else 0.0
            centred = phi - np.where(count > 0, total / np.maximum(count, 1), everybody)
            # A mean of few models follows them: n / (n - 1) makes up for it.
            freedom = max(1.0, float(chosen.sum() - (count > 0).sum()))
            spread[kind] = math.sqrt(max(float((centred[chosen] ** 2).sum()) / freedom, 1e-12))
            if own is not None:
                mine = own[0] == kind
                total, count = total - own[1] * mine, count - mine
            means[kind] = np.where(count > 0, total / np.maximum(count, 1), everybody)
        seen = self.confidence[targets]
        odds = {kind: -0.5 * ((seen - means[kind]) / spread[kind]) ** 2 - math.log(spread[kind]) for kind in means}
        return np.asarray(odds[True] - odds[False])


def attack(subject: Subject, generator: np.random.Generator, progress: Progress) -> Finding | Skipped:
    """Train shadows of the site with the fewest examples, whose members stand out the most, and attack each."""
    program = uploads.transparent(subject)
    if program is None:
        return Skipped(NAME, "A script's training examples can't be told apart.")
    site = min(subject.sites, key=lambda site: (program.count(site) < FEWEST, program.count(site)))
    if program.count(site) < FEWEST:
        return Skipped(NAME, f"No site has {FEWEST} examples to train on, and fewer tell nothing.")
    begun = time.perf_counter()
    small = trees.num_bytes(subject.params) <= SMALL
    found = shadows(subject, site, SHADOWS if small else FEW_SHADOWS, generator, progress)
    return replace(judged(subject, found, generator), seconds=time.perf_counter() - begun)


# --- shadows


def shadows(
    subject: Subject, site: str, count: int, generator: np.random.Generator, progress: Progress, most: int = MOST
) -> Shadows:
    """Train ``count`` models, each on a site's examples as coins choose them, and ask each about all tossed for.

    Raises:
        HansaError: as a run of the job would.
    """
    program = uploads.transparent(subject)
    assert program is not None, "attacks look first"
    number = program.count(site)
    tossed = np.sort(generator.permutation(number)[:most])
    inside = generator.random((count, len(tossed))) < 0.5
    inside[~inside.any(1), 0] = True  # a model of nothing can't be trained
    every = np.ones((count, number), np.bool_)
    every[:, tossed] = inside
    chosen = [np.flatnonzero(row) for row in every]
    shadowed = _shadowed(subject, site, number, number - len(tossed) // 2)
    progress.stage(f"{NAME}: {count} models", count)
    models = _at_once(shadowed, site, chosen) if _is_one_computation(shadowed) else None
    confidence = np.zeros(inside.shape)
    for place, rows in enumerate(chosen):
        params = models[place] if models is not None else _trained(shadowed, site, rows)
        confidence[place] = _confidence(program, params, site, tossed)
        progress.advance()
    epsilon = subject.promised("the public")
    section = shadowed.job.privacy
    if section is not None and section.mechanism == "dp-sgd":
        plan = plan_of(shadowed.job, 1, min(map(len, chosen)))
        assert plan is not None, "it has a section"
        epsilon = max(claim.epsilon for claim in plan.claims if claim.epsilon is not None)
    return Shadows(site, inside, confidence, epsilon, section.delta if section is not None else 0.0)


def _shadowed(subject: Subject, site: str, number: int, expected: int) -> Subject:
    """Return the job for shadows: smaller batches of fewer examples, the same noise, nothing evaluated."""
    job, section = subject.job, subject.job.privacy
    size = max(1, round(job.train.batch_size * expected / number))
    if section is not None and section.mechanism == "dp-sgd" and subject.plan is not None:
        pinned = {"noise_multiplier": subject.plan.terms.noise_multiplier, "epsilon": None}
        section = section.model_copy(update=pinned)
    update = {
        "train": job.train.model_copy(update={"batch_size": size}),
        "privacy": section,
        "evaluation": EvaluationSection(every=0),
    }
    return subject.of(job.model_copy(update=update))


def is_alone(subject: Subject) -> bool:
    """Say whether the site's shadows are trained without the other sites."""
    job = subject.job
    counted = any(isinstance(amount, int) and amount > 1 for amount in (job.cohort.sample, job.cohort.quorum))
    return not (job.secret_sums or job.strategy.robust or counted)


def _trained(subject: Subject, site: str, rows: NDArray[np.int64]) -> Tree:
    program: Any = subject.program
    sites = [site] if is_alone(subject) else None
    took_part = False

    def seen(update: Update) -> None:
        nonlocal took_part
        took_part = took_part or update.site == site

    params = subject.carry_out(program=program.holding({site: rows}), sites=sites, params=program.initial(), seen=seen)
    if not took_part and not _may_be_left_out(subject):
        raise SiteError("A shadow's update did not come, so it could not be trained.", site=site)
    return params


def _may_be_left_out(subject: Subject) -> bool:
    """Say whether the job draws who takes part, so that a model without the site is one that it might give."""
    return subject.job.cohort.sample != 1.0 or subject.job.workflow.name != "scatter-gather"


def _is_one_computation(subject: Subject) -> bool:
    program = subject.program
    traits = subject.strategy.traits | program.traits
    apart = {Trait.STEPWISE, Trait.STEP_LEVEL, Trait.SERVER_STEP, Trait.EXTRA_PARTS, Trait.TIMED}
    return isinstance(program, FunctionalProgram) and not (
        uploads.is_protected(subject) or traits & apart or subject.strategy.rule.adjust or not is_alone(subject)
    )


def _at_once(subject: Subject, site: str, chosen: list[NDArray[np.int64]]) -> list[Tree]:
    """Train models as sites of engine ``batched`` that go on for all rounds on end."""
    program, job = subject.program, subject.job
    assert isinstance(program, FunctionalProgram), "it was looked at"
    section, data = job.train, program.examples(site).train
    length = (
        {"steps": section.steps * job.rounds} if section.steps else {"epochs": (section.epochs or 1.0) * job.rounds}
    )
    names = [f"shadow-{place:05d}" for place in range(len(chosen))]
    every = {name: Examples(tuple(a[rows] for a in data)) for name, rows in zip(names, chosen, strict=True)}
    many = replace(program, data=every, section=section.model_copy(update=length), _kept={})
    start = program.initial()
    plan = Plan(job.name, 1, "train", 0, start, seed=job.seed)
    found: list[Tree] = []
    for chunk in chunks(many, plan, names):
        for reply, _ in perform_many(many, fedavg(), [], plan, chunk, {}):
            if not isinstance(reply, Update):
                raise SiteError(f"A shadow could not be trained: {reply.reason}", site=site)
            moved = reply.parts["delta"]
            found.append({**start, **{name: start[name] + leaf for name, leaf in moved.items()}})
    return found


def _confidence(program: Transparent, params: Tree, site: str, rows: NDArray[np.int64]) -> Values:
    """Return φ of a model for each example; far from 0 and 1 where a loss is, to the precision of float64."""
    losses = np.clip(program.losses(params, site, rows).astype(np.float64), 1e-12, 700.0)
    return np.asarray(-losses - np.log(-np.expm1(-losses)))


# --- what they tell


def auc(scores: Values, inside: Coins) -> float:
    """Return the area under the ROC curve: how often a member scores above another example; ties count half.

    >>> auc(np.array([1.0, 2.0, 3.0, 3.0]), np.array([False, True, True, False]))
    0.625
    """
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places.reshape(-1)]
    members, others = int(inside.sum()), int((~inside).sum())
    if not members or not others:
        return 0.5
    return float((ranks[inside].sum() - members * (members + 1) / 2) / members / others)


def roc(scores: Values, inside: Coins) -> tuple[Values, Values]:
    """Return the false- and true-positive rates at every threshold, rising from 0 to 1."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    right, wrong = np.cumsum(inside[order])[ends], np.cumsum(~inside[order])[ends]
    return np.append(0.0, wrong / max(1, wrong[-1])), np.append(0.0, right / max(1, right[-1]))


def rate_at(scores: Values, inside: Coins, false: float = LOW) -> float:
    """Return the largest true-positive rate whose false-positive rate is at most ``false``."""
    wrong, right = roc(scores, inside)
    return float(right[wrong <= false].max())


def _interval(
    of: Callable[[Values, Coins], float], scores: Values, inside: Coins, generator: Any
) -> tuple[float, float]:
    """Return a 95 % interval by drawing models again: what one model says of its examples hangs together."""
    found = []
    for _ in range(RESAMPLED):
        drawn = generator.integers(0, len(scores), len(scores))
        found.append(of(scores[drawn].reshape(-1), inside[drawn].reshape(-1)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def judged(subject: Subject, found: Shadows, generator: np.random.Generator) -> Finding:
    """Return what the shadows come to."""
    scores, inside = found.scores(), found.inside
    flat = scores.reshape(-1), inside.reshape(-1)
    area = Measure("AUC", auc(*flat), 0.5, *_interval(auc, scores, inside, generator))
    rate = Measure(
        f"members found at {LOW:.0%} false alarms", rate_at(*flat), LOW, *_interval(rate_at, scores, inside, generator)
    )
    half = len(scores) // 2
    tested = found.scores(slice(half, None), slice(0, half)).reshape(-1)
    proved = estimate.lower_bound(tested, inside[half:].reshape(-1), found.delta)
    least = Measure("ε proved", proved.epsilon, 0.0, bound=found.epsilon)
    better = (area.low or 0.0) > 0.5 or (rate.low or 0.0) > LOW
    verdict: Verdict = "holds" if found.epsilon is not None or not better else "leaks"
    if least.is_broken:
        verdict = "fails"
    models, examples = inside.shape
    alone = "no other site's data in them" if is_alone(subject) else "the other sites as they are"
    return Finding(
        NAME,
        "the public",
        f"LiRA with {models} models of the whole job, each on about half of {examples} examples of {found.site}, "
        f"{alone}; {subject.protection}",
        (area, rate, least),
        verdict,
        _says(area, rate, least, verdict),
        (_picture(flat, found),),
    )


def _says(area: Measure, rate: Measure, least: Measure, verdict: Verdict) -> str:
    says = (
        f"Whoever has the model and guesses who was trained on is right {area.value:.0%} of the time between a member "
        f"and another (guessing: 50%), and finds {rate.value:.1%} of the members at {LOW:.0%} false alarms."
    )
    match verdict:
        case "fails":
            return says + f" That proves an ε of {least.value:.2f}, above what is promised: the promise is broken."
        case "leaks":
            return says + " Nothing is promised against it; a privacy plan bounds it."
    if least.bound is None:
        return says + " That is no better than guessing."
    return says + f" An ε of {least.bound:.3g} is promised, and nothing contradicts it."


def _picture(flat: tuple[Values, Coins], found: Shadows) -> Picture:
    wrong, right = roc(*flat)
    least = 1 / max(1, int((~flat[1]).sum()))

    def draw(axes: Any) -> None:
        from hansa.sinks.plots import HUES

        line = np.geomspace(least, 1, 200)
        axes.loglog(np.maximum(wrong, least), np.maximum(right, least), color=HUES[0], label="attack")
        axes.loglog(line, line, color=HUES[1], linestyle="--", label="guessing")
        if found.epsilon is not None:
            most = np.minimum(1.0, math.exp(min(found.epsilon, 700.0)) * line + found.delta)
            axes.loglog(
                line, most, color=HUES[2], linestyle="-.", label=f"the most that ε = {found.epsilon:.3g} allows"
            )
        axes.set_xlim(least, 1)
        axes.set_ylim(least, 1)
        axes.set_xlabel("false alarms (share of others)")
        axes.set_ylabel("members found")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.4g}")
            axis.set_minor_formatter("")
        axes.legend(loc="lower right")

    note = (
        "The further the curve lies above the line of guessing, at its left end above all, the more members are told."
    )
    return Picture("Who was trained on, by the model alone", note, draw, 3.4)
