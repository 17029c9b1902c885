# SPDX-License-Identifier: Apache-2.0
"""One site for each value of a column: the speaker, the hospital, the service desk. A natural partition."""

from __future__ import annotations

from hansa.errors import DataError
from hansa.partition.rows import Partition, Rows, at_least_one, groups, site_names


def by_key(key: str, sites: int | None = None, min_rows: int = 1) -> Partition:
    """Return a partition by the values of column ``key``, which become the sites' names.

    Args:
        key: the column (or role).
        sites: keep the values with the most rows, so many; all by default. Rows of other values are left out.
        min_rows: leave out values with fewer rows.

    Raises:
        JobError: ``sites`` or ``min_rows`` is below 1.
        DataError: when splitting, no value is left or fewer than ``sites``, or there is no such column.
    """
    at_least_one(sites=1 if sites is None else sites, min_rows=min_rows)

    def split(rows: Rows, seed: int) -> dict[str, list[int]]:
        kept = {value: own for value, own in groups(rows, key).items() if len(own) >= min_rows}
        if len(kept) < (sites or 1):
            raise DataError(
                f"Column {key!r} has {len(kept)} values with at least {min_rows} rows; {sites or 1} are needed. "
                "Lower partition.sites or min_rows."
            )
        largest = sorted(kept, key=lambda value: (-len(kept[value]), value))[:sites]
        names = site_names(sorted(largest))
        return {name: kept[value] for value, name in names.items()}

    return split
