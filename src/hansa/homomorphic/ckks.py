# SPDX-License-Identifier: Apache-2.0
"""Integers that are added while nobody can read them: CKKS (Cheon, Kim, Kim, Song 2017, eprint 2016/421) by TenSEAL.

    4096 integers  ──encrypt(public)──>  16384 residues mod q  ──added mod q──>  ──decrypt(secret)──>  4096 sums, exact

The ring is Z_q[X]/(X^8192 + 1), q a prime just below 2^60; TenSEAL wants a second one beside it for keys. Both together
have 120 bits; the homomorphic encryption standard (2018) allows 218 for 128 bits of security and 152 for 192, so this
has more than 192. Keys, encoding, encryption and decryption are SEAL's. What travels is the array of residues alone, in
SEAL's own order (two polynomials in NTT form), as what stands before it is the same for all: so nothing that came from
elsewhere reaches a parser, and whoever only adds needs NumPy.

**CKKS is used as an exact scheme.** What is encrypted is an integer times 2^20, and the error of a sum over n sites has
the deviation d = sqrt(n) · (8192 / 6) / 2^20 in a slot. SEAL scales a ciphertext down by the second prime, and the
rounding of that, times the secret s, is nearly all of it: a variance of 8192 / 18 in a coefficient, and a slot's real
part is a sum of 4096 of them. So how much a slot has goes with the size of s there, whose square is exponential over
keys: an error beyond t · d has a probability of exp(-sqrt(2) · t), far above a normal one's. For 64 sites d is 0.0104;
a quarter is 24 of those, which 2^-48 of all slots exceed and are refused for, and another integer is 72 away (2^-146).
So the nearest integer is the sum, and the error, which would tell of the secret key (Li and Micciancio 2021, eprint
2020/1533), leaves the key's owner neither as digits nor by what rounds up or down.

**Integers are masked**, so uniform in [-2^39, 2^39) and independent (:mod:`.protocol`), and a coefficient is at most a
mean of 4096 slots. That of a sum over 64 sites has a deviation of at most 2^20 · 2^40 · sqrt(64 / 12) / 64, and q / 2,
beyond which it would wrap, is 13 of those away (2^-130), though one slot of the sum may have 46 bits.

| case | result |
|---|---|
| a word that is no residue of q; a public key of another length | WireError |
| what decrypts to no integers, so is no sum of such ciphertexts | WireError; nothing of it is shown |
| the sum of more than 64 ciphertexts, or of integers that are larger or not masked | not for this module to see |
| the same integers encrypted twice | different residues |
| TenSEAL or zstandard not installed | MissingExtraError |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np

from hansa import registry
from hansa.core.lazy import Array
from hansa.errors import WireError

DEGREE = 8192
SLOTS = DEGREE // 2
"""How many integers one ciphertext holds."""
WORDS = 2 * DEGREE
"""How many residues (uint64) one ciphertext is."""
PRIMES = (1152921504606748673, 1152921504606830593)
"""q, and the prime that only keys have beside it."""
PUBLIC_BYTES = 2 * len(PRIMES) * DEGREE * 8
BITS: Final = 40
"""What sums fit into, as integers with a sign; what is encrypted is taken modulo 2^40, as masks are."""
MOST_SITES = 64
"""For so many the error stays 24 deviations below a quarter, and coefficients 13 below q / 2."""

_SCALE = 2.0**20
_TOLERANCE = 0.25
_ONLY_PUBLIC = {"save_secret_key": False, "save_galois_keys": False, "save_relin_keys": False}
_PRIVATE = {**_ONLY_PUBLIC, "save_secret_key": True}

# Field numbers of TenSEAL's protocol buffers
_PUBLIC, _PUBLIC_KEY = 2, 1  # of a context, and of its public part
_CIPHERTEXT = 2  # of a vector
_HEADER_BYTES, _HEAD_BYTES = 16, 97  # of what SEAL writes; of a ciphertext in it, before the residues


def num_ciphertexts(size: int) -> int:
    """Return how many ciphertexts hold ``size`` integers.

    >>> num_ciphertexts(1), num_ciphertexts(4096), num_ciphertexts(4097)
    (1, 1, 2)
    """
    return -(-size // SLOTS)


def reduced(values: Array) -> Array:
    """Return the integers (int64) in [-2^39, 2^39) that equal ``values`` (uint64 or int64) modulo 2^40.

    >>> reduced(np.array([1, 2**39, 2**40 + 5]))
    array([            1, -549755813888,             5])
    """
    shift = 64 - BITS
    return (values.view(np.int64) << shift) >> shift


def new_keys() -> tuple[bytes, bytes]:
    """Make a key pair; return the secret key, to be kept by whoever calls, and the public one (``PUBLIC_BYTES``)."""
    context = _context()
    key = _value(_value(context.serialize(**_ONLY_PUBLIC), _PUBLIC), _PUBLIC_KEY)
    return bytes(context.serialize(**_PRIVATE)), _residues(key, PUBLIC_BYTES)


def check_public(public: bytes) -> None:
    """Raise WireError unless ``public`` has a public key's form."""
    if len(public) != PUBLIC_BYTES:
        raise WireError(f"A public key has {PUBLIC_BYTES:,} bytes; this one has {len(public):,}.")
    residues = np.frombuffer(public, np.uint64).reshape(2, len(PRIMES), DEGREE)
    if (residues >= np.array(PRIMES, np.uint64)[:, None]).any():
        raise WireError("The public key has words that are no residues of its primes.")


