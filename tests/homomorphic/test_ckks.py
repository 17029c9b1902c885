# SPDX-License-Identifier: Apache-2.0
"""CKKS as an exact scheme: sums are those of the integers, and what is no ciphertext is told."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.errors import WireError
from hansa.homomorphic import ckks

LIMIT = (1 << (ckks.BITS - 1)) - 1


def masked(size: int = ckks.SLOTS) -> np.ndarray:
    """Integers as masks leave them: uniform, other ones each time."""
    return ckks.reduced(np.frombuffer(secrets.token_bytes(8 * size), np.uint64))


@pytest.fixture(scope="module")
def keys() -> tuple[ckks.Encryptor, ckks.Decryptor]:
    secret, public = ckks.new_keys()
    return ckks.Encryptor(public), ckks.Decryptor(secret)


def summed(encryptor: ckks.Encryptor, vectors: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(ckks.WORDS, np.uint64)
    for values in vectors:
        words = encryptor.encrypt(values)
        ckks.check(words)
        ckks.add(total, words)
    return total


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(3, 12), st.integers(1, ckks.SLOTS))
def test_a_sum_of_ciphertexts_is_that_of_the_integers(keys, sites, size):
    vectors = [masked(size) for _ in range(sites)]
    found = keys[1].decrypt(summed(keys[0], vectors))
    assert np.array_equal(found[:size], sum(vectors))
    assert not found[size:].any()


def test_for_the_most_sites_it_is_exact(keys):
    """With one at each end of what there is, in a slot of its own."""
    vectors = [masked() for _ in range(ckks.MOST_SITES)]
    for vector in vectors:
        vector[:2] = [LIMIT, -LIMIT - 1]
    assert np.array_equal(keys[1].decrypt(summed(keys[0], vectors)), sum(vectors))


def test_the_error_is_the_formulas(monkeypatch):
    """Over slots and keys it is no normal one: how much of it a slot has goes with the key."""
    seen, rint = [], np.rint
    monkeypatch.setattr(np, "rint", lambda values: seen.append(values - rint(values)) or rint(values))
    for _ in range(24):
        secret, public = ckks.new_keys()
        ckks.Decryptor(secret).decrypt(summed(ckks.Encryptor(public), [masked() for _ in range(3)]))
    deviation = np.sqrt(3) * ckks.DEGREE / 6 / 2.0**20
    errors = np.concatenate(seen) / deviation
    assert np.std(errors) == pytest.approx(1, rel=0.05)
    for beyond in (2, 3, 4):
        assert np.mean(np.abs(errors) > beyond) == pytest.approx(np.exp(-np.sqrt(2) * beyond), rel=0.4)
    assert 24 * np.sqrt(ckks.MOST_SITES / 3) * deviation <= 0.2501


def test_integers_that_are_not_masked_can_be_too_large(keys):
    """So it is by masks that coefficients do not wrap: all slots the same, within the limit, and the sum is another."""
    vectors = [np.full(ckks.SLOTS, LIMIT // 2)] * 4
    try:
        found = keys[1].decrypt(summed(keys[0], vectors))
    except WireError:
        return
    assert not np.array_equal(found, sum(vectors))


def test_ciphertexts_tell_nothing_at_sight(keys):
    """The same values twice: other words, spread evenly over the residues, and none that both have in one place."""
    values = np.zeros(ckks.SLOTS, np.int64)
    first, second = keys[0].encrypt(values), keys[0].encrypt(values)
    assert not (first == second).any()
    counts = np.bincount((first // np.uint64(ckks.PRIMES[0] // 64 + 1)).astype(np.int64), minlength=64)
    expected = counts.sum() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi-square with 63 degrees: p < 1e-8


def test_a_public_key_and_another_secret_one_open_nothing(keys):
    words = keys[0].encrypt(np.arange(ckks.SLOTS))
    vector = tenseal.ckks_vector_from(keys[0]._context, ckks._form().vector(words.tobytes()))
    with pytest.raises(ValueError, match="secret"):
        vector.decrypt()
    secret, _ = ckks.new_keys()
    with pytest.raises(WireError, match="no sum of encrypted integers"):
        ckks.Decryptor(secret).decrypt(words)


def test_the_primes_are_those_that_seal_chooses():
    found = [prime.value() for prime in seal.CoeffModulus.Create(ckks.DEGREE, [60, 60])]
    assert tuple(found) == ckks.PRIMES
    assert sum(prime.bit_length() for prime in ckks.PRIMES) <= seal.CoeffModulus.MaxBitCount(
        ckks.DEGREE, seal.SEC_LEVEL_TYPE.TC192
    )


def test_words_that_are_no_residues_are_refused(keys):
    words = keys[0].encrypt(np.arange(5)).copy()
    words[7] = ckks.PRIMES[0]
    for refused in (lambda: ckks.check(words), lambda: keys[1].decrypt(words)):
        with pytest.raises(WireError, match="no residues"):
            refused()


@pytest.mark.parametrize("change", ["shorter", "longer", "too large"])
def test_a_public_key_of_another_form_is_refused(change):
    _, public = ckks.new_keys()
    changed = {
        "shorter": public[:-8],
        "longer": public + bytes(8),
        "too large": b"\xff" * 8 + public[8:],
    }[change]
    with pytest.raises(WireError, match="public key has"):
        ckks.Encryptor(changed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.sampled_from(["noise", "zeros", "half", "bits"]))
def test_no_words_bring_the_process_down(keys, seed, kind):
    """Residues of any kind are decrypted to something, or refused."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, ckks.PRIMES[0], ckks.WORDS, np.uint64)
    if kind == "zeros":
        words[:] = 0
    elif kind == "half":
        words[ckks.DEGREE :] = 0
    elif kind == "bits":
        words = keys[0].encrypt(np.arange(9)).copy()
        words[rng.integers(ckks.WORDS)] ^= np.uint64(1 << 20)
    try:
        found = keys[1].decrypt(words)
    except WireError:
        return
    assert found.shape == (ckks.SLOTS,)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200), st.integers(0, ckks.PUBLIC_BYTES - 1), st.integers(0, 2**32))
def test_no_public_key_brings_the_process_down(data, place, seed):
    residues = np.random.default_rng(seed).integers(0, min(ckks.PRIMES), 4 * ckks.DEGREE, np.uint64).tobytes()
    changed = (residues[:place] + data + residues[place + len(data) :])[: ckks.PUBLIC_BYTES]
    try:
        words = ckks.Encryptor(changed).encrypt(np.arange(3))
    except WireError:
        return
    ckks.check(words)
