# SPDX-License-Identifier: Apache-2.0
"""From the scores of canaries to an ε: a bound that holds, and a best guess.

A canary is put in or left out by a fair coin, and its score says how much what was released points to it.

Lower bound: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", arXiv:2305.08846, Theorem
5.2 and Appendix D. Of m canaries the r/2 of highest score are guessed to be in and the r/2 of lowest score to be out.
If the mechanism is (ε, δ)-DP, then v or more right guesses have a probability of at most

    β + 2 m δ α,    β = P[B ≥ v],    α = max_{1≤i≤v} P[v > B ≥ v − i] / i,    B ~ Binomial(r, e^ε / (1 + e^ε))

The bound is the largest ε at which that is below one minus the confidence. Numbers of guesses are fixed before scores
are seen (:data:`SHARES` of m), and the confidence is shared among them, so the largest of their bounds holds as well.

Estimate: Andrew et al. 2023, "One-shot empirical privacy estimation for federated learning", arXiv:2302.03098: the
scores of both kinds taken for normal, the exact ε of telling one from the other. Two departures: what noise adds to a
score does not depend on its canary, so both kinds have one deviation; and a canary that is out has the mean 0 by its
random signs, so only the mean of the others is estimated. Noise that is normal, as every mechanism says of its own,
makes the lower limit of that another bound, at :data:`SURE`: far sharper, and wrong where noise is something else.

| case | result |
|---|---|
| all canaries in, or all out | a bound like any other: half of the guesses are wrong |
| no more right guesses than chance | 0 |
| the mean of those that are in is not above 0 | an estimate of 0 |
| scores without any deviation | an estimate of ∞ |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hansa import registry
from hansa.privacy.accounting import Release, epsilon

Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]

CONFIDENCE = 0.95
SURE = 0.999
"""How sure the bound is that takes noise for normal."""
SHARES = (1 / 16, 1 / 4, 1.0)
"""How many guesses are made, as shares of the canaries: few sure ones tell of a large ε, many of a small one."""

_LARGEST = 50.0


@dataclass(frozen=True)
class Bound:
    """What guesses prove: ε is at least ``epsilon``; ``right`` of ``guesses`` were right."""

    epsilon: float
    guesses: int
    right: int


@dataclass(frozen=True)
class Estimate:
    """The best guess of ε, the ends of its interval at :data:`CONFIDENCE`, and what it is at least, at :data:`SURE`."""

    epsilon: float
    low: float
    high: float
    least: float


def lower_bound(scores: Scores, included: Coins, delta: float) -> Bound:
    """Return the ε that the canaries' scores prove at ``delta``, with :data:`CONFIDENCE`.

    Args:
        scores: (m,), higher for a canary that seems to be in.
        included: (m,), which are; by fair coins.
        delta: δ.
    """
    order = np.argsort(scores, kind="stable")
    found = []
    for guesses in _numbers(len(scores)):
        half = guesses // 2
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        found.append(Bound(_proved(len(scores), guesses, right, delta), guesses, right))
    return max(found, key=lambda bound: bound.epsilon)


def most(canaries: int, delta: float) -> float:
    """Return the largest ε that so many canaries can prove: every guess is right.

    >>> round(most(800, 1e-5), 1)
    5.2
    """
    return max(_proved(canaries, guesses, guesses, delta) for guesses in _numbers(canaries))


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of so many right guesses under any (ε, δ)-DP mechanism.

    >>> p_value(100, 10, 10, 0.0, 0.0) == 2.0**-10
    True
    """
    binomial: Any = registry.load_object("scipy.stats:binom")
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binomial.sf(right - 1, guesses, chance))
    i = np.arange(1, right + 1)
    alpha = float((np.cumsum(binomial.pmf(right - i, guesses, chance)) / i).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def estimate(scores: Scores, included: Coins, delta: float, *, replaced: bool = False) -> Estimate:
    """Return the ε of telling scores of both kinds apart, taken for normal, and its interval at :data:`CONFIDENCE`.

    Args:
        scores: (m,), higher for a canary that seems to be in.
        included: (m,), which are.
        delta: δ.
        replaced: whether one that is out is put in with the opposite sign instead of being left out.
    """
    towards = np.where(included, 1.0, -1.0)
    seen = scores * towards if replaced else scores[included]
    mean = float(seen.mean())
    noise = seen - mean if replaced else np.concatenate([seen - mean, scores[~included]])
    deviation = math.sqrt(float(noise @ noise) / (noise.size - 1))
    if not deviation:
        return Estimate(*([math.inf] * 4 if mean > 0 else [0.0] * 4))
    apart = mean / deviation
    error = math.sqrt(1 / seen.size + apart**2 / (2 * noise.size))  # of the mean, and of the deviation
    normal: Any = registry.load_object("scipy.stats:norm")
    usual, sure = (float(normal.ppf(level)) * error for level in ((1 + CONFIDENCE) / 2, SURE))
    steps = 2.0 if replaced else 1.0
    found = (_told_apart(steps * value, delta) for value in (apart, apart - usual, apart + usual, apart - sure))
    return Estimate(*found)


def _told_apart(deviations: float, delta: float) -> float:
    return epsilon([Release(1 / deviations)], delta) if deviations > 0 else 0.0


def _numbers(canaries: int) -> list[int]:
    return [2 * max(1, round(share * canaries / 2)) for share in SHARES]


def _proved(canaries: int, guesses: int, right: int, delta: float) -> float:
    """Return the largest ε, to 1e-6 and rounded down, at which so many right guesses are too unlikely."""
    level = (1 - CONFIDENCE) / len(SHARES)
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low
