# SPDX-License-Identifier: Apache-2.0
"""Rules that take every coordinate by itself: the median and the trimmed mean of Yin et al. 2018, arXiv:1803.01498,
and the plain mean.

    median        the middle value, or the mean of the two in the middle
    trimmed mean  Σ x_(f+1) ... x_(n−f) / (n − 2f),   x_(1) ≤ ... ≤ x_(n)

Guarantee: with at most f lies among n ≥ 2f + 1, median and trimmed mean lie between the least and the largest honest
value of the coordinate, whatever the lies are.

| case | result |
|---|---|
| one update, f = 0 | that update |
| trimming as much as there is (n ≤ 2f) | refused before a site is asked; in a round, below the quorum |
| f = 0 | the trimmed mean is the mean |
| ties | equal values are one value; their order makes no difference |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hansa.core.each import Combine, Rows, Rule
from hansa.core.tree import Array


def mean(malicious: int) -> Rule:
    """Return the mean that counts every site once; it stands lies only beside a bound on norms."""
    return Rule("mean", 2 * malicious + 1, lambda rows: (average, {}))


def median(malicious: int) -> Rule:
    """Return the coordinate-wise median, for at most ``malicious`` lies."""
    return Rule("median", 2 * malicious + 1, lambda rows: (middle, {}))


def trimmed_mean(malicious: int) -> Rule:
    """Return the mean of what is left without the ``malicious`` largest and smallest values of each coordinate."""

    def combine(rows: Rows) -> tuple[Combine, Mapping[str, Any]]:
        return lambda block: average(np.sort(block, axis=0)[malicious : len(block) - malicious]), {}

    return Rule("trimmed-mean", 2 * malicious + 1, combine)


def average(block: Array) -> Array:
    """Return the mean of the rows, added in order: the same bits however wide the block."""
    total = np.zeros(block.shape[1])
    for row in block:
        total += row
    return total / len(block)


def middle(block: Array) -> Array:
    """Return the median of every column."""
    ordered = np.sort(block, axis=0)
    return average(ordered[(len(block) - 1) // 2 : len(block) // 2 + 1])
