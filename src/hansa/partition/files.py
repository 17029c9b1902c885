# SPDX-License-Identifier: Apache-2.0
"""One site for each input file, named after it: the data of a real federation, lying side by side."""

from __future__ import annotations

from hansa.partition.rows import Partition, Rows, site_names


def files() -> Partition:
    """Return a partition by the file that each row came from."""

    def split(rows: Rows, seed: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, source in enumerate(rows.sources):
            found.setdefault(source, []).append(index)
        names = site_names(sorted(found))
        return {name: found[source] for source, name in names.items()}

    return split
