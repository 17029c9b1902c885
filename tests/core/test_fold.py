# SPDX-License-Identifier: Apache-2.0
"""The streaming sum: the same bits whatever the arrival, in float32 whatever the dtype, nothing bad ever added."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core import fold as folds
from hansa.core import shared as sharing
from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.fold import Fold
from hansa.core.values import Aggregate, Update
from hansa.errors import NonFiniteError, StorageError, WireError

SITES = ["berlin", "hamburg", "luebeck", "riga", "tallinn", "visby"]
BF16 = np.dtype(ml_dtypes.bfloat16)


def update(site: str, tensors: Any, weight: float = 1.0, **sums: float) -> Update:
    return Update(site, 1, 0, {"delta": tensors}, weight, sums)


def random_updates(dtype: Any = np.float32, size: int = 1000, seed: int = 0) -> list[Update]:
    """Values of very different sizes, so that every other order of addition gives other bits."""
    rng = np.random.default_rng(seed)
    return [
        update(
            site,
            {"w": (rng.normal(size=size) * 10.0 ** rng.integers(-3, 3, size)).astype(dtype), "b": np.ones(1, dtype)},
            weight=float(rng.uniform(0.1, 2)),
            loss=float(rng.normal()),
        )
        for site in SITES
    ]


def new_fold(like: Update, directory: Path | None = None, order: list[str] | None = None) -> Fold:
    return Fold(order or SITES, like.header.layout, {"delta": True}, len(SITES), directory)


def fold_all(updates: list[Update], directory: Path | None = None, order: list[str] | None = None) -> Aggregate:
    folding = new_fold(updates[0], directory, order)
    for item in updates:
        folding.add(item)
    total = folding.close()
    folding.discard()
    return total


def bits(aggregate: Aggregate) -> Any:
    sums = {p: {n: (v.dtype.name, v.tobytes()) for n, v in t.items()} for p, t in aggregate.sums.items()}
    return sums, aggregate.weight, aggregate.count, aggregate.metrics


# --- order ---------------------------------------------------------------------------------------------------


@given(st.permutations(range(len(SITES))))
def test_every_order_of_arrival_gives_the_same_bits(order: list[int]) -> None:
    updates = random_updates()
    assert bits(fold_all([updates[i] for i in order])) == bits(fold_all(updates))


@given(st.permutations(range(len(SITES))), st.sets(st.integers(0, len(SITES) - 1)), st.randoms())
def test_the_bits_depend_on_the_accepted_set_alone(order: list[int], gone: set[int], chance: Any) -> None:
    """Sites that are skipped, at any time or never, leave the sum of the others as if they had not been asked."""
    updates = random_updates()
    folding = new_fold(updates[0])
    for i in order:
        if i not in gone:
            folding.add(updates[i])
        elif chance.random() < 0.5:
            folding.skip(SITES[i])
    got = folding.close()
    folding.discard()
    left = [u for i, u in enumerate(updates) if i not in gone]
    if left:
        assert bits(got) == bits(fold_all(left, order=[u.site for u in left]))
    else:
        assert bits(got) == ({}, 0.0, 0.0, {})


def test_the_sum_is_the_plain_sum_in_site_order() -> None:
    updates = random_updates()
    plain = {name: np.zeros(leaf.shape, np.float32) for name, leaf in updates[0].parts["delta"].items()}
    for item in updates:
        for name, leaf in item.parts["delta"].items():
            plain[name] = plain[name] + leaf
    got = fold_all(updates[::-1])
    for name, leaf in plain.items():
        assert got.sums["delta"][name].tobytes() == leaf.tobytes()
    backwards = sum((u.parts["delta"]["w"] for u in updates[::-1]), np.float32(0))
    assert got.sums["delta"]["w"].tobytes() != backwards.tobytes(), "this data can't tell one order from another"


@given(st.permutations(range(len(SITES))))
@settings(max_examples=10)
def test_spooled_updates_give_the_bits_of_updates_in_memory(tmp_path_factory: Any, order: list[int]) -> None:
    folder = tmp_path_factory.mktemp("spool")
    updates = random_updates()
    folding = new_fold(updates[0])
    for i in order:
        folding.add(wire.spool(updates[i], folder / SITES[i]))
    assert bits(folding.close()) == bits(fold_all(updates))
    folding.discard()
    assert not [*folder.iterdir()], "an update is freed when it has been added"


# --- dtypes --------------------------------------------------------------------------------------------------


def test_a_thousand_half_precision_updates_do_not_drift() -> None:
    """0.1 in fp16 is 0.09998; adding a thousand of them in fp16 gives a mean of 0.1058."""
    sites = [f"site-{i:04d}" for i in range(1000)]
    folding = Fold(sites, update("x", {"w": np.zeros(1, np.float16)}).header.layout, {"delta": False}, 1000)
    for site in sites:
        folding.add(update(site, {"w": np.full(1, 0.1, np.float16)}))
    mean = folding.close().mean("delta")["w"]
    assert mean.dtype == np.float32
    assert mean[0] == pytest.approx(float(np.float16(0.1)), abs=1e-6)
    assert round(float(mean[0]), 5) == 0.09998


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_half_precision_is_added_exactly_as_float32(dtype: Any) -> None:
    updates = random_updates(dtype)
    reference = np.zeros(1000, np.float32)
    for item in updates:
        reference += item.parts["delta"]["w"].astype(np.float32)
    got = fold_all(updates).sums["delta"]["w"]
    assert got.dtype == np.float32
    assert got.tobytes() == reference.tobytes()
    half = np.zeros(1000, dtype)
    for item in updates:
        half = (half + item.parts["delta"]["w"]).astype(dtype)
    assert np.abs(half.astype(np.float32) - reference).max() > 1e-3, "this data can't tell half from float32"


def test_eight_bfloat16_clients_average_to_the_float32_mean() -> None:
    rng = np.random.default_rng(3)
    values = [rng.normal(size=4096).astype(BF16) for _ in range(8)]
    sites = [f"s{i}" for i in range(8)]
    updates = [update(site, {"w": leaf}) for site, leaf in zip(sites, values, strict=True)]
    mean = fold_all(updates, order=sites).mean("delta")["w"]
    exact = np.mean([leaf.astype(np.float64) for leaf in values], axis=0)
    assert np.abs(mean - exact).max() < 1e-6


def test_float64_stays_float64_whatever_is_sent() -> None:
    layout = update("x", {"w": np.zeros(3)}).header.layout
    for dtype in (np.float64, np.float32, np.float16):
        folding = Fold(["a", "b"], layout, {"delta": False}, 2)
        folding.add(update("a", {"w": np.full(3, 1e-17, np.float64)}))
        folding.add(update("b", {"w": np.ones(3, dtype)}))
        total = folding.close().sums["delta"]["w"]
        assert total.dtype == np.float64


def test_the_model_decides_the_dtype_of_the_sum_not_whoever_comes_first() -> None:
    layout = update("x", {"w": np.zeros(3, np.float32)}).header.layout
    folding = Fold(["a", "b"], layout, {"delta": False}, 2)
    folding.add(update("a", {"w": np.ones(3, np.float64)}))
    folding.add(update("b", {"w": np.ones(3, BF16)}))
    total = folding.close().sums["delta"]["w"]
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, [2, 2, 2])


# --- what is rejected ----------------------------------------------------------------------------------------


def ruined(item: Update, how: str) -> Update:
    tree = dict(item.parts["delta"])
    weight, sums = item.weight, dict(item.sums)
    match how:
        case "NaN" | "infinity":
            tree["w"] = tree["w"].copy()
            tree["w"][-1] = math.nan if how == "NaN" else -math.inf
        case "opposite infinities":
            tree["w"] = tree["w"].copy()
            tree["w"][:2] = math.inf, -math.inf
        case "another shape":
            tree["w"] = tree["w"].reshape(2, -1)
        case "too short":
            tree["w"] = tree["w"][:-1]
        case "missing":
            del tree["b"]
        case "extra":
            tree["c"] = tree["b"]
        case "integers":
            tree["w"] = tree["w"].astype(np.int32)
        case "too large for the sum":
            tree["w"] = np.full(tree["w"].shape, 1e300)
        case "weight 0":
            weight = 0.0
        case "weight -1":
            weight = -1.0
        case "weight NaN":
            weight = math.nan
        case "weight infinite":
            weight = math.inf
        case "weight beyond float32":
            weight = 1e39
        case "weight below float32":
            weight = 1e-39
        case "metric NaN":
            sums["loss"] = math.nan
        case "another part":
            return Update(item.site, 1, 0, {"gamma": tree}, weight, sums)
        case "one more part":
            return Update(item.site, 1, 0, {"delta": tree, "gamma": tree}, weight, sums)
        case "no part":
            return Update(item.site, 1, 0, {}, weight, sums)
    return Update(item.site, 1, 0, {"delta": tree}, weight, sums)


NOT_FINITE = [
    "NaN",
    "infinity",
    "opposite infinities",
    "too large for the sum",
    "weight 0",
    "weight -1",
    "weight NaN",
    "weight infinite",
    "weight beyond float32",
    "weight below float32",
    "metric NaN",
]
MISFIT = ["another shape", "too short", "missing", "extra", "integers", "another part", "one more part", "no part"]


@pytest.mark.parametrize("how", NOT_FINITE + MISFIT)
@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize("early", [False, True])
def test_a_bad_update_leaves_the_sum_as_it_would_be_without_it(how: str, place: int, early: bool) -> None:
    updates = random_updates(size=3000)
    arrivals = list(range(len(SITES)))
    if early:
        arrivals.remove(place)
        arrivals.insert(0, place)
    folding = new_fold(updates[0])
    for i in arrivals:
        if i == place:
            expected = NonFiniteError if how in NOT_FINITE else WireError
            with pytest.raises(expected) as caught:
                folding.add(ruined(updates[i], how))
            assert type(caught.value) is expected
            assert (caught.value.site, caught.value.round) == (SITES[i], 1)
            folding.skip(SITES[i])
        else:
            folding.add(updates[i])
    others = [u for i, u in enumerate(updates) if i != place]
    assert bits(folding.close()) == bits(fold_all(others, order=[u.site for u in others]))
    folding.discard()


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_are_seen_in_every_dtype_and_chunk(dtype: Any, bad: float) -> None:
    leaf = np.zeros(trees.BLOCK + 5, dtype)
    leaf[-1] = bad
    folding = new_fold(update("berlin", {"w": leaf}))
    with pytest.raises(NonFiniteError, match="Tensor 'w' of 'delta'"):
        folding.add(update("berlin", {"w": leaf}))
    assert folding.close().count == 0


def test_a_bad_update_may_be_sent_again() -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    with pytest.raises(NonFiniteError):
        folding.add(ruined(updates[0], "NaN"))
    for item in updates:
        folding.add(item)
    assert bits(folding.close()) == bits(fold_all(updates))


@pytest.mark.parametrize("first", ["folded", "waiting"])
def test_a_site_answers_once(first: str) -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    twice = updates[0] if first == "folded" else updates[3]
    folding.add(twice)
    with pytest.raises(WireError, match="has answered already"):
        folding.add(twice)
    for item in updates:
        if item is not twice:
            folding.add(item)
    assert bits(folding.close()) == bits(fold_all(updates))
    folding.discard()


@pytest.mark.parametrize("site", ["berlin", "riga"])
def test_a_site_that_was_given_up_on_is_told_so(site: str) -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    folding.skip(site)
    with pytest.raises(WireError, match="given up on"):
        folding.add(updates[SITES.index(site)])


def test_a_site_that_was_not_asked_is_refused() -> None:
    folding = new_fold(random_updates()[0])
    with pytest.raises(WireError, match="not asked"):
        folding.add(update("../novgorod", random_updates()[0].parts["delta"]))
    folding.skip("novgorod")
    assert folding.close().count == 0


def test_giving_up_on_a_site_that_has_answered_changes_nothing() -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    for item in [*updates[3:], *updates[:3]]:
        folding.add(item)
        folding.skip(item.site)
    assert bits(folding.close()) == bits(fold_all(updates))
    folding.discard()


def test_a_damaged_spooled_update_is_rejected_before_anything_is_added(tmp_path: Path) -> None:
    updates = random_updates(size=3000)
    handle = wire.spool(updates[0], tmp_path / "u")
    data = bytearray(handle.path.read_bytes())
    data[-1] ^= 1  # the last byte of the last tensor
    handle.path.write_bytes(data)
    folding = new_fold(updates[0])
    with pytest.raises(WireError, match="damaged"):
        folding.add(handle)
    assert handle.path.exists(), "a rejected update stays the caller's"
    folding.skip("berlin")
    for item in updates[1:]:
        folding.add(item)
    assert bits(folding.close()) == bits(fold_all(updates[1:], order=SITES[1:]))
    folding.discard()


def test_an_update_that_changes_while_it_waits_ends_the_round(tmp_path: Path) -> None:
    """Half of it may be in the sum by then, so it is no longer one site's fault."""
    updates = random_updates(size=3000)
    folding = new_fold(updates[0])
    handle = wire.spool(updates[1], tmp_path / "u")
    folding.add(handle)
    data = bytearray(handle.path.read_bytes())
    data[-1] ^= 1
    handle.path.write_bytes(data)
    folding.add(updates[0])
    with pytest.raises(StorageError, match=r"site hamburg, round 1: .*changed while it waited.*Resume the run"):
        folding.close()


