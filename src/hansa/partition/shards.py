# SPDX-License-Identifier: Apache-2.0
"""Label shards: McMahan et al. 2017, arXiv:1602.05629, section 3 ("pathological non-IID").

Rows are sorted by label and cut into ``sites · per_site`` equal shards; every site gets ``per_site`` of them at
random, so with two shards a site sees about two labels.
"""

from __future__ import annotations

import numpy as np

from hansa.core import rng
from hansa.partition.rows import Partition, Rows, at_least_one, groups, non_empty, numbered


def shards(sites: int, per_site: int = 2, key: str = "label") -> Partition:
    """Return the shard partition.

    Args:
        sites: how many.
        per_site: shards a site gets.
        key: the column (or role) that rows are sorted by.

    Raises:
        JobError: ``sites`` or ``per_site`` is below 1.
        DataError: when splitting, there are fewer rows than shards, or no such column.
    """
    at_least_one(sites=sites, per_site=per_site)

    def split(rows: Rows, seed: int) -> dict[str, list[int]]:
        generator = rng.generator(seed, "partition", "shards")
        by_label = [generator.permutation(members) for members in groups(rows, key).values()]
        ordered = np.concatenate(by_label) if by_label else np.empty(0, np.int64)
        pieces = np.array_split(ordered, sites * per_site)
        turn = generator.permutation(len(pieces)).reshape(sites, per_site)
        parts = numbered([np.concatenate([pieces[piece] for piece in own]) for own in turn])
        non_empty(parts, f"There are {len(rows)} rows for {len(pieces)} shards: lower partition.sites or per_site.")
        return parts

    return split
