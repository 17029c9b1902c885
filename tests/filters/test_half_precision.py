# SPDX-License-Identifier: Apache-2.0
"""Filters on half-precision updates: what is stated of the norm and the mean holds there too."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core import tree as trees
from hansa.core.filter import Given
from hansa.core.values import Update
from hansa.filters.clip import clip
from hansa.filters.weigh import weigh

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def update(leaf: np.ndarray, weight: float = 1.0) -> Update:
    return Update("berlin", 1, 0, {"delta": {"w": leaf}, "control": {"w": leaf[:3]}}, weight, {})


def joint_norm(item: Update) -> float:
    return float(np.hypot(*(trees.norm(tree) for tree in item.parts.values())))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@given(seed=st.integers(0, 1000), size=st.integers(1, 200), scale=st.floats(1e-6, 1e3), share=st.floats(0.01, 0.99))
def test_a_clipped_update_is_within_its_bound(dtype: Any, seed: int, size: int, scale: float, share: float) -> None:
    leaf = (np.random.default_rng(seed).normal(size=size) * scale).astype(dtype)
    bound = joint_norm(update(leaf)) * share
    if bound == 0:
        return
    clipped, _ = clip(bound).apply(update(leaf), Given({}), {})
    assert joint_norm(clipped) <= bound * (1 + 1e-5)
    assert clipped.parts["delta"]["w"].dtype == leaf.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_clipping_costs_no_more_than_rounding(dtype: Any) -> None:
    leaf = np.random.default_rng(0).normal(size=10_000).astype(dtype)
    clipped, _ = clip(3.0).apply(update(leaf), Given({}), {})
    assert joint_norm(clipped) > 3.0 * 0.997


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("weight", [1.003, 0.123, 7.77])
def test_weighing_then_dividing_gives_the_update_back(dtype: Any, weight: float) -> None:
    """Every element is rounded by itself: a weight rounded first would shift them all by up to 0.4 %."""
    leaf = np.random.default_rng(1).normal(size=100_000).astype(dtype)
    weighed, _ = weigh().apply(update(leaf, weight), Given({"delta": True, "control": False}), {})
    mean = weighed.parts["delta"]["w"].astype(np.float64) / weight
    exact = leaf.astype(np.float64)
    assert abs(np.dot(mean, exact) / np.dot(exact, exact) - 1) < 5e-4
    assert weighed.parts["delta"]["w"].dtype == leaf.dtype
    np.testing.assert_array_equal(weighed.parts["control"]["w"], leaf[:3])
