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
from dataclasses import replace

from hansa.core import bound
from hansa.core.filter import Filter, Given
from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update
from hansa.errors import JobError, NonFiniteError


def clip(max_norm: float) -> Filter:
    """Return the filter that scales an update down to an L2 norm of at most ``max_norm``, over all parts."""
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise JobError(f"filters.clip: max_norm must be positive and finite, it is {max_norm}.")

    def apply(update: Update, given: Given, memory: Parts) -> tuple[Update, Parts]:
        parts, length = bound.clip(update.parts, max_norm)
        if not math.isfinite(length):
            raise NonFiniteError("The update is not finite.", site=update.site, round=update.round)
        return replace(update, parts=parts), {}

    return Filter("clip", frozenset({Trait.CLIPS}), apply)