def test_a_sum_that_overflows_is_an_error_and_no_infinite_model() -> None:
    folding = new_fold(update("x", {"w": np.zeros(2, np.float32)}))
    for site in SITES[:2]:
        folding.add(update(site, {"w": np.full(2, 3e38, np.float32)}))
    with pytest.raises(NonFiniteError, match="overflows in tensor 'w' of 'delta'"):
        folding.close()
    folding = new_fold(update("x", {"w": np.zeros(2, np.float32)}))
    for site in SITES[:2]:
        folding.add(update(site, {"w": np.ones(2, np.float32)}, weight=3e38))
    with pytest.raises(NonFiniteError, match="weights overflows"):
        folding.close()


# --- weights, discounts, metrics -----------------------------------------------------------------------------


def test_weights_and_metrics_are_added_up() -> None:
    updates = random_updates()
    total = fold_all(updates[::-1])
    assert total.weight == pytest.approx(sum(u.weight for u in updates))
    assert total.count == len(SITES)
    assert total.population == len(SITES)
    assert total.metrics["loss"] == pytest.approx(sum(u.sums["loss"] for u in updates))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64], ids=str)
@pytest.mark.parametrize("weighed", [True, False])
def test_a_stale_update_and_its_weight_count_for_less(dtype: Any, weighed: bool) -> None:
    fresh, stale = np.arange(4).astype(dtype), np.ones(4, dtype)
    folding = Fold(SITES, update("x", {"w": np.zeros(4, dtype)}).header.layout, {"delta": weighed}, len(SITES))
    folding.add(update("hamburg", {"w": stale}, weight=3.0), discount=0.5)
    folding.add(update("berlin", {"w": fresh}, weight=1.0))
    total = folding.close()
    folding.discard()
    assert (total.weight, total.count) == (1 + 0.5 * 3, 1.5)
    expected = (np.arange(4) + 0.5) / (2.5 if weighed else 1.5)
    np.testing.assert_allclose(total.mean("delta")["w"], expected, rtol=1e-6)
    np.testing.assert_array_equal(stale, np.ones(4, dtype))


