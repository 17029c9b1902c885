# SPDX-License-Identifier: Apache-2.0
"""Trees: dtypes, arithmetic, norms, and what is told of non-finite values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hansa.core import tree as trees
from hansa.core.values import Aggregate, Model

BF16 = trees.dtype_of("bfloat16")
FLOATS = {"float64", "float32", "float16", "bfloat16"}


@pytest.mark.parametrize("name", trees.dtype_names())
def test_dtypes(name: str) -> None:
    dtype = trees.dtype_of(name)
    assert dtype.name == name
    assert trees.is_floating(dtype) == (name in FLOATS)
    if name in FLOATS:
        assert trees.wide(dtype) == (np.float64 if name == "float64" else np.float32)
    spec = trees.layout_of({"w": np.zeros((2, 3), dtype)})["w"]
    assert (spec.dtype, spec.shape, spec.size, spec.num_bytes) == (name, (2, 3), 6, 6 * dtype.itemsize)


def test_arithmetic_serves_numpy_and_torch() -> None:
    for make in (np.array, torch.tensor):
        a, b = {"w": make([1.0, 2.0])}, {"w": make([3.0, 5.0])}
        assert trees.add(a, b)["w"].tolist() == [4, 7]
        assert trees.subtract(a, b)["w"].tolist() == [-2, -3]
        assert trees.scale(a, 0.5)["w"].tolist() == [0.5, 1]


def test_integers_are_no_part_of_what_is_averaged() -> None:
    tree = {"w": np.ones(1, BF16), "steps": np.ones(1, np.int64), "mask": np.ones(1, bool), "h": np.ones(1, np.float16)}
    assert [*trees.floating(tree)] == ["w", "h"]
    wide = trees.widen(tree)
    assert [leaf.dtype.name for leaf in wide.values()] == ["float32", "int64", "bool", "float32"]
    assert wide["steps"] is tree["steps"]
    back = trees.cast(wide, {"w": "bfloat16", "h": "float16"})
    assert [leaf.dtype for leaf in back.values()] == [leaf.dtype for leaf in tree.values()]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16], ids=str)
def test_norm_is_joint_and_over_floating_leaves(dtype: np.dtype) -> None:
    tree = {"a": np.full((2, 2), 1.5, dtype), "b": np.array(4.0, dtype), "n": np.array([1000])}
    assert trees.norm(tree) == 5.0
    assert trees.norm({}) == 0.0


def test_norm_of_large_half_precision_leaves_neither_overflows_nor_stalls() -> None:
    leaf = np.full(2 * trees.BLOCK + 3, 200, np.float16)
    assert trees.norm({"w": leaf}) == pytest.approx(200 * math.sqrt(leaf.size), rel=1e-12)


def test_norm_has_the_same_bits_whatever_the_order_of_tensors() -> None:
    """A tree that was sent or loaded has another order than one that was not; its clipping must not differ."""
    rng = np.random.default_rng(0)
    tree = {f"w{i}": rng.normal(size=100) * 10.0 ** rng.integers(-8, 8) for i in range(20)}
    shuffled = [dict(rng.permutation(np.array([*tree.items()], dtype=object)).tolist()) for _ in range(20)]
    assert {trees.norm(other) for other in shuffled} == {trees.norm(tree)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_leaf_is_named(dtype: np.dtype, bad: float) -> None:
    tree = {"n": np.array([1]), "a": np.zeros(3, dtype), "b": np.zeros(trees.BLOCK + 2, dtype)}
    assert trees.first_non_finite(tree) is None
    tree["b"][-1] = bad
    assert trees.first_non_finite(tree) == "b"


def test_blocks_cover_a_leaf_once() -> None:
    leaf = np.arange(2 * trees.BLOCK + 5)
    pieces = [*trees.blocks(leaf)]
    assert [start for start, _ in pieces] == [0, trees.BLOCK, 2 * trees.BLOCK]
    np.testing.assert_array_equal(np.concatenate([values for _, values in pieces]), leaf)
    assert all(np.shares_memory(values, leaf) for _, values in pieces)
    assert [*trees.blocks(np.zeros((0, 3)))] == []


def test_a_model_in_half_precision_is_kept_in_float32_and_sent_as_it_was() -> None:
    model = Model.start({"w": np.ones(2, BF16), "n": np.array([3])})
    for _ in range(10):
        model = model.advance({"w": model.params["w"] + np.float32(1e-3)})
    assert model.version == 10
    assert model.params["w"][0] == pytest.approx(1.01), "bfloat16 would still be at 1"
    assert {name: leaf.dtype.name for name, leaf in model.native().items()} == {"w": "bfloat16", "n": "int64"}


def test_a_mean_is_over_weights_or_over_sites() -> None:
    sums = {"delta": {"w": np.float32([6.0])}, "control": {"w": np.float64([6.0])}}
    total = Aggregate(sums, {"delta": True, "control": False}, weight=1.5, count=3, population=9)
    assert total.mean("delta")["w"] == [4.0]
    assert total.mean("control")["w"] == [2.0]
    assert total.mean("delta")["w"].dtype == np.float32
    assert total.mean("control")["w"].dtype == np.float64
