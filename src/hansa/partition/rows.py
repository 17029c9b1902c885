# SPDX-License-Identifier: Apache-2.0
"""What a partition sees of a data set, and what all partitions share: groups, site names, checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from hansa.errors import DataError, JobError


class Rows(Protocol):
    """A data set, as far as a partition needs it."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def column(self, name: str) -> Sequence[Any]:
        """Return one value a row; ``name`` is a role or a column. Raises DataError if there is no such column."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """For each row, the name of the file it came from, without folder and suffix."""
        ...


Partition = Callable[[Rows, int], dict[str, list[int]]]
"""``split(rows, seed) -> site name -> row indices``, ascending; no row goes to two sites."""


def groups(rows: Rows, key: str) -> dict[str, list[int]]:
    """Return the rows of each value of column ``key``, values as text and sorted.

    Raises:
        DataError: the column holds lists, tables or nothing, which are no keys.
    """
    found: dict[str, list[int]] = {}
    for index, value in enumerate(rows.column(key)):
        if value is None or not isinstance(value, Hashable):
            raise DataError(
                f"Row {index + 1} has {'nothing' if value is None else type(value).__name__} in {key!r}, "
                "which can't say whose row it is. Name a column of words or numbers as the partition's key."
            )
        found.setdefault(str(value), []).append(index)
    return dict(sorted(found.items()))


def numbered(parts: Sequence[Iterable[int]]) -> dict[str, list[int]]:
    """Name parts ``site-1``, ``site-2``, ..., with as many digits as sort well.

    >>> numbered([[2, 1], [0]])
    {'site-1': [1, 2], 'site-2': [0]}
    """
    width = len(str(len(parts)))
    return {f"site-{i:0{width}d}": sorted(int(row) for row in part) for i, part in enumerate(parts, start=1)}


def site_names(values: Iterable[str]) -> dict[str, str]:
    """Map values to distinct names that are valid as file names everywhere.

    >>> site_names(["Hamlet, Prince", "hamlet prince", ""])
    {'Hamlet, Prince': 'Hamlet-Prince', 'hamlet prince': 'hamlet-prince-2', '': 'unnamed'}
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in values:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:90] or "unnamed"
        name, count = stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.casefold())
        names[value] = name
    return names


def at_least_one(**options: int) -> None:
    """Raise JobError for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise JobError(f"partition.{name} must be at least 1, it is {value}.")


def non_empty(split: Mapping[str, Sequence[int]], why: str) -> None:
    """Raise DataError that names the first site without rows; ``why`` says what to change."""
    for site, rows in split.items():
        if not rows:
            raise DataError(f"The partition leaves this site without rows. {why}", site=site)
