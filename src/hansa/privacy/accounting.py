# SPDX-License-Identifier: Apache-2.0
"""What releases of noised sums add up to, by the accountants of ``dp-accounting``.

A release is a sum to which each unit contributes at most ``clip`` in L2 norm, plus Gaussian noise of standard deviation
``noise_multiplier`` × ``clip``, over a Poisson sample of the units: each takes part with probability ``rate``, by
itself. Neighbouring data sets differ by one unit that is added or removed. Noise in a ring is Skellam instead, which is
whole: its Rényi divergences of whole orders are by Agarwal, Kairouz and Liu 2021, arXiv:2110.04995, Theorem 3.5.

========  ==============================================================================================================
pld       privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380);
          without sampling the exact ε of Gaussian noise (Balle and Wang 2018, arXiv:1805.06530)
rdp       Rényi divergences (Mironov 2017, arXiv:1702.07476; Mironov et al. 2019, arXiv:1908.10530), turned into ε by
          Canonne, Kamath and Steinke 2020, arXiv:2004.00010
zcdp      ρ adds up (Bun and Steinke 2016, arXiv:1605.02658), turned into ε in the same way; knows no sampling
========  ==============================================================================================================

| case | result |
|---|---|
| no release, or a rate of 0 | ε = 0 |
| no noise | ε = ∞ |
| an ε above ``WORTHLESS`` by RDP | that, whichever accountant: a distribution of such losses would fill the memory |
| ``zcdp`` and a rate below 1 | the rate is not used: an upper bound, with no amplification by sampling |
| Skellam noise | by Rényi divergences, whatever the accountant, and without sampling |
| ... beside sampled normal noise | that, or half of δ for either, whichever is less |
| an ε that no noise up to ``LARGEST`` gives | PrivacyError |
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from hansa import registry
from hansa.errors import PrivacyError

Accountant = Literal["pld", "rdp", "zcdp"]

WORTHLESS = 1e4
"""An ε that promises nothing to anybody; above it precision is not worth its memory."""
LARGEST = 1e5
"""The largest noise multiplier that is looked for."""
PRECISION = 1e-4
"""How close to the smallest sufficient noise multiplier the one found is, relatively; it always suffices."""

_SMALLEST = 1e-3
_STEP = 1e-4
"""The grid of privacy losses; wider where noise is so small that losses are large. Rounding is always upwards."""


@dataclass(frozen=True)
class Release:
    """The same release, ``count`` times.

    Attributes:
        noise_multiplier: the noise's standard deviation over what one unit contributes at most.
        rate: the probability that a unit takes part, by itself.
        count: how often.
        grid: for Skellam noise, how many of its steps one unit contributes at most; infinite for normal noise.
    """

    noise_multiplier: float
    rate: float = 1.0
    count: int = 1
    grid: float = math.inf


def epsilon(releases: Sequence[Release], delta: float, accountant: Accountant = "pld") -> float:
    """Return the ε that ``releases`` have together at ``delta``.

    >>> round(epsilon([Release(1.0, rate=0.01, count=1000)], delta=1e-5, accountant="rdp"), 3)
    2.101
    """
    left = [r for r in releases if r.count and r.rate]
    if not left:
        return 0.0
    if any(r.noise_multiplier <= 0 for r in left):
        return math.inf
    if any(math.isfinite(r.grid) for r in left):
        return _beside(left, delta, accountant)
    if accountant == "zcdp":
        return epsilon_of_zcdp(sum(r.count / (2 * r.noise_multiplier**2) for r in left), delta)
    return _composed(tuple(left), delta, accountant)


def epsilon_of_zcdp(rho: float, delta: float) -> float:
    """Return the ε at ``delta`` of a mechanism that is ρ-zCDP: Canonne, Kamath and Steinke 2020, Proposition 7.

    >>> round(epsilon_of_zcdp(0.15, 1e-10), 2)
    3.57
    """
    compute: Any = registry.load_object("dp_accounting.rdp:compute_epsilon")
    orders = 1 + np.geomspace(1e-3, 1e6, 20_001)
    return float(compute(orders, orders * rho, delta)[0])


def _beside(releases: Sequence[Release], delta: float, accountant: Accountant) -> float:
    """Return the ε of releases of which some have Skellam noise; with sampled ones beside them δ is shared by both."""
    found = _whole(releases, delta)
    sampled = [r for r in releases if r.rate < 1 and not math.isfinite(r.grid)]
    if not sampled:
        return found
    rest = [r for r in releases if r not in sampled]
    return min(found, epsilon(sampled, delta / 2, accountant) + _whole(rest, delta / 2))


def _whole(releases: Sequence[Release], delta: float) -> float:
    """Return the ε of releases of which some have Skellam noise; sampling is not used, whatever the accountant."""
    compute: Any = registry.load_object("dp_accounting.rdp:compute_epsilon")
    orders = np.unique(np.concatenate([np.arange(2.0, 512.0), np.geomspace(512, 1e7, 200).round()]))
    spent = np.zeros_like(orders)
    for release in releases:
        precision = release.noise_multiplier**-2
        # ‖x‖₁ ≤ ‖x‖₂² for whole x, so Δ₁ ≤ Δ₂², and the variance is (z Δ₂)².
        coarse = (2 * orders + 5) * precision**2 / (4 * release.grid**2)
        spent += release.count * (orders * precision / 2 + coarse)
    return float(compute(orders, spent, delta)[0])


@lru_cache(maxsize=256)
def _composed(releases: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """Return the ε of releases that all have noise; those without sampling are together one Gaussian release."""
    sampled = [r for r in releases if r.rate < 1]
    precision = sum(r.count / r.noise_multiplier**2 for r in releases if r.rate >= 1)
    if accountant == "pld" and not sampled:
        exact: Any = registry.load_object("dp_accounting:get_epsilon_gaussian")
        with np.errstate(divide="ignore"):  # far in the tail it takes the logarithm of 0, and means it
            return float(exact(1 / math.sqrt(precision), delta))
    gaussian: Any = registry.load_object("dp_accounting:GaussianDpEvent")
    poisson: Any = registry.load_object("dp_accounting:PoissonSampledDpEvent")
    if accountant == "pld":
        if (bound := _composed(releases, delta, "rdp")) > WORTHLESS:
            return bound
        step = _STEP * max(1.0, (0.5 / min(r.noise_multiplier for r in sampled)) ** 2)
        book: Any = registry.load_object("dp_accounting.pld:PLDAccountant")(value_discretization_interval=step)
    else:
        book = registry.load_object("dp_accounting.rdp:RdpAccountant")()
    if precision:
        book.compose(gaussian(1 / math.sqrt(precision)))
    with _quiet():
        for release in sampled:
            book.compose(poisson(release.rate, gaussian(release.noise_multiplier)), release.count)
    return float(book.get_epsilon(delta))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the accountant's warnings of orders that it does without: the bound holds without them."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=256)
def noise_for(
    target: float, delta: float, rate: float, count: int, accountant: Accountant = "pld", grid: float = math.inf
) -> float:
    """Return the smallest noise multiplier (to ``PRECISION``, rounded up) with which ``count`` releases meet an ε.

    Raises:
        PrivacyError: no noise multiplier up to ``LARGEST`` does.
    """

    def enough(noise: float) -> bool:
        return epsilon([Release(noise, rate, count, grid)], delta, accountant) <= target

    high = 1.0
    while not enough(high):
        high *= 2
        if high > LARGEST:
            raise PrivacyError(
                f"No noise multiplier up to {LARGEST:g} gives ε = {target:g} at δ = {delta:g} over {count} releases. "
                "Ask for a larger epsilon, fewer rounds, or a smaller sample."
            )
    low = high / 2
    while low > _SMALLEST and enough(low):
        high, low = low, low / 2

    def excess(exponent: float) -> float:
        found = epsilon([Release(math.exp(exponent), rate, count, grid)], delta, accountant)
        return math.log(max(found, target / 10) / target)

    if not enough(low):
        root: Any = registry.load_object("scipy.optimize:brentq")
        high = math.exp(root(excess, math.log(low), math.log(high), xtol=PRECISION / 4))
    while not enough(high):
        high *= 1 + PRECISION / 2
    return high
