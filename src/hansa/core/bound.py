# SPDX-License-Identifier: Apache-2.0
"""The joint L2 norm of an update's parts, and scaling them down to a bound.

| case | result |
|---|---|
| norm 0, or at most the bound | unchanged, to the bit |
| NaN or infinite norm | unchanged; the caller looks at the norm |
| half precision, where rounding may go up | at most the bound times 1 + 1e-5 all the same |
"""

from __future__ import annotations

import math

from hansa.core import tree as trees
from hansa.core.tree import Parts


def norm(parts: Parts) -> float:
    """Return the joint L2 norm of all parts.

    >>> import numpy as np
    >>> norm({"delta": {"w": np.array([3.0])}, "control": {"w": np.array([4.0])}})
    5.0
    """
    return math.hypot(*(trees.norm(tree) for tree in parts.values()))


def clip(parts: Parts, max_norm: float) -> tuple[Parts, float]:
    """Return ``parts`` scaled down to a joint L2 norm of at most ``max_norm`` (1 + 1e-5), and the norm they had."""
    length = norm(parts)
    if length <= max_norm or not math.isfinite(length):
        return parts, length
    factor = max_norm / length
    while True:
        scaled = {part: trees.times(tree, factor) for part, tree in parts.items()}
        left = norm(scaled)
        if left <= max_norm * (1 + 1e-5):
            return scaled, length
        # Rounding to half precision may go up, by 2⁻⁹ or, among the smallest numbers, by far more.
        factor *= 0.999 * max_norm / left
