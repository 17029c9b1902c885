# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import QuorumError, WireError
from hansa.secagg.shamir import PRIME, SHARE_BYTES, combine, problem, split


def is_prime(n: int) -> bool:
    """Miller and Rabin, 64 bases."""
    draw = random.Random(0)
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(64):
        x = pow(draw.randrange(2, n - 1), odd, n)
        if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_field_is_that_of_the_least_prime_that_holds_every_secret() -> None:
    assert is_prime(PRIME)
    assert not any(is_prime(n) for n in range(2**256 + 1, PRIME, 2))


@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_t_of_n_shares_give_the_secret(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 30))
    threshold = data.draw(st.integers(2, count))
    shares = dict(enumerate(split(secret, threshold, count, b"seed"), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[: data.draw(st.integers(threshold, count))]
    assert combine({number: shares[number] for number in chosen}, threshold) == secret
    assert all(len(share) == SHARE_BYTES and problem(share) is None for share in shares.values())


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_smallest_and_largest_secrets(secret: bytes) -> None:
    shares = dict(enumerate(split(secret, 2, 3, b"s"), 1))
    assert all(combine(dict(pair), 2) == secret for pair in itertools.combinations(shares.items(), 2))


def test_shares_can_be_made_again_and_differ_by_seed() -> None:
    assert split(bytes(32), 3, 5, b"a") == split(bytes(32), 3, 5, b"a")
    assert not set(split(bytes(32), 3, 5, b"a")) & set(split(bytes(32), 3, 5, b"b"))


def test_one_share_too_few_fits_every_secret() -> None:
    """With t - 1 shares, each secret has exactly one polynomial: here another secret's last share completes them."""
    threshold, true, other = 3, bytes(32), b"\x01" * 32
    shares = dict(enumerate(split(true, threshold, 3, b"a"), 1))
    known = {1: int.from_bytes(shares[1]), 2: int.from_bytes(shares[2])}
    # the quadratic through (0, other), (1, ..), (2, ..) at 3, by Lagrange
    third = (int.from_bytes(other) * 1 + known[1] * -3 + known[2] * 3) % PRIME
    forged = {**shares, 3: third.to_bytes(SHARE_BYTES)}
    assert combine(forged, threshold) == other


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({1: b"", 2: bytes(33)}, "Share 1 can't be used: it has 0 bytes instead of 33"),
        ({1: bytes(33), 2: bytes(34)}, "Share 2 can't be used: it has 34 bytes instead of 33"),
        ({1: bytes(33), 2: b"\xff" * 33}, "Share 2 can't be used: its number is outside the field"),
        ({1: PRIME.to_bytes(33), 2: bytes(33)}, "Share 1 can't be used: its number is outside the field"),
        ({0: bytes(33), 2: bytes(33)}, "Share 0 can't be used: there is no such share"),
        ({1: (PRIME - 1).to_bytes(33), 2: (PRIME - 1).to_bytes(33)}, "do not belong together"),
    ],
)
def test_malformed_shares_are_refused(shares: dict[int, bytes], says: str) -> None:
    with pytest.raises(WireError, match=says):
        combine(shares, 2)


def test_too_few_shares_give_nothing() -> None:
    shares = dict(enumerate(split(bytes(32), 3, 5, b"a"), 1))
    with pytest.raises(QuorumError, match="2 shares are there, 3 are needed"):
        combine({1: shares[1], 2: shares[2]}, 3)
