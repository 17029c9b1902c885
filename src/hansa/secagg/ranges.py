# SPDX-License-Identifier: Apache-2.0
"""What a job's words on secure aggregation mean for the ring: what is summed in it, and between which bounds.

By default elements of up to ``range`` = 2^8, weighed by up to ``weight_cap`` = 2^24 examples (2^14 times 1,024), are
summed over up to 1,000 sites in steps of 2^-30, below their default of 1e-9: 8 + 14 + 30 = 52 bits a site, of 53 that
values are encoded in.

This module, :mod:`~hansa.secagg.ring` and :mod:`~hansa.secagg.graph` need no optional library: a simulation of a job
that is masked by default adds up in the same ring, without keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core import tree as trees
from hansa.core.config import SecretSums, SecureAggregationSection
from hansa.core.tree import Parts, Tree
from hansa.core.values import WEIGHT_SCALE
from hansa.secagg.ring import SCALARS, WEIGHT, Encoding, Range, encoding, summands

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""part -> tensor -> shape."""

GIVEN = ":given"
"""The part that counts, for each metric's sum, the sites that gave it."""

FINE = 2.0**-20
_FINEST = 2.0**-36


@dataclass(frozen=True)
class Bounds:
    """What one site may put into the ring.

    Attributes:
        largest: the magnitude of an element, before it is weighed.
        heaviest: the weight.
        step: the coarsest that an element may be rounded to.
    """

    largest: float
    heaviest: float
    step: float


def bounds_of(section: SecretSums) -> Bounds:
    """Return what updates are bounded by where no privacy plan bounds them."""
    return Bounds(section.range, section.weight_cap / WEIGHT_SCALE, section.step or section.default_step)


def spans(
    bounds: Bounds, shapes: Shapes, weighed: Mapping[str, bool], metrics: Mapping[str, float], fine: float
) -> dict[str, dict[str, Range]]:
    """Return what one site may put into each tensor and number of a sum.

    Args:
        bounds: what one site's update is bounded by (:func:`bounds_of`, or a privacy plan's own).
        shapes: of what is summed beside the weight and the metrics.
        weighed: which parts are multiplied by the weight.
        metrics: the largest magnitude of each metric's sum.
        fine: the coarsest step of a metric, relative to its range.
    """
    heaviest = bounds.heaviest if shapes else 1.0  # an evaluation weighs 1

    def span(part: str, shape: tuple[int, ...]) -> Range:
        most = bounds.largest * (heaviest if weighed.get(part) else 1.0)
        return Range(-most, most, bounds.step, shape)

    scalars = {name: Range(-most, most, most * fine) for name, most in metrics.items()}
    return {
        **{part: {name: span(part, shape) for name, shape in tree.items()} for part, tree in shapes.items()},
        SCALARS: {**scalars, WEIGHT: Range(0.0, heaviest, heaviest * FINE)},
    }


def ring_of(
    section: SecureAggregationSection, bounds: Bounds, sites: int, shapes: Shapes, weighed: Mapping[str, bool]
) -> Encoding:
    """Return the ring of one session under masks.

    Where tensors make do with 32 bits, and there a metric's sum would have a step above 1, no metric has a place in it.

    Args:
        section: the job's words.
        sites: how many are asked.
        bounds, shapes, weighed: as of :func:`spans`.

    Raises:
        PrivacyError: sums that could wrap.
    """
    fine = FINE if shapes else _FINEST  # where tensors need the narrow ring, metrics make do with it

    def ring(metrics: Mapping[str, float]) -> Encoding:
        given = {GIVEN: dict.fromkeys(metrics, Range(0.0, 1.0))} if metrics else {}
        return encoding({**spans(bounds, shapes, weighed, metrics, fine), **given}, sites)

    found = ring(section.metrics)
    coarse = any(field.exponent < 0 for field in found.fields if field.part == SCALARS)
    return ring({}) if found.bits == 32 and coarse else found


def shapes_in(ring: Encoding) -> Shapes:
    """Return the shapes of all tensors that a ring's vector holds."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for field in ring.fields:
        if field.part not in (SCALARS, GIVEN):
            shapes.setdefault(field.part, {})[field.name] = field.shape
    return shapes


def metrics_in(ring: Encoding) -> list[str]:
    """Return the metrics' sums that have a place in a ring's vector."""
    return [field.name for field in ring.fields if field.part == GIVEN]


def values_for(ring: Encoding, parts: Parts, weight: float, sums: Mapping[str, float]) -> dict[str, Tree]:
    """Return what one site puts into a ring: its update's parts, its weight, and those of its sums that have a place.

    A sum that it does not have is 0, and the count of sites that gave it tells.
    """
    names = metrics_in(ring)
    found = summands(parts, weight, {name: sums.get(name, 0.0) for name in names})
    given = {name: np.asarray(float(name in sums)) for name in names}
    return {**found, GIVEN: given} if names else found


def sums_from(decoded: Mapping[str, Tree]) -> tuple[float, dict[str, float]]:
    """Return the weight and the metrics' sums of a decoded sum, without those that it says no site gave."""
    scalars = {name: float(np.asarray(leaf)) for name, leaf in trees.leaves(decoded[SCALARS]).items()}
    weight = scalars.pop(WEIGHT)
    given = {name: float(np.asarray(leaf)) for name, leaf in trees.leaves(decoded.get(GIVEN, {})).items()}
    return weight, {name: value for name, value in scalars.items() if given.get(name, 1.0) > 0}
