# SPDX-License-Identifier: Apache-2.0
"""One-run canaries: an empirical ε of the job's own mechanism, beside the one that its plan accounts for.

Canaries take the place of those whose presence the plan hides, sites or examples. Each is put in or left out by a coin,
and pushes the model ten times as far as the clip allows in a direction of its own; then whoever sees what is released
guesses the coins (:mod:`hansa.audit.estimate`). All of the job's rounds are carried out, by its own clip, noise,
sampling, correlation, masks and denominators; nobody else trains: promises also hold against those who know all others.

===========  =====================================================  ===================  =============================
mechanism    a canary that is out                                   what is seen         the ε that it is held against
===========  =====================================================  ===================  =============================
central      an update of zeros                                     each round's sum     the public's; where cohorts
                                                                                         are secret also the sites'
dp-ftrl      an update of zeros                                     each round's sum     the public's
distributed  an update of zeros, with its share of noise            each round's sum     the server's
local        the opposite update                                    each update          the server's
dp-sgd       no such example                                        each step's sum      the server's
===========  =====================================================  ===================  =============================

Directions are blocks of the flattened model with random signs, of norm 1 and orthogonal: canaries do not get in each
other's way, and one whose block lies in a tensor that is not noised is seen at once. A score weighs rounds as who knows
the mechanism would: by how far a canary may push in each, after the correlation of dp-ftrl's noise is undone.

| case | result |
|---|---|
| a job that promises no ε | skipped, with the reason |
| fewer than ``FEWEST`` parameters, or a site of dp-sgd with fewer examples | skipped: so few prove nothing |
| an adaptive clip | a canary of just the clip, so that in or out is the same for the count of the unclipped |
| a canary's update is rejected, or it can't take part | SiteError: what was to be audited did not run |
| an accounted ε above what so many canaries can prove | the finding says so; the bound for normal noise has no limit |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hansa import registry
from hansa.audit import estimate
from hansa.audit.estimate import Coins, Scores
from hansa.audit.finding import Finding, Measure, Picture, Skipped
from hansa.audit.subject import Subject
from hansa.core import tree as trees
from hansa.core.fit import Trait
from hansa.core.ports import Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Array, Tree
from hansa.core.values import Aggregate, Plan, RoundRecord, Update
from hansa.errors import SiteError
from hansa.privacy.matrix import coefficients, factorised
from hansa.privacy.plan import PrivacyPlan
from hansa.privacy.protect import CLIP
from hansa.runs.progress import Progress

NAME = "one-run canaries"

CANARIES = 10_000
"""How many coins are thrown at most; about half of the canaries are in."""
FEWEST = 32
SUMMED = 64
"""Canaries whose updates are masked or encrypted: with more of them, most of the time goes into keys."""
UPDATES, ELEMENTS = 6e4, 4e9
"""The most updates of all canaries together, and numbers in them: a minute's work. Larger jobs have fewer canaries."""
ENOUGH = 200
"""Canaries that there are whatever they cost."""
PUSH = 10.0
"""How far an update goes before it is clipped, in clips."""


