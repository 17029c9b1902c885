# SPDX-License-Identifier: Apache-2.0
"""Dirichlet label skew: Hsu, Qi, Brown 2019, arXiv:1909.06335; per-label form of Yurochkin et al. 2019.

For every label, its rows are divided among the sites in proportions drawn from Dir(α, ..., α): α → ∞ is IID, α → 0
gives every label to one site.
"""

from __future__ import annotations

import numpy as np

from hansa.core import rng
from hansa.errors import DataError, JobError
from hansa.partition.rows import Partition, Rows, at_least_one, groups, numbered

_ATTEMPTS = 100


def dirichlet(sites: int, alpha: float = 0.5, key: str = "label", min_rows: int = 1) -> Partition:
    """Return the Dirichlet partition.

    Args:
        sites: how many.
        alpha: the concentration α > 0.
        key: the column (or role) that holds the label.
        min_rows: the least rows of a site; proportions are drawn anew, up to 100 times, until all have them.

    Raises:
        JobError: an option is out of range.
        DataError: when splitting, no draw gives every site ``min_rows``, or there is no such column.
    """
    at_least_one(sites=sites, min_rows=min_rows)
    if not 0 < alpha < float("inf"):
        raise JobError(f"partition.alpha must be positive and finite, it is {alpha}.")

    def split(rows: Rows, seed: int) -> dict[str, list[int]]:
        labels = groups(rows, key)
        generator = rng.generator(seed, "partition", "dirichlet")
        smallest, least = "", -1
        for _ in range(_ATTEMPTS):
            drawn: list[list[int]] = [[] for _ in range(sites)]
            for members in labels.values():
                shares = generator.dirichlet(np.full(sites, alpha))
                cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
                for part, own in zip(drawn, np.split(generator.permutation(members), cuts), strict=True):
                    part.extend(own)
            parts = numbered(drawn)
            smallest = min(parts, key=lambda site: len(parts[site]))
            least = len(parts[smallest])
            if least >= min_rows:
                return parts
        raise DataError(
            f"In {_ATTEMPTS} draws from Dir({alpha}) some site had fewer than {min_rows} of the {len(rows)} rows "
            f"(lastly {least}). Lower partition.sites or min_rows, or raise alpha.",
            site=smallest,
        )

    return split
