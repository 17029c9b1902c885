# SPDX-License-Identifier: Apache-2.0
"""Clip an update's norm: McMahan et al. 2018, arXiv:1710.06963, flat clipping.

Guarantee: after ``clip(C)`` the joint L2 norm over all parts is at most C (1 + 1e-5).

| case | result |
|---|---|
| norm 0 | unchanged |
| norm at most C | unchanged, to the bit |
| NaN or infinite norm | NonFiniteError; nothing is sent |
| C not positive | JobError |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from hansa.core import tree as trees
from hansa.core.filter import Filter
from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update
from hansa.errors import JobError, NonFiniteError


def clip(max_norm: float) -> Filter:
    """Return the filter that scales an update down to an L2 norm of at most ``max_norm``, over all parts."""
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise JobError(f"filters.clip: max_norm must be positive and finite, it is {max_norm}.")

    def apply(update: Update, weighed: Mapping[str, bool], memory: Parts) -> tuple[Update, Parts]:
        length = _norm(update.parts)
        if not math.isfinite(length):
            raise NonFiniteError("The update is not finite.", site=update.site, round=update.round)
        if length <= max_norm:
            return update, {}
        factor = max_norm / length
        while True:
            parts = {part: trees.times(tree, factor) for part, tree in update.parts.items()}
            left = _norm(parts)
            if left <= max_norm * (1 + 1e-5):
                return replace(update, parts=parts), {}
            # Rounding to half precision may go up, by 2⁻⁹ or, among the smallest numbers, by far more.
            factor *= 0.999 * max_norm / left

    return Filter("clip", frozenset({Trait.CLIPS}), apply)


def _norm(parts: Parts) -> float:
    return math.hypot(*(trees.norm(tree) for tree in parts.values()))
