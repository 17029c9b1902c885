# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from hansa.errors import PrivacyError
from hansa.secagg.graph import COMPLETE, LEAST, Graph, Shape, shape


def members(count: int) -> list[str]:
    return [f"s{number}" for number in range(count)]


def neighbours(names: list[str], seed: bytes, degree: int) -> dict[str, tuple[str, ...]]:
    graph = Graph(names, seed, degree)
    return {name: graph.neighbours(name) for name in names}


@pytest.mark.parametrize("count", [3, 4, 7, COMPLETE, COMPLETE + 1, 100, 1000])
def test_a_graph_is_regular_mutual_and_the_same_for_all(count: int) -> None:
    found = shape(count, count, 0.2, 0.1)
    graph = neighbours(members(count), b"seed", found.degree)
    assert graph == neighbours(members(count)[::-1], b"seed", found.degree)
    for name, peers in graph.items():
        assert len(set(peers)) == len(peers) == found.degree
        assert name not in peers
        assert all(name in graph[peer] for peer in peers)
    assert (found.degree == count - 1) == (count <= COMPLETE)


def test_another_seed_is_another_graph() -> None:
    one, two = (neighbours(members(200), seed, 60) for seed in (b"1", b"2"))
    shared = np.mean([len(set(one[name]) & set(two[name])) for name in one])
    assert 60 * 60 / 199 - 3 < shared < 60 * 60 / 199 + 3


@pytest.mark.parametrize("count", [3, 5, 10, 64, 100, 500, 1000])
@pytest.mark.parametrize("corrupt", [0, 0.1, 0.2])
def test_no_two_sets_can_be_signed_and_no_site_opened_both_ways(count: int, corrupt: float) -> None:
    found = shape(count, count, corrupt, 0.1)
    bad = math.floor(corrupt * count)
    assert 2 * found.quorum - bad > count
    assert found.quorum >= LEAST
    assert 2 * found.threshold - found.corrupt > found.degree + 1
    assert found.threshold <= found.degree + 1
    assert found.quorum <= count


def test_the_numbers_for_ten_sites_let_three_drop_out() -> None:
    assert shape(10, 10, 0.2, 0.1) == Shape(degree=9, corrupt=2, threshold=7, quorum=7)


def test_the_stated_probabilities_hold_in_a_trial_where_they_can_be_seen() -> None:
    """Counts of corrupt and of dropped neighbours, against the bounds, over 300 graphs of 200 sites."""
    found = shape(200, 200, 0.1, 0.1)
    rng = np.random.default_rng(0)
    names = members(200)
    worst_corrupt = worst_left = 0
    for trial in range(300):
        graph = neighbours(names, trial.to_bytes(4), found.degree)
        bad, gone = (set(rng.choice(names, 20, replace=False)) for _ in range(2))
        worst_corrupt = max(worst_corrupt, *(len(bad & set(peers)) for peers in graph.values()))
        worst_left = max(worst_left, *(len(gone & set(peers)) for peers in graph.values()))
    assert 6 < worst_corrupt <= found.corrupt  # 6 is the mean: the bound is a tail that was looked at
    assert 6 < worst_left <= found.degree - found.threshold


def test_sites_left_out_do_not_lower_the_quorum() -> None:
    assert shape(70, 100, 0.2, 0.1).quorum == shape(100, 100, 0.2, 0.1).quorum == 61
    with pytest.raises(PrivacyError, match=r"Of 100 sites 60 take part; a secure sum needs 61"):
        shape(60, 100, 0.2, 0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_two_sites_are_never_summed(count: int) -> None:
    for minimum in (1, LEAST):
        with pytest.raises(PrivacyError, match="needs 3"):
            shape(count, count, 0, 0, minimum)


def test_shares_that_no_sparse_graph_serves() -> None:
    assert shape(100, 100, 0.3, 0.45).degree == 99
    with pytest.raises(PrivacyError, match="No graph with 1024 neighbours protects 2000 sites"):
        shape(2000, 2000, 0.3, 0.45)
