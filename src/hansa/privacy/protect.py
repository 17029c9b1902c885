# SPDX-License-Identifier: Apache-2.0
"""A strategy under a privacy plan: what sites bound and noise, and what the server adds before it steps.

Central: DP-FedAvg, McMahan et al. 2018, arXiv:1710.06963, with the clip fixed or adaptive (Andrew et al. 2021,
arXiv:1905.03871, Algorithm 1). DP-FTRL: the same with correlated noise (``matrix``), and sites that take turns instead
of being drawn. Local: the Gaussian mechanism at each site.

    site     Δ ← Δ · min(1, C/‖Δ‖)  (jointly over all parts);   w ← 1, or min(n, cap)/cap;   b ← ½ if ‖Δ‖ ≤ C else −½
    server   Δ̄ ← (Σ w Δ + N(0, (z_Δ C)²)) / (q N);              b̃ ← (Σ b + N(0, σ_b²)) / (q N) + ½
             C ← C · exp(−η_C (b̃ − γ)),                         z_Δ = (z⁻² − (2σ_b)⁻²)^−½,   σ_b = q N / 20

Guarantees, each held by a test:

- what leaves a site under a plan has a bounded norm, no metrics of training, and no exact number of examples;
- the server adds noise to every part that it sums, in every round, nobody's included;
- the mean's denominator is q N, whoever answered: it tells nothing, and a sum of few is not blown up;
- an update whose norm is above the clip is rejected by the server, whatever its sender says;
- cohorts are drawn from the run's secret: each site by itself with probability q, and never again to reach a quorum.

| case | result |
|---|---|
| a cohort of nobody, or a dp-ftrl round after every site's last turn | a step of noise alone |
| a NaN or infinite update | NonFiniteError at the site, which is then absent |
| an update of zeros | sent as it is; its norm is not above the clip |
| distributed noise, and fewer sites than its shares are for | no sum is shown: the quorum of the masks is that number |
| an adaptive clip that would outgrow the masks' ring | it stays at what the ring holds: nothing wraps or is refused |
| σ_b too small for z (z ≥ 2σ_b) | PrivacyError: the count alone would spend more than is promised |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hansa.core import bound
from hansa.core import tree as trees
from hansa.core.filter import Filter, Given
from hansa.core.fit import Trait
from hansa.core.lazy import Leaf, apply
from hansa.core.strategy import Notes, Strategy
from hansa.core.tree import Parts, Spec, Tree
from hansa.core.values import WEIGHT_SCALE, Aggregate, Model, Update
from hansa.errors import NonFiniteError
from hansa.privacy.draws import Secret
from hansa.privacy.matrix import factorised
from hansa.privacy.plan import GRID, SLACK, Terms

CLIP = "clip"
"""The part of the state, and of plans, that holds an adaptive clip."""
COUNT = "unclipped"
"""The part of updates that counts those that were not clipped."""


def bounded(terms: Terms) -> Filter:
    """Return the filter that bounds an update, and where the plan is local adds noise to it; it comes before weighing.

    Raises (when applied):
        NonFiniteError: the update is NaN or infinite.
    """
    section = terms.section

    def apply(update: Update, given: Given, memory: Parts) -> tuple[Update, Parts]:
        clip = section.clip
        if section.adaptive_clip:
            clip = float(np.asarray(given.sent[CLIP]["norm"]))
        parts, length = bound.clip(update.parts, clip)
        if not math.isfinite(length):
            raise NonFiniteError("The update is not finite.", site=update.site, round=update.round)
        if section.mechanism == "local":
            fresh, std = Secret.fresh(), terms.noise_multiplier * clip * SLACK
            parts = noised(parts, lambda shape, dtype, *labels: fresh.gaussian(shape, dtype, std, *labels))
        if section.adaptive_clip:
            parts = {**parts, COUNT: {"half": np.array(0.5 if length <= clip else -0.5, np.float32)}}
        weight = 1.0
        if section.weight_cap is not None:
            weight = min(update.weight * WEIGHT_SCALE, section.weight_cap) / section.weight_cap
        return replace(update, parts=parts, weight=weight, sums={}, logged={}), {}

    return Filter("privacy", frozenset({Trait.CLIPS}), apply)


def protected(strategy: Strategy, terms: Terms, secret: Secret | None = None) -> Strategy:
    """Return ``strategy`` under a plan.

    Args:
        strategy: the algorithm; its parts are bounded together.
        terms: the plan's terms.
        secret: the run's, at the server; a site has none, and needs none.

    """
    section = terms.section
    if section.mechanism == "local":
        return strategy
    adaptive = section.adaptive_clip

    def init(model: Model) -> Parts:
        own: dict[str, Tree] = {CLIP: {"norm": np.array(section.clip)}} if adaptive else {}
        return {**strategy.init(model), **own}

    def sent(state: Parts) -> Parts:
        own = {CLIP: state[CLIP]} if adaptive else {}
        return {**strategy.sent(_inner(state)), **own}

    def clip_of(state: Parts) -> float:
        return float(np.asarray(state[CLIP]["norm"])) if adaptive else section.clip

    def step(model: Model, state: Parts, aggregate: Aggregate) -> tuple[Model, Parts, Notes]:
        clip, expected = clip_of(state), terms.rate * aggregate.population / section.separation
        if section.mechanism == "distributed":
            expected = math.ceil(expected)
        noise, count_noise = terms.noises(expected)
        std = noise * clip * SLACK
        sums = {part: aggregate.sums.get(part) or _zeros(model) for part in strategy.weighed}
        if section.mechanism != "distributed":
            assert secret is not None, "only the server steps, and it has the run's secret"
            sums = noised(sums, _draws(terms, secret, std, model.version))
        released = replace(aggregate, sums=sums, weight=expected, count=expected, metrics={})
        stepped, inner, notes = strategy.step(model, _inner(state), released)
        notes = {**notes, "clip": clip, "noise": std / expected}
        if adaptive is None:
            return stepped, inner, notes
        halves = aggregate.sums.get(COUNT, {"half": np.zeros(())})["half"]
        assert secret is not None, "an adaptive clip is the server's"
        drawn = secret.generator(model.version, COUNT).normal(0.0, count_noise)
        share = (float(np.asarray(halves)) + drawn) / expected + 0.5
        clip = min(terms.most, clip * math.exp(-adaptive.lr * (share - adaptive.quantile)))
        return stepped, {**inner, CLIP: {"norm": np.array(clip)}}, {**notes, "unclipped": share}

    def select(sites: Sequence[str], round: int) -> tuple[str, ...]:
        assert secret is not None, "only the server draws cohorts, and it has the run's secret"
        if section.mechanism == "dp-ftrl":
            return _turn(sites, round, section.separation, section.participations)
        drawn = secret.generator("cohort", round).random(len(sites))
        return tuple(site for site, value in zip(sorted(sites), drawn, strict=True) if value < terms.rate)

    return replace(
        strategy,
        init=init,
        sent=sent,
        step=step,
        select=None if section.mechanism == "distributed" else select,
        bound=lambda state: clip_of(state) * SLACK,
        weighed={**strategy.weighed, **({COUNT: False} if adaptive else {})},
        extra={**strategy.extra, **({COUNT: {"half": Spec("float32", ())}} if adaptive else {})},
    )


def noised(parts: Parts, draw: Callable[..., Leaf]) -> dict[str, Tree]:
    """Return ``parts`` with noise on every element, in their own dtypes.

    Args:
        parts: what is hidden.
        draw: ``(shape, dtype, part, name)`` -> the noise of one tensor.
    """

    def hidden(leaf: Any, part: str, name: str) -> Any:
        wide = trees.wide(leaf.dtype)
        noise = draw(leaf.shape, wide, part, name)
        return (leaf.astype(wide) + (noise if trees.is_leaf(leaf) else np.asarray(noise))).astype(leaf.dtype)

    return {
        part: {name: hidden(leaf, part, name) for name, leaf in trees.leaves(tree).items()}
        for part, tree in parts.items()
    }


def grid_of(clip: float) -> float:
    """Return the step of the grid that distributed noise is whole on: a power of two, of which the clip has 2²³ to 2²⁴.

    >>> grid_of(1.0) == 2.0**-23, grid_of(0.75) == 2.0**-24
    (True, True)
    """
    return 2.0 ** math.floor(math.log2(clip / GRID))


def share_of_noise(parts: Parts, terms: Terms, honest: int, secret: Secret, *labels: int | str) -> dict[str, Tree]:
    """Return a site's bounded ``parts`` rounded to the grid, with its share of distributed noise: whole Skellam draws.

    The shares of ``honest`` sites are all of the noise, so it suffices for every sum that is ever shown, also to those
    who know the other sites' shares (Agarwal, Kairouz and Liu 2021, arXiv:2110.04995).
    """
    grid = grid_of(terms.section.clip)
    variance = deviation_of_share(terms, honest, grid) ** 2

    return {
        part: {
            name: trees.tensor(
                (_rounded(leaf, grid) + secret.skellam(leaf.shape, variance, *labels, part, name)) * grid
            )
            for name, leaf in trees.leaves(tree).items()
        }
        for part, tree in parts.items()
    }


def deviation_of_share(terms: Terms, honest: int, grid: float) -> float:
    """Return the standard deviation of one site's share of the noise, in steps of the grid."""
    return terms.noise_multiplier * terms.section.clip * SLACK / grid / math.sqrt(honest)


