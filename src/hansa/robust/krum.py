# SPDX-License-Identifier: Apache-2.0
"""Krum and Multi-Krum: Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient descent",
arXiv:1703.02757.

    score(i)    Σ ‖x_i − x_j‖² over the n − f − 2 updates j ≠ i that are nearest to x_i
    krum        the x_i of the least score
    multi-krum  the mean of the n − f updates of the least scores

Distances are over all tensors together, summed in float64, in one pass over the updates.

The proof that Krum's choice points the right way needs n ≥ 2f + 3 and honest updates that are draws of one gradient.
Sites with data of their own kind are not: a site that is unlike all others is left out although it is honest, so Krum
costs most just where federations are used; Multi-Krum costs far less (benchmarks/README.md has both).

| case | result |
|---|---|
| n < 2f + 3 | refused before a site is asked; in a round, below the quorum |
| equal scores | the first by site name |
| several equal updates | distance 0; they support one another, which is what f bounds |
| an update so far away that its distance overflows | an infinite score: it is chosen last |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hansa.core.each import Combine, Rows, Rule
from hansa.core.tree import Array
from hansa.robust.coordinates import average


def krum(malicious: int) -> Rule:
    """Return Krum for at most ``malicious`` lies; the record's notes name the site whose update was taken."""

    def combine(rows: Rows) -> tuple[Combine, Mapping[str, Any]]:
        chosen = int(_ranked(rows, malicious)[0])
        return lambda block: block[chosen], {"kept": rows.sites[chosen]}

    return Rule("krum", 2 * malicious + 3, combine)


def multi_krum(malicious: int) -> Rule:
    """Return Multi-Krum for at most ``malicious`` lies; the record's notes name the sites that were left out."""

    def combine(rows: Rows) -> tuple[Combine, Mapping[str, Any]]:
        ranked = _ranked(rows, malicious)
        chosen = np.sort(ranked[: len(ranked) - malicious])
        left_out = sorted(rows.sites[place] for place in ranked[len(chosen) :])
        return lambda block: average(block[chosen]), {"left_out": ", ".join(left_out)} if left_out else {}

    return Rule("multi-krum", 2 * malicious + 3, combine)


def distances(rows: Rows) -> Array:
    """Return all squared distances between updates, (n, n)."""
    count = len(rows.sites)
    squares = np.zeros((count, count))
    with np.errstate(over="ignore"):
        for block in rows.blocks():
            for place in range(count - 1):
                apart = block[place + 1 :] - block[place]
                squares[place, place + 1 :] += np.square(apart, out=apart).sum(axis=1)
    return squares + squares.T


def _ranked(rows: Rows, malicious: int) -> Array:
    """Return the places of all updates, the least score first."""
    near = len(rows.sites) - malicious - 2
    ordered = np.sort(distances(rows), axis=1)  # the first of each row is its own, 0
    with np.errstate(over="ignore"):
        return np.argsort(ordered[:, 1 : near + 1].sum(axis=1), kind="stable")