def check(words: Array) -> None:
    """Raise WireError unless all ``words`` (uint64) are residues of q."""
    if words.size and int(words.max()) >= PRIMES[0]:
        raise WireError("A ciphertext has words that are no residues of its prime.")


def add(total: Array, more: Array) -> None:
    """Add residues of q (uint64) to those in ``total``."""
    np.add(total, more, out=total)  # below 2^61
    np.subtract(total, np.uint64(PRIMES[0]), out=total, where=total >= np.uint64(PRIMES[0]))


class Encryptor:
    """Encrypts with a public key.

    Args:
        public: the key.

    Raises:
        WireError: it has not a public key's form.
    """

    def __init__(self, public: bytes) -> None:
        check_public(public)
        self._context = _load(_form().context(public))

    def encrypt(self, values: Array) -> Array:
        """Return the ciphertext (``WORDS``, uint64) of at most ``SLOTS`` integers (int64); zeros fill it up."""
        full = np.zeros(SLOTS)
        full[: values.size] = values
        vector = registry.load_object("tenseal:ckks_vector")(self._context, full).serialize()
        return np.frombuffer(_residues(_value(vector, _CIPHERTEXT), WORDS * 8), np.uint64)


class Decryptor:
    """Decrypts with a secret key, as :func:`new_keys` gave it."""

    def __init__(self, secret: bytes) -> None:
        self._context = _load(secret)

    def decrypt(self, words: Array) -> Array:
        """Return the integers (``SLOTS``, int64) in a sum of ciphertexts.

        Raises:
            WireError: it is no such sum.
        """
        check(words)
        vector = _form().vector(words.tobytes())
        try:
            found = np.array(registry.load_object("tenseal:ckks_vector_from")(self._context, vector).decrypt())
        except (RuntimeError, ValueError) as error:  # what SEAL itself finds wrong
            raise WireError(f"What is to be decrypted is no ciphertext: {error}.") from error
        whole = np.rint(found)
        if not np.abs(found - whole).max() <= _TOLERANCE:
            raise WireError("What is to be decrypted is no sum of encrypted integers. Nothing of it is shown.")
        return np.asarray(whole, np.int64)


class _Form:
    """What TenSEAL and SEAL write around residues: the same for all keys, and for all ciphertexts."""

    def __init__(self) -> None:
        context = _context()
        self._context = bytes(context.serialize(**_ONLY_PUBLIC))
        zeros = registry.load_object("tenseal:ckks_vector")(context, np.zeros(SLOTS))
        self._vector = bytes(zeros.serialize())

    def context(self, public: bytes) -> bytes:
        """Return a context that has a public key only."""
        inner = _value(self._context, _PUBLIC)
        key = _with(inner, _PUBLIC_KEY, _around(_value(inner, _PUBLIC_KEY), public))
        return _with(self._context, _PUBLIC, key)

    def vector(self, residues: bytes) -> bytes:
        """Return a vector of one ciphertext."""
        return _with(self._vector, _CIPHERTEXT, _around(_value(self._vector, _CIPHERTEXT), residues))


@lru_cache(maxsize=1)
def _form() -> _Form:
    return _Form()


def _context() -> Any:
    """Return a new context, with new keys."""
    kind = registry.load_object("tenseal:SCHEME_TYPE").CKKS
    bits = [prime.bit_length() for prime in PRIMES]
    return _scaled(registry.load_object("tenseal:context")(kind, DEGREE, coeff_mod_bit_sizes=bits))


def _load(data: bytes) -> Any:
    return _scaled(registry.load_object("tenseal:context_from")(data))


def _scaled(context: Any) -> Any:
    context.global_scale = _SCALE
    return context


def _residues(blob: bytes, num_bytes: int) -> bytes:
    """Return the ``num_bytes`` of residues in what SEAL has written and compressed."""
    body = _body(blob)
    assert len(body) == _HEAD_BYTES + num_bytes, "SEAL writes a head and the residues"
    return body[_HEAD_BYTES:]


def _body(blob: bytes) -> bytes:
    decompressor = registry.load_object("zstandard:ZstdDecompressor")()
    return bytes(decompressor.decompressobj().decompress(blob[_HEADER_BYTES:]))


def _around(blob: bytes, residues: bytes) -> bytes:
    """Return what SEAL has written with other residues, and nothing compressed."""
    body = _body(blob)[:_HEAD_BYTES] + residues
    return blob[:5] + b"\0" + blob[6:8] + struct.pack("<Q", _HEADER_BYTES + len(body)) + body


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number of each field of TenSEAL's protocol buffer, where it begins, its value begins, and both end."""
    place = 0
    while place < len(data):
        begin = place
        tag, place = _number(data, place)
        if tag & 7 == 0:
            value = place
            _, place = _number(data, place)
        else:
            length, value = (8, place) if tag & 7 == 1 else _number(data, place)
            place = value + length
        yield tag >> 3, begin, value, place


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Read a number, and return it and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _written(number: int) -> bytes:
    septets = bytearray()
    while number > 127:
        septets.append(number & 127 | 128)
        number >>= 7
    return bytes((*septets, number))


def _value(data: bytes, wanted: int) -> bytes:
    """Return the bytes of the one field ``wanted``."""
    (found,) = [data[value:end] for number, _, value, end in _fields(data) if number == wanted]
    return found


def _with(data: bytes, wanted: int, new: bytes) -> bytes:
    """Return a message with other bytes in the one field ``wanted``."""
    ((begin, end),) = [(begin, end) for number, begin, _, end in _fields(data) if number == wanted]
    return data[:begin] + _written(wanted << 3 | 2) + _written(len(new)) + new + data[end:]
