# SPDX-License-Identifier: Apache-2.0
"""Every partition: each row goes to exactly one site, names are file names, the seed alone decides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hansa import registry
from hansa.errors import DataError, JobError
from hansa.partition.by_key import by_key
from hansa.partition.dirichlet import dirichlet
from hansa.partition.files import files
from hansa.partition.iid import iid
from hansa.partition.rows import Partition, site_names
from hansa.partition.shards import shards

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Data:
    """Rows whose label and file are given."""

    labels: Sequence[Any]
    sources: Sequence[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, name: str) -> Sequence[Any]:
        if name != "label":
            raise DataError(f"no column {name!r}")
        return self.labels


LABELS = st.lists(st.one_of(st.integers(0, 9), st.text(max_size=5)), min_size=1, max_size=200)
BUILT = st.one_of(
    st.builds(iid, sites=st.integers(1, 8)),
    st.builds(dirichlet, sites=st.integers(1, 5), alpha=st.floats(0.05, 100)),
    st.builds(shards, sites=st.integers(1, 5), per_site=st.integers(1, 3)),
    st.just(by_key("label")),
    st.just(files()),
)


@given(LABELS, BUILT, st.integers(0, 1 << 40))
def test_every_row_goes_to_exactly_one_site(labels: list[Any], split: Partition, seed: int) -> None:
    rows = Data(labels, [f"file {i % 3}" for i in range(len(labels))])
    try:
        parts = split(rows, seed)
    except DataError:
        assume(False)
    assert sorted(row for part in parts.values() for row in part) == list(range(len(labels)))
    assert all(part == sorted(part) and part for part in parts.values())
    assert all(FILE_NAME.fullmatch(site) for site in parts)
    assert parts == split(rows, seed)


@given(st.lists(st.text(max_size=30), unique=True, max_size=30))
def test_site_names_are_distinct_file_names_even_where_case_does_not_count(values: list[str]) -> None:
    names = list(site_names(values).values())
    assert len({name.casefold() for name in names}) == len(values)
    assert all(FILE_NAME.fullmatch(name) for name in names)


@pytest.mark.parametrize("split", [iid(4), dirichlet(4), shards(4)])
def test_the_seed_changes_the_split(split: Partition) -> None:
    rows = Data([i % 5 for i in range(200)])
    assert split(rows, 0) != split(rows, 1)


@given(st.integers(1, 300), st.integers(1, 20))
def test_iid_sizes_differ_by_at_most_one(count: int, sites: int) -> None:
    assume(count >= sites)
    sizes = [len(part) for part in iid(sites)(Data([0] * count), 0).values()]
    assert max(sizes) - min(sizes) <= 1


def test_two_shards_a_site_show_it_at_most_a_few_labels() -> None:
    labels = [i % 10 for i in range(1000)]
    parts = shards(10, per_site=2)(Data(labels), 3)
    assert {len(part) for part in parts.values()} == {100}
    # 20 shards of 50 rows over 10 labels of 100 rows: a shard never crosses a label.
    assert all(len({labels[row] for row in part}) <= 2 for part in parts.values())


def test_dirichlet_follows_its_concentration() -> None:
    labels = [i % 10 for i in range(5000)]

    def spread(alpha: float) -> float:
        parts = dirichlet(10, alpha=alpha)(Data(labels), 0)
        counts = np.array([[Counter(labels[row] for row in part)[k] for k in range(10)] for part in parts.values()])
        return float((counts / counts.sum(0)).std())

    # For Dir(α) over S sites a share's variance is (1/S)(1 − 1/S)/(Sα + 1).
    for alpha in (0.1, 1.0, 100.0):
        expected = (0.1 * 0.9 / (10 * alpha + 1)) ** 0.5
        assert spread(alpha) == pytest.approx(expected, rel=0.25)


def test_dirichlet_keeps_to_the_least_number_of_rows_or_says_that_it_cannot() -> None:
    rows = Data([i % 3 for i in range(300)])
    assert min(len(part) for part in dirichlet(5, alpha=0.5, min_rows=10)(rows, 0).values()) >= 10
    with pytest.raises(DataError, match=r"site site-\d+: .* fewer than 61 of the 300 rows"):
        dirichlet(5, min_rows=61)(rows, 0)


def test_by_key_keeps_the_largest_values_and_their_names() -> None:
    rows = Data(["Hamlet, Prince"] * 3 + ["Ghost"] * 2 + ["Page"])
    assert by_key("label", sites=2)(rows, 0) == {"Ghost": [3, 4], "Hamlet-Prince": [0, 1, 2]}
    assert by_key("label", min_rows=3)(rows, 0) == {"Hamlet-Prince": [0, 1, 2]}
    with pytest.raises(DataError, match="has 2 values with at least 2 rows; 3 are needed"):
        by_key("label", sites=3, min_rows=2)(rows, 0)


def test_files_makes_a_site_of_each_file() -> None:
    assert files()(Data([1, 2, 3], ["berlin", "ulm", "berlin"]), 0) == {"berlin": [0, 2], "ulm": [1]}


@pytest.mark.parametrize("value", [None, ["a", "list"]])
def test_a_key_that_is_no_key_is_refused_by_row(value: Any) -> None:
    with pytest.raises(DataError, match="Row 2 has"):
        by_key("label")(Data(["a", value]), 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iid", {"sites": 0}, "partition.sites must be at least 1"),
        ("iid", {}, "needs the option 'sites'"),
        ("iid", {"sitez": 3}, "Did you mean 'sites'"),
        ("dirichlet", {"sites": 3, "alpha": 0}, "partition.alpha must be positive"),
        ("dirichlet", {"sites": 3, "alpha": "low"}, "alpha"),
        ("shards", {"sites": 2, "per_site": 0}, "partition.per_site must be at least 1"),
        ("by_key", {"key": "x", "sites": 0}, "partition.sites must be at least 1"),
        ("dirichelt", {}, "Did you mean 'dirichlet'"),
    ],
)
def test_bad_options_say_which(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        registry.build("partitions", name, options)


@pytest.mark.parametrize("split", [iid(5), shards(3)])
def test_more_sites_than_rows_names_a_site_without_rows(split: Partition) -> None:
    with pytest.raises(DataError, match=r"site site-\d: .*without rows"):
        split(Data([0, 1]), 0)


def test_a_file_per_partition() -> None:
    folder = Path(registry.load("partitions", "iid").__code__.co_filename).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "rows"}
    assert modules == set(registry.TABLES["partitions"])
