# SPDX-License-Identifier: Apache-2.0
"""Rows dealt out at random, evenly: the partition under which federated and central training differ least."""

from __future__ import annotations

import numpy as np

from hansa.core import rng
from hansa.partition.rows import Partition, Rows, at_least_one, non_empty, numbered


def iid(sites: int) -> Partition:
    """Return a partition into ``sites`` random parts whose sizes differ by at most one.

    Args:
        sites: how many.

    Raises:
        JobError: ``sites`` is below 1.
        DataError: when splitting, there are fewer rows than sites.
    """
    at_least_one(sites=sites)

    def split(rows: Rows, seed: int) -> dict[str, list[int]]:
        order = rng.generator(seed, "partition", "iid").permutation(len(rows))
        parts = numbered(np.array_split(order, sites))
        non_empty(parts, f"There are {len(rows)} rows for {sites} sites: lower partition.sites.")
        return parts

    return split