@dataclass(frozen=True)
class Played:
    """A game that was played.

    Attributes:
        included: (m,), which canaries were in.
        signals: (releases, m), how far each release goes in each canary's direction, in clips.
        asked: (releases, m), whether a canary, in or out, could be in it.
        correlation: (releases,), the first column of the C of dp-ftrl's noise; 1 and zeros for any other.
        parameters: of the model.
    """

    included: Coins
    signals: NDArray[np.float64]
    asked: Coins
    correlation: NDArray[np.float64]
    parameters: int

    def scores(self, *, cohorts: bool) -> Scores:
        """Return each canary's score, for those who know who was asked, or for those who don't."""
        pushes = self.asked if cohorts else np.ones_like(self.asked)
        expected, seen = self._correlated(pushes.astype(np.float64)), self._correlated(self.signals)
        lengths = np.linalg.norm(expected, axis=0)
        return np.asarray((expected * seen).sum(0) / np.where(lengths, lengths, 1.0))  # so all have the same noise

    def _correlated(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return C X: dp-ftrl's noise is independent there."""
        found = np.zeros_like(columns)
        for back in np.flatnonzero(self.correlation):
            found[back:] += self.correlation[back] * columns[: len(columns) - back]
        return found


def attack(subject: Subject, generator: np.random.Generator, progress: Progress) -> Finding | Skipped:
    """Play one game and hold what it proves against what is promised."""
    begun = time.perf_counter()
    plan = subject.plan
    if plan is None:
        return Skipped(NAME, "The job promises no ε that canaries could disprove.")
    canaries = _number(subject)
    if canaries < FEWEST:
        return Skipped(
            NAME,
            f"There is room for {canaries} canaries (parameters of the model, or examples of a site), and fewer than "
            f"{FEWEST} prove nothing.",
        )
    played = play(subject, canaries, generator, progress)
    return replace(judged(subject, plan, played), seconds=time.perf_counter() - begun)


def play(subject: Subject, canaries: int, generator: np.random.Generator, progress: Progress) -> Played:
    """Carry all rounds of the job out over so many canaries.

    Raises:
        SiteError: a canary could not take part.
        HansaError: as a run of the job would.
    """
    layout = trees.layout_of(trees.floating(subject.params))
    directions = Directions.drawn(layout, canaries, generator)
    included = generator.random(canaries) < 0.5
    assert subject.job.privacy is not None, "a promise is what is audited"
    if subject.job.privacy.mechanism == "dp-sgd":
        found: Played = registry.load_object("hansa.audit.examples:play")(subject, directions, included, progress)
        return found
    return _play_rounds(subject, directions, included, progress)


def judged(subject: Subject, plan: PrivacyPlan, played: Played) -> Finding:
    """Return what a game comes to."""
    section, canaries = plan.terms.section, len(played.included)
    opposite = section.mechanism == "local"
    views = [("the server", True)] if section.mechanism in _SERVER else [("the public", not plan.secret_cohorts)]
    if plan.secret_cohorts:
        views.append(("the sites", True))
    told: list[tuple[str, Measure, Measure, Measure]] = []
    measures: list[Measure] = []
    for adversary, cohorts in views:
        scores = played.scores(cohorts=cohorts)
        proved = estimate.lower_bound(scores, played.included, section.delta)
        guess = estimate.estimate(scores, played.included, section.delta, replaced=opposite)
        whose = f", {adversary.removeprefix('the ')}" if len(views) > 1 else ""
        promised = subject.promised(adversary)
        least = Measure(f"ε proved{whose}", proved.epsilon, 0.0, bound=promised)
        likely = Measure(f"ε suggested{whose}", guess.epsilon, 0.0, guess.low, guess.high)
        right = Measure(f"right guesses{whose}", 100 * proved.right / proved.guesses, 50.0, unit="%")
        normal = Measure(f"ε proved{whose}, if noise is normal", guess.least, 0.0, bound=promised)
        told.append((adversary, least, normal, likely))
        measures += [least, normal, likely, right]
    return Finding(
        NAME,
        " and ".join(adversary for adversary, _ in views),
        f"{canaries} canaries, {played.included.sum()} of them in, in {len(played.signals)} releases of "
        f"{played.parameters:,} parameters; {subject.protection}",
        tuple(measures),
        "fails" if any(measure.is_broken for measure in measures) else "holds",
        _said(told, estimate.most(canaries, section.delta)),
        _pictures(played, played.scores(cohorts=views[0][1]), measures, opposite=opposite),
    )


_SERVER = ("local", "distributed", "dp-sgd")
"""Mechanisms that hide a unit from the server, who sees most."""


def _said(views: Sequence[tuple[str, Measure, Measure, Measure]], most: float) -> str:
    """Return what is told of (adversary, what is proved, what is if noise is normal, what is suggested)."""
    lines = [
        f"Against {adversary} an ε of {proved.bound:.3g} is promised; one run proves {proved.value:.2f} (95 % sure), "
        f"or {normal.value:.2f} if noise is normal (99.9 %), and suggests {likely.value:.2f} "
        f"(95 %: {likely.low:.2f} to {likely.high:.2f})."
        for adversary, proved, normal, likely in views
    ]
    if any(proved.is_broken or normal.is_broken for _, proved, normal, _ in views):
        lines.append("The promise is broken: clip, noise or sampling is not what was accounted for.")
    else:
        lines.append("Nothing contradicts the promise.")
    if any(proved.bound >= most for _, proved, _, _ in views if proved.bound is not None):
        lines.append(f"Whatever the noise is, so many canaries prove {most:.2g} at most.")
    return " ".join(lines)


def _number(subject: Subject) -> int:
    """Return how many canaries there can be."""
    job, plan = subject.job, subject.plan
    assert plan is not None, "a promise is what is audited"
    size = sum(spec.size for spec in trees.layout_of(trees.floating(subject.params)).values())
    each = max(1.0, plan.terms.rounds * plan.terms.rate)
    most = [CANARIES, size, max(ENOUGH, int(UPDATES / each)), max(ENOUGH, int(ELEMENTS / (size * each)))]
    mechanism = plan.terms.section.mechanism
    if job.secret_sums is not None and mechanism not in ("local", "dp-sgd"):
        most.append(SUMMED)
    if mechanism == "dp-sgd":
        most.append(fewest_examples(subject))
    return min(most)


def fewest_examples(subject: Subject) -> int:
    """Return the number of examples of the site whose ε is the largest."""
    return min(report.counts["train"] for report in subject.reports)


@dataclass(frozen=True)
class Directions:
    """Blocks of a flattened model with random signs: orthogonal, and of norm 1.

    Attributes:
        layout: of the model's floating tensors, in the order that they are flattened in.
        signs: tensor -> -1 or 1 for each element, flattened.
        edges: (m + 1,), where blocks begin and end.
    """

    layout: Mapping[str, trees.Spec]
    signs: Mapping[str, NDArray[np.int8]]
    edges: NDArray[np.int64]

    @classmethod
    def drawn(cls, layout: Mapping[str, trees.Spec], count: int, generator: np.random.Generator) -> Directions:
        """Return ``count`` directions in a model's floating tensors."""
        ordered = {name: layout[name] for name in sorted(layout)}
        signs = {
            name: np.where(generator.integers(0, 2, spec.size, dtype=np.int8) > 0, 1, -1).astype(np.int8)
            for name, spec in ordered.items()
        }
        size = sum(spec.size for spec in ordered.values())
        return cls(ordered, signs, np.arange(count + 1) * size // count)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return int(self.edges[-1])

    def along(self, tree: Tree) -> NDArray[np.float64]:
        """Return how far ``tree`` goes in each direction, (m,)."""
        found = np.zeros(len(self.edges) - 1)
        leaves, first = trees.leaves(tree), 0
        for name, spec in self.layout.items():
            for start, values in trees.blocks(leaves[name]):
                signed = values.astype(np.float64) * self.signs[name][start : start + values.size]
                owners = np.searchsorted(self.edges, first + start + np.arange(values.size), side="right") - 1
                found += np.bincount(owners, signed, len(found))
            first += spec.size
        return found / np.sqrt(np.diff(self.edges))

    def pushed(self, number: int, length: float) -> dict[str, Array]:
        """Return a vector of norm ``length`` in one direction, float64; tensors that it does not touch are left out."""
        begin, end = self.edges[number : number + 2]
        found, first = {}, 0
        for name, spec in self.layout.items():
            low, high = max(begin - first, 0), min(end - first, spec.size)
            if low < high:
                flat = np.zeros(spec.size)
                flat[low:high] = self.signs[name][low:high] * (length / np.sqrt(end - begin))
                found[name] = flat.reshape(spec.shape)
            first += spec.size
        return found


class _Sites:
    """A program whose sites are canaries."""

    traits = frozenset({Trait.STEPWISE})

    def __init__(self, directions: Directions, included: Coins, push: Mapping[bool, float], weight: float) -> None:
        width = len(str(len(included)))
        self.sites = tuple(f"canary-{number:0{width}d}" for number in range(len(included)))
        self._numbers = {site: number for number, site in enumerate(self.sites)}
        self._directions, self._included = directions, included
        self._push, self._weight = push, weight

    def numbers(self, sites: Sequence[str]) -> list[int]:
        """Return which canaries these are."""
        return [self._numbers[site] for site in sites]

    def initial(self) -> Tree:
        return {
            name: np.zeros(spec.shape, trees.dtype_of(spec.dtype)) for name, spec in self._directions.layout.items()
        }

    def inspect(self, site: str) -> SiteReport:
        return SiteReport(site, {})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        number = self._numbers[site]
        length = self._push[bool(self._included[number])]
        if CLIP in plan.parts:  # an adaptive clip: in clips, and just within it
            length *= float(np.asarray(plan.parts[CLIP]["norm"])) * (1 - 1e-3) / PUSH
        params = dict(plan.params)
        if length:
            for name, push in self._directions.pushed(number, length).items():
                params[name] = (plan.params[name] + push).astype(plan.params[name].dtype)
        return Work(params, self._weight, Steps(1, 1.0), {})

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        return {}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {}

    def export(self, params: Tree, directory: Path) -> None:
        """Write nothing."""

    def show(self, params: Tree) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        """Free nothing."""


def _play_rounds(subject: Subject, directions: Directions, included: Coins, progress: Progress) -> Played:
    """Play with canaries that are sites."""
    job, section, terms = subject.job, subject.job.privacy, subject.terms
    assert section is not None, "a promise is what is audited"
    assert terms is not None, "sites and the server agree on terms"
    cohort: dict[str, Any] = {"sites": None, "deadline_s": None}
    local = section.mechanism == "local"
    if local or section.mechanism == "distributed":  # accounted for as if everybody took part in every round
        cohort["sample"] = 1.0
    changed: dict[str, Any] = {"cohort": job.cohort.model_copy(update=cohort)}
    if local:  # what is promised of each update does not rest on sums
        changed |= {"secure_aggregation": None, "homomorphic_encryption": None}
    elif job.homomorphic_encryption is not None:
        changed["homomorphic_encryption"] = job.homomorphic_encryption.model_copy(update={"key_site": None})
    job = job.model_copy(update=changed)
    push = PUSH * (1.0 if section.adaptive_clip else section.clip)
    program = _Sites(directions, included, {True: push, False: -push if local else 0.0}, section.weight_cap or 1.0)
    signals = np.zeros((job.rounds, len(included)))
    asked = np.zeros((job.rounds, len(included)), np.bool_)

    def seen(update: Update) -> None:
        if local:
            (number,) = program.numbers([update.site])
            signals[update.round - 1, number] = directions.along(update.parts["delta"])[number] / section.clip

    def released(round: int, aggregate: Aggregate) -> None:
        if not local:
            signals[round - 1] = directions.along(aggregate.sums["delta"])

    def recorded(record: RoundRecord) -> None:
        if record.absent:
            lost = record.absent[0]
            raise SiteError(f"A canary could not take part: {lost.reason}", site=lost.site, round=record.round)
        asked[record.round - 1, program.numbers(record.asked)] = True
        signals[record.round - 1] /= record.notes.get("clip", 1.0)

    progress.stage(f"{NAME}: {len(included)} sites", job.rounds)
    replace(subject, job=job).carry_out(
        program=program, params=program.initial(), seen=seen, released=released, recorded=recorded, progress=progress
    )
    correlation = np.zeros(job.rounds)
    correlation[0] = 1.0
    if section.mechanism == "dp-ftrl":
        matrix = factorised(job.rounds, section.participations, section.separation)
        correlation = coefficients(matrix.bands, job.rounds)
    return Played(included, signals, asked, correlation, directions.size)


def _pictures(played: Played, scores: Scores, measures: Sequence[Measure], *, opposite: bool) -> tuple[Picture, ...]:
    return (
        Picture(
            "What canaries look like to whoever guesses",
            "How far what is released goes in each canary's direction, in deviations. The more the two lie apart, the "
            "more one release tells of one unit.",
            _histogram(scores, played.included, "put in reversed" if opposite else "left out"),
        ),
        Picture(
            "ε: promised, proved and suggested",
            "Vertical lines are what the job promises. A proved ε to the right of its line breaks the promise; what is "
            "suggested, with its 95 % interval, is the best guess and no proof.",
            _epsilons(measures),
            0.9 + 0.28 * len(measures),
        ),
    )


def _histogram(scores: Scores, included: Coins, out: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        hues = registry.load_object("hansa.sinks.plots:HUES")
        scaled = scores / scores[~included].std()
        bins = np.linspace(scaled.min(), scaled.max(), 32)
        for kept, hue, label in ((~included, hues[1], out), (included, hues[0], "put in")):
            axes.hist(scaled[kept], bins, color=hue, alpha=0.55, label=label)
        axes.set_xlabel("score of a canary")
        axes.set_ylabel("canaries")
        axes.legend()

    return draw


def _epsilons(measures: Sequence[Measure]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        hues = registry.load_object("hansa.sinks.plots:HUES")
        shown = [measure for measure in measures if not measure.unit][::-1]
        for place, measure in enumerate(shown):
            axes.plot([measure.value], [place], "o", color=hues[0], markersize=6)
            if measure.low is not None:
                axes.plot([measure.low, measure.high], [place, place], color=hues[0])
            if measure.bound is not None:
                axes.plot([measure.bound] * 2, [place - 1.4, place + 0.4], color=hues[1])
        axes.set_yticks(range(len(shown)), [measure.name for measure in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("ε")

    return draw