def _rounded(leaf: Any, grid: float) -> Leaf:
    wide = (leaf if trees.is_leaf(leaf) else Leaf.of(np.asarray(leaf))).astype(np.float64)
    return apply(np.rint, wide * (1 / grid))


def _draws(terms: Terms, secret: Secret, std: float, round: int) -> Callable[..., Leaf]:
    """Return the noise of one round's sum; ``round`` is counted from 0."""
    section = terms.section
    if section.mechanism != "dp-ftrl":
        return lambda shape, dtype, *labels: secret.gaussian(shape, dtype, std, round, *labels)
    matrix = factorised(terms.rounds, section.participations, section.separation)
    wide_std = std * matrix.sensitivity
    return lambda shape, dtype, *labels: matrix.noise(secret, shape, dtype, wide_std, round, *labels)


def _turn(sites: Sequence[str], round: int, separation: int, participations: int | None) -> tuple[str, ...]:
    """Return whose turn it is: each site every ``separation`` rounds, and no more often than it may."""
    turn, place = divmod(round - 1, separation)
    if participations is not None and turn >= participations:
        return ()
    return tuple(site for number, site in enumerate(sorted(sites)) if number % separation == place)


def _inner(state: Parts) -> Parts:
    return {part: tree for part, tree in state.items() if part != CLIP}


def _zeros(model: Model) -> Mapping[str, Any]:
    """Return the sum of nobody's updates."""
    held = trees.floating(model.params)
    return trees.Derived(held.keys(), lambda name: held[name] * held[name].dtype.type(0))
