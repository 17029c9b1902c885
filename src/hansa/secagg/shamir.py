# SPDX-License-Identifier: Apache-2.0
"""Shamir's t-of-n sharing of 32-byte secrets (Shamir 1979) over the integers modulo ``PRIME``.

A secret is the constant term of a polynomial of degree t - 1; share number x (from 1) is its value at x, in
``SHARE_BYTES`` big-endian bytes. Fewer than t shares say nothing about the secret. The field knows no wrong share: who
combines must hold the result against a commitment, or a public key.

| case | result |
|---|---|
| a share of another length, or a number outside the field | :func:`problem` says so, :func:`combine` WireError |
| two shares of one number | can't be said: shares are keyed by number |
| share number 0, which would be the secret itself | WireError |
| fewer shares than the threshold | QuorumError |
| more shares than the threshold | those of the smallest numbers are used |
| shares that combine to more than 32 bytes | WireError: one of them is wrong |
| a threshold below 2, or above the number of shares | a defect of the caller (assert) |

Python's integers do not take constant time; this runs where the secret is, or after it was given away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from hansa.errors import QuorumError, WireError

PRIME = 2**256 + 297
"""The least prime above 2^256, so that every 32-byte secret is an element of the field."""

SECRET_BYTES = 32
SHARE_BYTES = 33

_DRAW_BYTES = 48  # reduced mod PRIME, 384 uniform bits are within 2^-127 of uniform


def split(secret: bytes, threshold: int, count: int, seed: bytes) -> list[bytes]:
    """Return shares 1 to ``count``, any ``threshold`` of which give the secret back.

    Args:
        secret: 32 bytes.
        threshold: t, at least 2.
        count: n, at least ``threshold``.
        seed: a secret of its own that the coefficients are drawn from (SHAKE-256), so that shares can be made again.
    """
    assert len(secret) == SECRET_BYTES, "secrets are 32 bytes"
    assert 2 <= threshold <= count, "a secret is shared by at least two of n"
    stream = hashlib.shake_256(b"hansa shamir v1\0" + seed).digest(_DRAW_BYTES * (threshold - 1))
    drawn = [int.from_bytes(stream[at : at + _DRAW_BYTES]) % PRIME for at in range(0, len(stream), _DRAW_BYTES)]
    return [_value([int.from_bytes(secret), *drawn], x).to_bytes(SHARE_BYTES) for x in range(1, count + 1)]


def _value(coefficients: list[int], x: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % PRIME
    return total


def problem(share: bytes) -> str | None:
    """Say what is wrong with the form of a share, or None."""
    if len(share) != SHARE_BYTES:
        return f"it has {len(share)} bytes instead of {SHARE_BYTES}"
    if int.from_bytes(share) >= PRIME:
        return "its number is outside the field"
    return None


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that ``threshold`` of these shares give, by number.

    Raises:
        WireError: a share is malformed, or they do not belong together.
        QuorumError: there are fewer than ``threshold``.
    """
    for number, share in shares.items():
        wrong = problem(share) or (None if 0 < number < PRIME else "there is no such share")
        if wrong:
            raise WireError(f"Share {number} can't be used: {wrong}.")
    if len(shares) < threshold:
        raise QuorumError(f"{len(shares)} shares are there, {threshold} are needed.")
    numbers = tuple(sorted(shares)[:threshold])
    terms = zip(_at_zero(numbers), (int.from_bytes(shares[number]) for number in numbers), strict=True)
    secret = sum(weight * value for weight, value in terms) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise WireError("These shares do not belong together: what they give is no secret.")
    return secret.to_bytes(SECRET_BYTES)


@lru_cache(maxsize=1024)
def _at_zero(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights at 0 for these places."""
    weights = []
    for i in numbers:
        above = below = 1
        for j in numbers:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
