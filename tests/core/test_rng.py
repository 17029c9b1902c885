# SPDX-License-Identifier: Apache-2.0
"""Derived generators: the same from the same labels, another from any other."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.rng import derive, generator

labels = st.lists(st.integers(0, 100) | st.text(), max_size=4)


@given(st.integers(0, 2**63), labels, st.integers(0, 2**63), labels)
def test_other_labels_give_another_seed(seed: int, one: list[int | str], other: int, two: list[int | str]) -> None:
    same = [str(x) for x in (seed, *one)] == [str(x) for x in (other, *two)]
    assert (derive(seed, *one) == derive(other, *two)) == same


def test_labels_do_not_run_into_each_other() -> None:
    assert derive(0, "a\x1fb") != derive(0, "a", "b")
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(1, 2) != derive(12)
    assert derive(0, "a", "b") != derive(0, "b", "a")
    assert derive(0, "") != derive(0)


@given(st.integers(0, 2**63), labels)
def test_a_seed_has_63_bits(seed: int, one: list[int | str]) -> None:
    assert 0 <= derive(seed, *one) < 2**63


def test_numpy_integers_are_integers() -> None:
    assert derive(np.int64(3), np.int32(4), "x") == derive(3, 4, "x")


def test_a_name_that_came_from_a_file_system_is_no_error() -> None:
    assert derive(0, "\udcff") != derive(0, "\udcfe")


def test_the_seed_is_the_same_in_another_process() -> None:
    code = "from hansa.core.rng import derive; print(derive(7, 'train', 3, 'tallinn'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive(7, "train", 3, "tallinn")


def test_generators_repeat_and_differ() -> None:
    a, b, c = (generator(1, "x", i).random(1000) for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.15
