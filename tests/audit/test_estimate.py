# SPDX-License-Identifier: Apache-2.0
"""Bounds of ε from canaries' scores: they hold as often as they say, and the estimate is the Gaussian's own ε."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hansa.audit import estimate
from hansa.privacy.accounting import Release, epsilon

DELTA = 1e-5


def game(canaries: int, noise: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and coins of a Gaussian mechanism."""
    included = generator.random(canaries) < 0.5
    return included + noise * generator.normal(size=canaries), included


@pytest.mark.parametrize("noise", [4.0, 1.0])
def test_the_bound_holds_as_often_as_it_says(noise: float) -> None:
    """At most 5 % of 200 bounds may lie above ε; 20 of them would be a chance of 1 in 500."""
    generator = np.random.default_rng(0)
    true = epsilon([Release(noise)], DELTA)
    bounds = [estimate.lower_bound(*game(400, noise, generator), DELTA).epsilon for _ in range(200)]
    assert sum(bound > true for bound in bounds) < 20
    assert np.median(bounds) > 0 or noise > 2, "and it proves something"


def test_the_worst_mechanism_meets_the_bound() -> None:
    """Randomised response is as bad as its ε allows: bounds come close, and lie above it in 5 % of all at most."""
    generator, true = np.random.default_rng(1), 1.0
    bounds = []
    for _ in range(300):
        included = generator.random(400) < 0.5
        told = included ^ (generator.random(400) > 1 / (1 + math.exp(-true)))
        bounds.append(estimate.lower_bound(told + 1e-6 * generator.random(400), included, 0.0).epsilon)
    assert np.mean(np.array(bounds) > true) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert np.median(bounds) > 0.6


@pytest.mark.parametrize("noise", [8.0, 2.0, 0.7])
def test_the_bound_for_normal_noise_holds_and_sees_half_of_it(noise: float) -> None:
    """One in a thousand bounds may lie above ε; 4 of 300 would be a chance of 1 in 4,000."""
    generator = np.random.default_rng(4)
    promised = epsilon([Release(noise)], DELTA)
    honest = [estimate.estimate(*game(800, noise, generator), DELTA).least > promised for _ in range(300)]
    assert sum(honest) < 4
    half = [estimate.estimate(*game(3200, noise / 2, generator), DELTA).least > promised for _ in range(30)]
    assert sum(half) >= 25


@pytest.mark.parametrize("noise", [4.0, 2.0])
def test_it_sees_a_quarter_of_the_noise(noise: float) -> None:
    generator = np.random.default_rng(2)
    promised = epsilon([Release(noise)], DELTA)
    caught = [estimate.lower_bound(*game(800, noise / 4, generator), DELTA).epsilon > promised for _ in range(20)]
    assert sum(caught) >= 18


def test_the_p_value_is_the_binomial_s_without_delta() -> None:
    assert estimate.p_value(50, 20, 16, 1.0, 0.0) == pytest.approx(stats.binom.sf(15, 20, math.e / (1 + math.e)))


def test_delta_s_share_is_the_paper_s() -> None:
    """β + 2 m δ α, worked out by hand: r = 2, v = 2, ε = 0, so P[B = 2] = ¼, and α = max(½, ¾ / 2) = ½."""
    assert estimate.p_value(10, 2, 2, 0.0, 1e-3) == pytest.approx(0.25 + 2 * 10 * 1e-3 * 0.5)


def test_more_epsilon_is_less_unlikely() -> None:
    values = [estimate.p_value(100, 50, 40, eps, 1e-5) for eps in np.linspace(0, 5, 30)]
    assert values == sorted(values)


@pytest.mark.parametrize(("noise", "replaced"), [(4.0, False), (1.0, False), (4.0, True)])
def test_the_estimate_is_unbiased_and_its_interval_covers(noise: float, replaced: bool) -> None:
    generator = np.random.default_rng(3)
    found = []
    for _ in range(100):
        scores, included = game(800, noise, generator)
        if replaced:
            scores += included - 1.0  # -1 for the others
        found.append(estimate.estimate(scores, included, DELTA, replaced=replaced))
    true = epsilon([Release(noise / 2 if replaced else noise)], DELTA)
    middles = np.array([each.epsilon for each in found])
    assert abs(middles.mean() - true) < 4 * middles.std() / 10 + 0.01 * true
    assert sum(each.low <= true <= each.high for each in found) >= 85
    wrong = epsilon([Release(noise / 1.25)], DELTA)
    assert sum(each.low <= wrong <= each.high for each in found) < 85 or replaced, "and it tells other noise"


def test_edges() -> None:
    every = np.ones(100, np.bool_)
    assert estimate.lower_bound(np.arange(100.0), every, DELTA).epsilon == 0
    nothing = np.where(np.arange(100) % 2 == 0, -1.0, 1.0)
    assert estimate.estimate(nothing, nothing < 0, DELTA).epsilon == 0
    assert estimate.estimate(np.arange(100) % 2 * 1.0, np.arange(100) % 2 > 0, DELTA).epsilon == math.inf
