# SPDX-License-Identifier: Apache-2.0
"""Each rule against the plain formula on whole arrays, its breakdown point, and its indifference to order and form."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core import each
from hansa.core import tree as trees
from hansa.core.each import Rows
from hansa.core.stack import Stack
from hansa.core.tree import layout_of
from hansa.core.values import Aggregate, Update
from hansa.errors import NonFiniteError, StorageError, WireError
from hansa.robust.defend import RULES
from hansa.robust.geometric_median import geometric_median
from hansa.robust.krum import krum, multi_krum

SHAPES = {"b": (3,), "empty": (0, 2), "scalar": (), "w": (4, 5)}
SIZE = 24
LEAST = {"mean": 1, "median": 1, "trimmed-mean": 1, "krum": 3, "multi-krum": 3, "geometric-median": 1}


def names(count: int) -> list[str]:
    return [f"s{place:03d}" for place in range(count)]


def tree_of(vector: Any, dtype: Any = np.float32) -> dict[str, Any]:
    """Return a vector of 24 numbers as four tensors."""
    vector, tree = np.asarray(vector), {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        tree[name], vector = vector[:size].astype(dtype).reshape(shape), vector[size:]
    return tree


def flat(tree: Any) -> Any:
    return np.concatenate([np.asarray(tree[name]).reshape(-1) for name in SHAPES])


def updates(rows: Any, dtype: Any = np.float32) -> list[Update]:
    return [
        Update(site, 1, 0, {"delta": tree_of(row, dtype)}, 1.0, {})
        for site, row in zip(names(len(rows)), rows, strict=True)
    ]


def closed(stack: Stack, sent: list[Update]) -> Aggregate:
    for update in sent:
        stack.add(update)
    return stack.close()


def stack_of(name: str, sent: list[Update], malicious: int, **options: Any) -> Stack:
    layout = {"delta": layout_of(sent[0].parts["delta"])}
    sites = sorted(update.site for update in sent)
    return Stack(RULES[name](malicious), sites, layout, len(sites), **options)


def combined(name: str, rows: Any, malicious: int = 0, dtype: Any = np.float32, order: Any = None) -> Any:
    """Return a rule's result on ``rows`` as one vector, and its notes."""
    sent = updates(rows, dtype)
    stack = stack_of(name, sent, malicious)
    total = closed(stack, [sent[place] for place in order] if order is not None else sent)
    result = flat(total.mean("delta"))
    stack.discard()
    return result, total.notes


def dense(name: str, rows: Any, f: int) -> Any:
    """Return what the papers say, on whole arrays of float64."""
    x = np.asarray(rows, np.float64)
    n = len(x)
    if name == "mean":
        return x.mean(0)
    if name == "median":
        return np.median(x, axis=0)
    if name == "trimmed-mean":
        return np.sort(x, axis=0)[f : n - f].mean(0)
    if name == "geometric-median":
        return minimiser(x)
    scores = [
        sum(sorted(float(np.sum((a - b) ** 2)) for j, b in enumerate(x) if j != i)[: n - f - 2])
        for i, a in enumerate(x)
    ]
    ranked = sorted(range(n), key=lambda i: (scores[i], i))
    return x[ranked[0]] if name == "krum" else x[sorted(ranked[: n - f])].mean(0)


def minimiser(x: Any) -> Any:
    """Return argmin_v of the sum of distances, by a general optimiser on a smooth form of it."""
    from scipy.optimize import minimize

    def value_and_gradient(v: Any) -> Any:
        apart = v - x
        lengths = np.sqrt(np.sum(apart**2, axis=1) + 1e-18)
        return lengths.sum(), (apart / lengths[:, None]).sum(0)

    return minimize(value_and_gradient, np.median(x, axis=0), jac=True, method="BFGS", options={"gtol": 1e-10}).x


cases = st.tuples(st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**32 - 1))


