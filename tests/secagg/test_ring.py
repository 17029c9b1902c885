# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core.lazy import BLOCK, Array, Leaf
from hansa.core.tree import Parts
from hansa.errors import NonFiniteError, PrivacyError, WireError
from hansa.secagg.keys import Keystream
from hansa.secagg.ring import SCALARS, WEIGHT, Encoding, Field, Range, Vector, decoded, encoding, summands


def vector(ring: Encoding, parts: Parts, seed: bytes = b"") -> Array:
    made = Vector(ring, parts, "a", 3, Keystream(seed, "rounding", b""))
    out = np.empty(ring.size, ring.dtype)
    for start in range(0, ring.size, BLOCK):
        made.encode(start, out[start : start + BLOCK])
    return out


@given(
    seed=st.integers(0, 2**32),
    sites=st.integers(1, 50),
    bound=st.floats(1e-12, 1e12),
    bits=st.sampled_from([32, 64]),
    stochastic=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_is_the_plain_sum_to_the_stated_error(
    seed: int, sites: int, bound: float, bits: int, stochastic: bool
) -> None:
    rng = np.random.default_rng(seed)
    step = None if bits == 32 else bound * 2.0**-40
    ranges = {"delta": {"a": Range(-bound, bound, step, (7, 3)), "b": Range(0, bound / 3, step, (0, 2))}}
    ranges[SCALARS] = {WEIGHT: Range(0, 10 * bound, None if step is None else 10 * step)}
    ring = encoding(ranges, sites, stochastic=stochastic)
    assert ring.bits == bits
    total = np.zeros(ring.size, ring.dtype)
    plain, weight = np.zeros((7, 3)), 0.0
    for site in range(sites):
        tree = {"a": rng.uniform(-bound, bound, (7, 3)), "b": np.zeros((0, 2))}
        if site % 3 == 0:
            tree["a"][:] = bound  # the worst case
        total += vector(ring, summands({"delta": tree}, bound, {}), bytes([site]))
        plain += tree["a"]
        weight += bound
    parts = decoded(ring, total, sites)
    slack = 1e-12 * sites * bound
    assert np.abs(parts["delta"]["a"] - plain).max() <= ring.error("delta", "a", sites) + slack
    assert parts["delta"]["b"].shape == (0, 2)
    assert float(parts[SCALARS][WEIGHT]) == pytest.approx(weight, abs=ring.error(SCALARS, WEIGHT) + 10 * slack)


def test_integers_are_exact_in_whatever_order() -> None:
    rng = np.random.default_rng(0)
    ring = encoding({"counts": {"n": Range(-(2**20), 2**20, 1, (1000,))}}, 300)
    assert ring.bits == 32
    each = [rng.integers(-(2**20), 2**20, 1000, endpoint=True) for _ in range(300)]
    vectors = [vector(ring, {"counts": {"n": values}}) for values in each]
    forward, backward = (sum(v, start=np.zeros(1000, np.uint32)) for v in (vectors, vectors[::-1]))
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(decoded(ring, forward, 300)["counts"]["n"], sum(each))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_floating_dtype_is_taken(dtype: Any) -> None:
    values = np.array([0.5, -0.25, 1.0]).astype(dtype)
    ring = encoding({"delta": {"w": Range(-1, 1, shape=(3,))}}, 2)
    np.testing.assert_array_equal(
        decoded(ring, vector(ring, {"delta": {"w": values}}), 1)["delta"]["w"], [0.5, -0.25, 1]
    )


def test_blocks_run_across_tensors_and_lazy_leaves_give_the_same() -> None:
    rng = np.random.default_rng(1)
    tree = {name: rng.uniform(-1, 1, size) for name, size in {"a": 3, "b": BLOCK - 1, "c": BLOCK + 5, "d": 1}.items()}
    ring = encoding({"p": {name: Range(-1, 1, shape=leaf.shape) for name, leaf in tree.items()}}, 4)
    eager = vector(ring, {"p": tree})
    lazy: Any = {name: Leaf.of(leaf / 2) * 2 for name, leaf in tree.items()}
    np.testing.assert_array_equal(eager, vector(ring, {"p": lazy}))
    parts = decoded(ring, eager, 1)
    for name, leaf in tree.items():
        assert np.abs(parts["p"][name] - leaf).max() <= ring.error("p", name, 1)


def test_an_encoder_needs_no_memory_of_the_size_of_its_tensors() -> None:
    reads: list[int] = []

    def read(start: int, stop: int, memo: Any) -> Array:
        reads.append(stop - start)
        return np.zeros(stop - start, np.float32)

    leaf: Any = Leaf((5 * BLOCK + 3,), np.dtype(np.float32), read)
    ring = encoding({"p": {"w": Range(-1, 1, shape=leaf.shape)}}, 4)
    made = Vector(ring, {"p": {"w": leaf}}, "a", 1, Keystream(b"", "r", b""))
    made.encode(BLOCK, np.empty(BLOCK, ring.dtype))
    assert reads == [BLOCK]


def test_stochastic_rounding_is_unbiased_repeatable_and_leaves_whole_numbers() -> None:
    ring = Encoding(32, 2, True, (Field("p", "w", (200_000,), -4.0, 4.0, 0),))
    for value, tolerance in ((0.25, 0.01), (-1.75, 0.01), (3.0, 0), (-4.0, 0)):
        values = {"p": {"w": np.full(200_000, value)}}
        found = vector(ring, values, b"1").view(np.int32)
        assert abs(found.mean() - value) <= tolerance
        assert set(np.unique(found)) <= {math.floor(value), math.ceil(value)}
        np.testing.assert_array_equal(found, vector(ring, values, b"1").view(np.int32))
    drawn = [vector(ring, {"p": {"w": np.full(200_000, 0.5)}}, seed) for seed in (b"1", b"2")]
    assert 0.49 < (drawn[0] == drawn[1]).mean() < 0.51


def test_the_ring_is_the_narrowest_that_does_and_the_exponent_the_largest_that_fits() -> None:
    for sites in (3, 100, 10_000):
        ring = encoding({"p": {"w": Range(-0.7, 0.2)}}, sites)
        field = ring.fields[0]
        assert ring.bits == 32
        assert sites * field.most <= 2**31 - 1
        assert sites * (0.7 * 2.0 ** (field.exponent + 1) + 1) > 2**31 - 1
    assert encoding({"p": {"w": Range(-1, 1)}}, 1 << 20).bits == 64
    assert encoding({"p": {"w": Range(-1, 1, step=1e-9)}}, 100).bits == 64


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Range(-1, 1, step=1e-18), r"'w' of 'p': no ring adds 100 values up to 1 in steps of 1e-18; the finest is"),
        (Range(-1, math.inf), "bounds nothing"),
        (Range(math.nan, 1), "bounds nothing"),
        (Range(1, -1), "bounds nothing"),
        (Range(0, 0), "too small or too large"),
        (Range(0, 1e200), "too small or too large"),
    ],
)
def test_ranges_that_no_ring_holds_are_refused(given: Range, says: str) -> None:
    with pytest.raises(PrivacyError, match=says):
        encoding({"p": {"w": given}}, 100)