def test_an_update_is_not_changed_by_being_added() -> None:
    updates = random_updates()
    before = [u.parts["delta"]["w"].copy() for u in updates]
    fold_all(updates[::-1])
    for item, leaf in zip(updates, before, strict=True):
        np.testing.assert_array_equal(item.parts["delta"]["w"], leaf)


def test_scalars_and_empty_tensors() -> None:
    tensors = {"scalar": np.float32(2).reshape(()), "empty": np.zeros((0, 3), np.float32)}
    total = fold_all([update("berlin", tensors), update("riga", tensors)])
    assert total.sums["delta"]["scalar"].shape == ()
    assert total.sums["delta"]["scalar"] == 4
    assert total.sums["delta"]["empty"].shape == (0, 3)


# --- disk and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float64], ids=str)
def test_mapped_accumulators_give_the_bits_of_those_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Any
) -> None:
    updates = random_updates(dtype)
    expected = bits(fold_all(updates))
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    folding = new_fold(updates[0], tmp_path)
    for item in updates:
        folding.add(item)
    assert [path.name for path in tmp_path.iterdir()] == ["accumulator-0.bin"]
    total = folding.close()
    assert bits(total) == expected
    assert [*total.sums["delta"]] == ["w", "b"]
    folding.discard()
    assert not [*tmp_path.iterdir()]
    assert bits(total) == expected, "the sum outlives its file"


