# SPDX-License-Identifier: Apache-2.0
"""The geometric median by smoothed Weiszfeld steps: RFA, Pillutla, Kakade and Harchaoui 2022, arXiv:1912.13445.

    v* = argmin_v Σ ‖v − x_i‖,     by   v ← Σ β_i x_i / Σ β_i,   β_i = 1 / max(ν, ‖v − x_i‖)

Two things differ from the paper. Steps begin at the coordinate-wise median, not at the mean, which one lie can carry
off so far that a few steps do not lead back. And every site counts once. Each step is one pass over the updates; they
end when none of the weights β_i / Σ β moves by more than 1e-6, or after :data:`STEPS`.

| case | result |
|---|---|
| one update | that update |
| n ≤ 2f | refused before a site is asked; in a round, below the quorum |
| v on one of the updates | its distance counts as ν, so nothing is divided by zero |
| all updates equal | that update |
| an update so far away that its distance overflows | its weight is 0 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hansa.core.each import Combine, Rows, Rule
from hansa.core.tree import Array
from hansa.robust.coordinates import middle

SMOOTHING = 1e-6
"""ν: the least distance that counts."""
STEPS = 32
"""The most steps, each of which reads all updates once."""
SETTLED = 1e-6
"""How little the weights move when steps end."""


def geometric_median(malicious: int) -> Rule:
    """Return the geometric median, for at most ``malicious`` lies."""

    def combine(rows: Rows) -> tuple[Combine, Mapping[str, Any]]:
        combined: Combine = middle
        before = np.zeros(len(rows.sites))
        for _ in range(STEPS):
            inverse = 1 / np.maximum(SMOOTHING, _lengths(rows, combined))
            weights = inverse / inverse.sum()
            combined = _weighted(weights)
            if np.abs(weights - before).max() <= SETTLED:
                break
            before = weights
        return combined, {}

    return Rule("geometric-median", 2 * malicious + 1, combine)


def _lengths(rows: Rows, centre: Combine) -> Array:
    """Return the distance of each update from what ``centre`` makes of all."""
    squares = np.zeros(len(rows.sites))
    with np.errstate(over="ignore"):
        for block in rows.blocks():
            apart = block - centre(block)
            squares += np.square(apart, out=apart).sum(axis=1)
    return np.sqrt(squares)


def _weighted(weights: Array) -> Combine:
    def combine(block: Array) -> Array:
        total = np.zeros(block.shape[1])
        for weight, row in zip(weights, block, strict=True):
            total += weight * row
        return total

    return combine