def test_an_encoding_that_could_wrap_is_refused_wherever_it_comes_from() -> None:
    with pytest.raises(PrivacyError, match="can wrap in 32 bits"):
        Encoding(32, 100, False, (Field("p", "w", (2,), -1.0, 1.0, 25),))
    good = encoding({"p": {"w": Range(-1, 1)}}, 100)
    raw = msgspec.to_builtins(good)
    assert msgspec.convert(raw, Encoding) == good
    raw["sites"] = 1000
    with pytest.raises(PrivacyError, match="can wrap"):
        msgspec.convert(raw, Encoding)
    with pytest.raises(PrivacyError, match="not in order"):
        Encoding(32, 2, False, (good.fields[0], good.fields[0]))
    with pytest.raises(PrivacyError, match="nobody has that many"):
        Encoding(32, 2, False, (Field("p", "w", (1 << 25, 1 << 25), -1.0, 1.0, 0),))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    ring = encoding({"p": {"w": Range(-1, 1, shape=(3,))}}, 3)
    with pytest.raises(NonFiniteError, match=r"site a, round 3: 'w' of 'p' holds a NaN or an infinity"):
        vector(ring, {"p": {"w": np.array([0, bad, 0])}})


@pytest.mark.parametrize("bad", [1.0000001, -1.0000001, 1e30])
def test_nothing_is_clamped(bad: float) -> None:
    ring = encoding({"p": {"w": Range(-1, 1, shape=(3,))}}, 3)
    with pytest.raises(PrivacyError, match=r"site a, round 3: 'w' of 'p' holds .*, outside its range from -1 to 1"):
        vector(ring, {"p": {"w": np.array([0, bad, 0])}})


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"p": {}}, "'w' of 'p' are missing"),
        ({"p": {"w": np.zeros(3), "x": np.zeros(1)}}, "'x' of 'p' are to be summed and have no place"),
        ({"p": {"w": np.zeros(4)}}, r"has the shape \[4\] instead of \[3\]"),
    ],
)
def test_values_that_do_not_fit_are_refused(parts: Parts, says: str) -> None:
    ring = encoding({"p": {"w": Range(-1, 1, shape=(3,))}}, 3)
    with pytest.raises(WireError, match=says):
        vector(ring, parts)


def test_a_sum_that_so_many_sites_can_not_have_is_refused_when_it_is_read() -> None:
    ring = encoding({"p": {"w": Range(-1, 1, shape=(3,))}}, 100)
    total = vector(ring, {"p": {"w": np.ones(3)}}) * np.uint32(5)
    assert decoded(ring, total, 5)["p"]["w"][0] == 5
    wrong = decoded(ring, total, 3)
    with pytest.raises(WireError, match="more than 3 sites can put in"):
        wrong["p"]["w"]