def test_mixed_widths_in_one_mapped_accumulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {"a": np.float32([1.5]), "b": np.arange(3.0), "c": np.float16([2.0]), "d": np.full(2, 7.0)}
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    total = fold_all([update("berlin", tensors), update("riga", tensors)], tmp_path)
    for name, leaf in tensors.items():
        np.testing.assert_array_equal(total.sums["delta"][name], leaf * 2)
        assert total.sums["delta"][name].flags.aligned


def test_early_updates_wait_on_disk_and_are_gone_when_added(tmp_path: Path) -> None:
    updates = random_updates()
    folding = new_fold(updates[0], tmp_path)
    for waiting, item in enumerate(updates[:0:-1], start=1):
        folding.add(item)
        assert len([*tmp_path.iterdir()]) == waiting
    folding.add(updates[0])
    assert len([*tmp_path.iterdir()]) < folds.TOGETHER
    assert bits(folding.close()) == bits(fold_all(updates))
    assert not [*tmp_path.iterdir()]


def test_early_updates_are_gone_after_close_too(tmp_path: Path) -> None:
    updates = random_updates()
    folding = new_fold(updates[0], tmp_path)
    folding.add(updates[4])
    folding.add(updates[2])
    assert len([*tmp_path.iterdir()]) == 2
    total = folding.close()
    assert total.count == 2
    assert not [*tmp_path.iterdir()]


