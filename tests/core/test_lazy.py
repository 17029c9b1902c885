# SPDX-License-Identifier: Apache-2.0
"""Leaves give NumPy's bits and dtypes, a block at a time."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core import lazy
from hansa.core import tree as trees
from hansa.core.lazy import BLOCK, Leaf
from hansa.errors import NonFiniteError

BF16 = trees.dtype_of("bfloat16")
SIZE = BLOCK + 7
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.lt, operator.gt]


def drawn(dtype: Any, seed: int, shape: tuple[int, ...] = (SIZE,)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(dtype)


def assert_same(leaf: Leaf, array: np.ndarray) -> None:
    assert isinstance(leaf, Leaf)
    got = np.asarray(leaf)
    assert (leaf.dtype, leaf.shape, leaf.nbytes) == (array.dtype, array.shape, array.nbytes)
    assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.tuples(*[st.sampled_from([np.float32, np.float64, np.float16, BF16])] * 2),
    steps=st.lists(
        st.tuples(
            st.sampled_from(BINARY[:4]),
            st.sampled_from([2, 0.3, np.float32(0.7), np.array(1.25, np.float32), "other", "array"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_any_expression_has_the_bits_of_whole_arrays(dtypes: Any, steps: Any) -> None:
    array, other = (drawn(dtype, seed, (9, 3)) for seed, dtype in enumerate(dtypes))
    eager, leaf = array, Leaf.of(array)
    with np.errstate(all="ignore"):
        for operation, operand, swapped in steps:
            operands = {"other": (other, Leaf.of(other)), "array": (other, other)}
            whole, part = operands[operand] if isinstance(operand, str) else (operand, operand)
            eager = operation(whole, eager) if swapped else operation(eager, whole)
            leaf = operation(part, leaf) if swapped else operation(leaf, part)
        assert_same(leaf, eager)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16], ids=str)
def test_tensors_of_several_blocks(dtype: Any) -> None:
    a, b = drawn(dtype, 1), drawn(dtype, 2)
    x, y = Leaf.of(a), Leaf.of(b)
    for operation in BINARY:
        assert_same(operation(x, y), operation(a, b))
    assert_same(-x, -a)
    assert_same(x**0.5, a**0.5)
    assert_same((x - y).astype(np.float32), (a - b).astype(np.float32))
    assert (x[3:BLOCK] == a[3:BLOCK]).all()
    assert (x[SIZE - 2 :] == a[-2:]).all()


def test_a_leaf_over_an_array_is_no_copy() -> None:
    array = drawn(np.float32, 0, (2, 3))
    assert np.asarray(Leaf.of(array)) is array
    assert trees.arrays({"w": Leaf.of(array)})["w"] is array
    assert np.array(Leaf.of(array)) is not array


def test_what_is_used_twice_is_computed_once_a_block() -> None:
    read = []

    def values(start: int, stop: int, memo: lazy.Memo) -> np.ndarray:
        read.append(start)
        return np.ones(stop - start, np.float32)

    leaf = Leaf((SIZE,), np.dtype(np.float32), values)
    square = leaf * leaf
    assert_same(square - square * (square < leaf), np.ones(SIZE, np.float32))
    assert read == [0, BLOCK]


def test_nothing_is_computed_before_it_is_read() -> None:
    def values(start: int, stop: int, memo: lazy.Memo) -> np.ndarray:
        raise AssertionError("it was read")

    tree = {"w": Leaf((1 << 40,), np.dtype(np.float32), values)}
    moved = trees.arrays(trees.scale(trees.floating(tree), 2.0))
    assert trees.num_bytes(moved) == 4 << 40
    assert trees.layout_of(moved)["w"] == trees.Spec("float32", (1 << 40,))
    with pytest.raises(AssertionError, match="it was read"):
        trees.norm(moved)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError, match="element by element"):
        Leaf.of(np.ones(3)) + np.ones((3, 1))


def test_numpy_functions_do_not_take_a_leaf_for_a_number() -> None:
    with pytest.raises(TypeError):
        np.exp(Leaf.of(np.ones(3)))
    assert np.exp(np.asarray(Leaf.of(np.zeros(3)))).tolist() == [1, 1, 1]


def test_small_trees_and_numbers_stay_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"w": np.ones(3), "n": np.array(2.0)}
    assert trees.lazily(tree) is tree
    monkeypatch.setattr(trees, "LARGE", 0)
    held = trees.lazily(tree)
    assert isinstance(held["w"], Leaf)
    assert held["n"] is tree["n"]
    again = trees.lazily(trees.Lazy(held))
    assert again["w"] is held["w"]


def test_a_checked_tree_tells_where_it_is_not_finite() -> None:
    tree = {"a": Leaf.of(np.ones(SIZE)), "n": Leaf.of(np.ones(3, int)), "b": Leaf.of(np.array([1.0, np.inf]))}
    seen = trees.checked(tree, NonFiniteError)
    assert np.asarray(seen["a"]).sum() == SIZE
    assert np.asarray(seen["n"]).sum() == 3
    with pytest.raises(NonFiniteError, match="b"):
        np.asarray(seen["b"])
    with pytest.raises(NonFiniteError, match="c"):
        trees.checked({"c": np.array(np.nan)}, NonFiniteError)