def drawn(count: int, seed: int) -> Any:
    """Return updates of very different sizes in each coordinate."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, SIZE)) * 10.0 ** rng.integers(-2, 3, SIZE) + rng.normal(size=SIZE)).astype(
        np.float32
    )


# --- against the formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RULES if name != "geometric-median"])
@given(case=cases)
@settings(max_examples=40, deadline=None)
def test_a_rule_gives_what_its_formula_gives(name: str, case: Any) -> None:
    count, f, seed = case
    count = max(count, RULES[name](f).least)
    rows = drawn(count, seed)
    result, _ = combined(name, rows, f)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, dense(name, rows, f), rtol=1e-6, atol=1e-6)


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_the_geometric_median_is_the_minimum_that_an_optimiser_finds(case: Any) -> None:
    count, _, seed = case
    rows = drawn(max(count, 4), seed).astype(np.float64)
    result, _ = combined("geometric-median", rows, dtype=np.float64)

    def objective(v: Any) -> float:
        return float(np.linalg.norm(v - rows, axis=1).sum())

    best = min(objective(minimiser(rows)), *(objective(row) for row in rows))
    assert objective(result) <= best * (1 + 1e-3)


def test_the_geometric_median_of_points_whose_median_is_known() -> None:
    """On a line it is the median, at three corners of 120° apart the centre, and with two points anything between."""
    line = np.zeros((5, SIZE))
    line[:, 3] = [0, 1, 2, 50, 1e6]
    result, _ = combined("geometric-median", line, dtype=np.float64)
    np.testing.assert_allclose(result[3], 2.0, atol=1e-4)
    corners = np.zeros((3, SIZE))
    corners[:, :2] = [[np.cos(angle), np.sin(angle)] for angle in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    result, _ = combined("geometric-median", corners + 7, dtype=np.float64)
    np.testing.assert_allclose(result, np.full(SIZE, 7.0), atol=1e-4)


def test_the_geometric_median_moves_with_a_turn_of_the_space() -> None:
    """Coordinate-wise rules do not: it is the one that has no favourite axes."""
    rows = drawn(9, 3).astype(np.float64)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
    straight, _ = combined("geometric-median", rows, dtype=np.float64)
    turned, _ = combined("geometric-median", rows @ turn, dtype=np.float64)
    np.testing.assert_allclose(turned, straight @ turn, atol=1e-3 * np.abs(rows).max())


# --- breakdown --------------------------------------------------------------------------------------------------

LIES = {
    "far": lambda honest: np.full(SIZE, 1e30),
    "farther": lambda honest: np.full(SIZE, -3e38),
    "turned": lambda honest: -5 * honest.mean(0),
    "hidden": lambda honest: honest.mean(0) - 1.5 * honest.std(0),
    "one coordinate": lambda honest: np.where(np.arange(SIZE) == 3, 1e20, honest.mean(0)),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@given(seed=st.integers(0, 2**32 - 1), f=st.integers(1, 3), more=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_lies_up_to_f_leave_every_coordinate_among_the_honest(
    name: str, lie: str, seed: int, f: int, more: int
) -> None:
    honest = drawn(f + 1 + more, seed)
    rows = [*honest, *[LIES[lie](honest)] * f]
    order = np.random.default_rng(seed).permutation(len(rows))
    result, _ = combined(name, [rows[place] for place in order], f)
    slack = 1e-6 * np.abs(honest).max(0)
    assert (result >= honest.min(0) - slack).all()
    assert (result <= honest.max(0) + slack).all()


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "geometric-median"])
def test_lies_of_a_majority_go_through(name: str) -> None:
    """The breakdown point is where it is said to be: what is promised for n ≥ 2f + 1 does not hold below."""
    honest = drawn(4, 0)
    rows = [*honest, *[np.full(SIZE, 1e6)] * 5]
    result, _ = combined(name, rows, 4 if name == "trimmed-mean" else 2)
    assert (result > 1e5).all()


@pytest.mark.parametrize("lie", ["far", "farther", "turned", "one coordinate"])
@given(seed=st.integers(0, 2**32 - 1), f=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_krum_takes_an_honest_update_and_multi_krum_leaves_lies_out(lie: str, seed: int, f: int) -> None:
    rng = np.random.default_rng(seed)
    honest = (rng.normal(size=SIZE) * 3 + rng.normal(size=(2 * f + 3, SIZE))).astype(np.float32)
    honest[:, 3] += 100  # so that what is turned lies far away
    lies = [LIES[lie](honest) * (1 + 0.1 * number) / 1.5 for number in range(f)]
    rows = [*honest, *lies]
    result, notes = combined("krum", rows, f)
    assert any((result == row).all() for row in honest)
    assert notes["kept"] in names(len(honest))
    result, notes = combined("multi-krum", rows, f)
    assert notes == {"left_out": ", ".join(names(len(rows))[len(honest) :])}
    np.testing.assert_allclose(result, honest.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e2, 1e10, 1e30])
def test_the_geometric_median_stays_near_the_honest_however_far_the_lies(size: float) -> None:
    rng = np.random.default_rng(1)
    honest = rng.normal(size=(7, SIZE)).astype(np.float32)
    result, _ = combined("geometric-median", [*honest, *[np.full(SIZE, size)] * 3], 3)
    spread = np.linalg.norm(honest - honest.mean(0), axis=1).max()
    assert np.linalg.norm(result - honest.mean(0)) < 2 * spread
    mean, _ = combined("mean", [*honest, *[np.full(SIZE, size)] * 3], 3)
    assert np.linalg.norm(mean.astype(np.float64) - honest.mean(0)) > 5 * spread


def test_distances_that_overflow_choose_nobody() -> None:
    honest = drawn(5, 2).astype(np.float64)
    rows = [np.full(SIZE, 1.7e308), *honest, np.full(SIZE, -1.7e308)]
    result, notes = combined("multi-krum", rows, 2, np.float64)
    assert notes["left_out"] == "s000, s006"
    np.testing.assert_allclose(result, honest.mean(0), rtol=1e-12)
    result, _ = combined("geometric-median", rows, 2, np.float64)
    assert np.abs(result).max() < 10 * np.abs(honest).max()


# --- order, form, ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@given(order=st.permutations(range(9)))
@settings(max_examples=15, deadline=None)
def test_the_order_of_arrival_does_not_matter(name: str, order: list[int]) -> None:
    rows = drawn(9, 5)
    expected, notes = combined(name, rows, 3)
    result, same = combined(name, rows, 3, order=order)
    assert result.tobytes() == expected.tobytes()
    assert notes == same


@pytest.mark.parametrize("name", RULES)
def test_who_sends_what_does_not_matter(name: str) -> None:
    rows = drawn(9, 6)
    expected, _ = combined(name, rows, 3)
    for seed in range(5):
        result, _ = combined(name, rows[np.random.default_rng(seed).permutation(9)], 3)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(rows).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_blocks_and_whole_tensors_give_the_same_bits(
    name: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(4).normal(size=(9, SIZE))
    expected, _ = combined(name, rows, 3, dtype)
    assert expected.dtype == (np.float64 if dtype is np.float64 else np.float32)
    monkeypatch.setattr(trees, "LARGE", 0)
    sent = updates(rows, dtype)
    stack = stack_of(name, sent, 3, directory=tmp_path)
    total = closed(stack, sent)
    assert isinstance(total.sums["delta"], trees.Lazy)
    assert flat(total.sums["delta"]).tobytes() == expected.tobytes()
    if name in ("mean", "median", "trimmed-mean"):  # others sum distances block by block
        monkeypatch.setattr(each, "LEAST", 1)
        monkeypatch.setattr(each, "BLOCK", 9)
        again = stack_of(name, sent, 3)
        assert flat(closed(again, sent).sums["delta"]).tobytes() == expected.tobytes()
        again.discard()
    stack.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [3, 4, 8])
def test_equal_updates_give_that_update(name: str, count: int) -> None:
    row = drawn(1, 8)[0]
    result, _ = combined(name, [row] * count)
    np.testing.assert_allclose(result, row, rtol=1e-6)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed-mean", "geometric-median"])
def test_one_update_is_its_own_result(name: str) -> None:
    row = drawn(1, 9)[0]
    result, notes = combined(name, [row])
    np.testing.assert_allclose(result, row, rtol=1e-6)
    assert notes == {}


def test_equal_scores_take_the_first_by_name() -> None:
    rows = np.zeros((4, SIZE))
    rows[:, 0] = [0, 1, 2, 3]  # 1 and 2 are alike
    for order in itertools.permutations(range(4)):
        _, notes = combined("krum", rows, order=order)
        assert notes["kept"] == "s001"


# --- what the fold of each update takes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_too_few_updates_or_none_give_no_result(name: str) -> None:
    least = RULES[name](2).least
    for count in (0, 1, least - 1):
        sent = updates(drawn(least, 0))
        stack = stack_of(name, sent, 2)
        total = closed(stack, sent[:count])
        assert total.sums == {}
        assert total.count == count
        stack.discard()


def test_what_is_not_finite_or_does_not_fit_is_refused_before_it_is_kept() -> None:
    sent = updates(drawn(5, 0))
    stack = stack_of("median", sent, 1, max_norm=1e3)
    broken = {**tree_of(np.ones(SIZE)), "b": np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(NonFiniteError):
        stack.add(Update("s000", 1, 0, {"delta": broken}, 1.0, {}))
    with pytest.raises(WireError, match="lacks tensor"):
        stack.add(Update("s000", 1, 0, {"delta": {"b": np.ones(3, np.float32)}}, 1.0, {}))
    with pytest.raises(NonFiniteError, match="norm"):
        stack.add(Update("s000", 1, 0, {"delta": tree_of(np.full(SIZE, 1e3))}, 1.0, {}))
    stack.skip("s000")
    rest = [Update(u.site, 1, 0, {"delta": tree_of(np.full(SIZE, float(n)))}, 1.0, {}) for n, u in enumerate(sent)][1:]
    np.testing.assert_array_equal(flat(closed(stack, rest).mean("delta")), np.full(SIZE, 2.5, np.float32))
    stack.discard()


@pytest.mark.parametrize("weight", [2.0, 3e38])
def test_metrics_are_added_up_and_no_stated_weight_counts(weight: float) -> None:
    """Two of the largest weights there are would overflow, and end the job."""
    sent = [Update(u.site, 1, 0, u.parts, weight, {"loss": 1.5}) for u in updates(drawn(5, 0))]
    stack = stack_of("median", sent, 1)
    total = closed(stack, sent)
    assert (total.weight, total.metrics) == (5.0, {"loss": 7.5})
    stack.discard()


def test_an_update_that_says_it_started_from_an_older_model_is_refused() -> None:
    sent = updates(drawn(3, 0))
    stack = stack_of("median", sent, 1)
    with pytest.raises(WireError, match="older model"):
        stack.add(sent[0], 0.5)
    stack.discard()


def test_updates_that_can_not_be_read_are_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(10))
    with path.open("rb") as file, pytest.raises(StorageError, match="cut off"):
        list(Rows(file.fileno(), ("s0",), {"delta": layout_of(tree_of(np.ones(SIZE)))}).blocks())


def test_a_full_disk_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = updates(drawn(3, 0))
    stack = stack_of("median", sent, 1)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left"):
        stack.add(sent[0])
    stack.discard()


def test_a_mean_that_overflows_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="overflows"):
        combined("mean", np.full((3, SIZE), 1.7e308), 1, np.float64)


@pytest.mark.parametrize("rule", [krum(2), multi_krum(2), geometric_median(2)])
def test_memory_is_a_few_blocks_whatever_model_and_sites(
    rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "LARGE", 0)

    def peak(sites: int, size: int) -> int:
        layout = {"delta": {"w": trees.Spec("float32", (size,))}}
        stack = Stack(rule, names(sites), layout, sites, tmp_path)
        tracemalloc.start()
        try:
            for place, site in enumerate(names(sites)):
                values = np.full(size, np.float32(place % 5))
                stack.add(Update(site, 1, 0, {"delta": {"w": values}}, 1.0, {}))
                del values
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            (leaf,) = trees.leaves(stack.close().sums["delta"]).values()
            for start in range(0, size, each.BLOCK):
                leaf[start : start + each.BLOCK]
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
            stack.discard()

    small = peak(8, 1 << 19)
    assert small < 4 * (each.BLOCK * 8)
    assert peak(8, 1 << 21) <= 1.1 * small
    assert peak(64, 1 << 19) <= 1.2 * small, "one update is compared with all others, which are nearly as many"