def test_discard_frees_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    updates = random_updates()
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    folding = new_fold(updates[0], tmp_path)
    spooled = wire.spool(updates[3], tmp_path / "theirs")
    for item in (updates[0], updates[2], spooled):
        folding.add(item)
    assert len([*tmp_path.iterdir()]) == 3
    folding.discard()
    folding.discard()
    assert not [*tmp_path.iterdir()]


def test_a_fold_of_its_own_folder_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folds.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    updates = random_updates()
    folding = new_fold(updates[0])
    for item in (updates[0], updates[2]):
        folding.add(item)
    assert len([*tmp_path.rglob("*")]) == 3
    folding.discard()
    assert not [*tmp_path.iterdir()]


def test_a_part_named_like_a_path_stays_inside_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    inner = tmp_path / "inner"
    inner.mkdir()
    item = Update("berlin", 1, 0, {"../x/y": {"w": np.ones(3)}}, 1.0, {})
    folding = Fold(["berlin"], item.header.layout, {"../x/y": False}, 1, inner)
    folding.add(item)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    folding.discard()


def in_child(code: str, *arguments: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system can't claim disk space")
def test_the_blocks_of_an_accumulator_are_claimed_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So a disk that is too full says so before anything is added, and a round is not half done."""
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    layout = update("x", {"w": np.zeros(3 << 18, np.float32)}).header.layout["delta"]
    begun = folds._Sum(layout, {"w": np.dtype(np.float32)}, tmp_path / "a")
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3 << 20
    assert not begun.read("w", 0, 1000).any()
    begun.close()


@pytest.mark.parametrize("count", [1, folds.TOGETHER - 1, folds.TOGETHER, folds.TOGETHER + 1, 3 * folds.TOGETHER])
@pytest.mark.parametrize("mapped", [False, True])
def test_updates_on_disk_are_added_several_at_a_time_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, mapped: bool
) -> None:
    rng = np.random.default_rng(7)
    sites = [f"s{i:02d}" for i in range(count)]
    sizes = {"w": trees.BLOCK + 5, "b": 1}
    updates = [
        update(site, {n: (rng.normal(size=k) * 10.0 ** rng.integers(-3, 3, k)).astype(BF16) for n, k in sizes.items()})
        for site in sites
    ]
    expected = bits(fold_all(updates, order=sites))
    monkeypatch.setattr(folds, "MAP_BYTES", 0 if mapped else 1 << 30)
    folding = new_fold(updates[0], tmp_path / "work", order=sites)
    (tmp_path / "work").mkdir()
    for item in updates[::-1] if mapped else updates:
        folding.add(wire.spool(item, tmp_path / item.site))
    total = folding.close()
    assert bits(total) == expected
    assert total.count == count
    assert [path.name for path in tmp_path.iterdir()] == ["work"], "what has been added is freed"
    folding.discard()
    assert {path.name for path in (tmp_path / "work").iterdir()} <= {storage.SPARES}


def test_two_processors_add_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    sites = [f"s{i}" for i in range(6)]
    updates = [
        update(s, {"w": rng.normal(size=5 * trees.BLOCK + 7).astype(np.float32), "b": np.ones(3)}) for s in sites
    ]
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(sharing, "_count", lambda threads=threads: threads)
        folding = new_fold(updates[0], tmp_path, order=sites)
        for item in updates:
            folding.add(wire.spool(item, tmp_path / item.site))
        found.append(bits(folding.close()))
        folding.discard()
    assert found[0] == found[1] == bits(fold_all(updates, order=sites))


def test_an_update_that_is_about_to_be_added_has_answered(tmp_path: Path) -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    folding.add(wire.spool(updates[0], tmp_path / "u"))
    with pytest.raises(WireError, match="has answered already"):
        folding.add(updates[0])
    folding.skip(updates[0].site)
    assert folding.close().count == 1
    folding.discard()


def test_discard_frees_what_is_about_to_be_added(tmp_path: Path) -> None:
    updates = random_updates()
    folding = new_fold(updates[0])
    folding.add(wire.spool(updates[0], tmp_path / "u"))
    folding.discard()
    assert not [*tmp_path.iterdir()]


def test_a_disk_too_full_for_the_accumulator_is_an_error_before_it_is_used(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hansa.core import fold
from hansa.core.values import Update
from hansa.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fold.MAP_BYTES = 0
item = Update("a", 1, 0, {"delta": {"w": np.zeros(1_000_000, np.float32)}}, 1.0, {})
folding = fold.Fold(["a"], item.header.layout, {"delta": False}, 1, Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    folding.add(item)
except StorageError as error:
    print(error)
"""
    assert "Can't keep a sum of 4000000 bytes" in in_child(code, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    """A 64 MiB model, updates spooled by someone else: what counts is the anonymous memory of the folding process."""
    writer = """
import sys
from pathlib import Path
import numpy as np
from hansa.core import wire
from hansa.core.values import Update
tree = {f"w{i}": np.full(1 << 20, 0.5, np.float32) for i in range(16)}
wire.spool(Update("s00", 1, 0, {"delta": tree}, 1.0, {}), Path(sys.argv[1]))
"""
    folder = """
import os, sys
from dataclasses import replace
from pathlib import Path
from hansa.core import wire
from hansa.core.fold import Fold

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

number, source = int(sys.argv[1]), Path(sys.argv[2])
sites = [f"s{i:02d}" for i in range(number)]

class Again(wire.Spooled):
    def __init__(self, site):
        super().__init__(source)
        self._header = replace(self._header, site=site)
    def release(self):
        pass

folding = Fold(sites, wire.Spooled(source).header.layout, {"delta": False}, number, source.parent)
before = anonymous()
peak = 0
for site in sites[1:] + sites[:1]:
    folding.add(Again(site))
    peak = max(peak, anonymous())
assert folding.close().sums["delta"]["w3"][0] == number / 2
folding.discard()
print(peak - before)
"""
    in_child(writer, tmp_path / "update")
    few, many = (int(in_child(folder, number, tmp_path / "update")) for number in (2, 16))
    model = 64 << 20
    assert few < 1.25 * model
    assert many - few < model / 8
