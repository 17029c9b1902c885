# SPDX-License-Identifier: Apache-2.0
"""Keys and masks: X25519 (RFC 7748), HKDF-SHA-256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), AES-128-CTR (SP 800-38A).

    root (32 random bytes, one an attempt) ──HKDF──> channel key, mask key, self-mask seed, Shamir's coefficients
    my channel key × a peer's public one   ──HKDF──> the key of one sealed box, for one direction
    my mask key × a peer's public one      ──HKDF──> the pair's mask, the same at both ends
    self-mask seed                         ──HKDF──> the site's own mask

Every derivation names its purpose and the session (job, round, attempt, ring, sites), and those between sites all
public keys of the session too. So no key serves two purposes, two pairs, two rounds, or two sets of peers.

| case | result |
|---|---|
| a public key of low order, which would give everybody the same secret | WireError |
| a box altered, of another sender, receiver or session | WireError |
| a box's key used twice | it can't be: one key seals one message, hence the constant nonce |
| a mask read from any place, in pieces of any size | the same bytes; nothing is kept between two reads |
| a mask longer than 2^64 blocks | can't be told apart from noise up to far more than any model (2^68 bytes) |

AES with 128-bit keys is as strong as X25519 is, and the counter begins at a random place, so that many pairs can't be
searched at the cost of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hansa.core.lazy import Array
from hansa.errors import WireError

KEY_BYTES = 32

PrivateKey = X25519PrivateKey

_NONCE = bytes(12)
_BLOCK_BYTES = 16
_PIECE_BYTES = 1 << 18
"""Mask bytes made at a time: they and the sums they are added to stay in the processor's cache."""

_ZEROS = memoryview(bytes(_PIECE_BYTES))
_PROBE = X25519PrivateKey.from_private_bytes(bytes(range(KEY_BYTES)))


def derive(secret: bytes, purpose: str, context: bytes, length: int = KEY_BYTES) -> bytes:
    """Return ``length`` bytes derived from a secret for one purpose in one context."""
    info = b"hansa secagg v1\0" + purpose.encode() + b"\0" + context
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(secret)


def private_key(secret: bytes) -> PrivateKey:
    """Return the X25519 key of 32 secret bytes; that takes as long as an agreement."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_bytes(private: PrivateKey) -> bytes:
    """Return the public part of a key."""
    return private.public_key().public_bytes_raw()


def is_sound(public: bytes) -> bool:
    """Say whether a public key has 32 bytes and an order that is not low."""
    try:
        _PROBE.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def agree(private: PrivateKey, public: bytes, purpose: str, context: bytes) -> bytes:
    """Return the key that the holders of two X25519 keys share, for one purpose in one context.

    Raises:
        WireError: the public key is none, or of low order.
    """
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise WireError("This is no X25519 public key to agree with.") from error
    return derive(shared, purpose, context)


def seal(key: bytes, message: bytes) -> bytes:
    """Encrypt and authenticate the one message that ``key`` is for."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, message, None)


def unseal(key: bytes, box: bytes) -> bytes:
    """Open what :func:`seal` made.

    Raises:
        WireError: it was altered, or made with another key.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, None)
    except InvalidTag as error:
        raise WireError("The box was altered, or is from another sender, to another site or of another session.") from (
            error
        )


class Keystream:
    """A pseudorandom string of bytes that can be read from any place.

    Args:
        secret: what it is expanded from.
        purpose, context: as of :func:`derive`.
    """

    __slots__ = ("_begin", "_cipher")

    def __init__(self, secret: bytes, purpose: str, context: bytes) -> None:
        material = derive(secret, purpose, context, 32)
        self._cipher = algorithms.AES(material[:16])
        self._begin = int.from_bytes(material[16:])

    def read(self, start: int) -> Callable[[memoryview], None]:
        """Return a function that fills one buffer after the other with the bytes from ``start`` on."""
        counter = (self._begin + start // _BLOCK_BYTES) % (1 << 128)
        encryptor = Cipher(self._cipher, modes.CTR(counter.to_bytes(16))).encryptor()
        encryptor.update(_ZEROS[: start % _BLOCK_BYTES])

        def fill(buffer: memoryview) -> None:
            for at in range(0, len(buffer), _PIECE_BYTES):
                piece = buffer[at : at + _PIECE_BYTES]
                encryptor.update_into(_ZEROS[: len(piece)], piece)

        return fill


class Masks:
    """Masks that are added to a vector over the ring, each with its sign, a block at a time, in place.

    Not for two threads at once.

    Args:
        dtype: uint32 or uint64, the ring.
        terms: (keystream, +1 or -1).
    """

    def __init__(self, dtype: np.dtype[np.unsignedinteger], terms: Iterable[tuple[Keystream, int]]) -> None:
        self.dtype = dtype
        self._terms = [(stream, np.add if sign > 0 else np.subtract) for stream, sign in terms]
        self._piece = np.empty(_PIECE_BYTES // dtype.itemsize, dtype)
        self._bytes = self._piece.view(np.uint8).data

    def __len__(self) -> int:
        return len(self._terms)

    def apply(self, start: int, values: Array) -> None:
        """Add all masks' elements from ``start`` on to ``values`` (contiguous, of the ring's dtype), in place."""
        assert values.dtype == self.dtype, "masks are added to elements of their ring"
        for stream, operation in self._terms:
            fill = stream.read(start * self.dtype.itemsize)
            for at in range(0, values.size, self._piece.size):
                target = values[at : at + self._piece.size]
                fill(self._bytes[: target.nbytes])
                operation(target, self._piece[: target.size], out=target)
