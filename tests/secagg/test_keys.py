# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hansa.errors import WireError
from hansa.secagg import keys


def test_both_ends_agree_for_one_purpose_in_one_context() -> None:
    a, b = (keys.private_key(bytes([i]) * 32) for i in (1, 2))
    one = keys.agree(a, keys.public_bytes(b), "box", b"here")
    assert one == keys.agree(b, keys.public_bytes(a), "box", b"here")
    others = {keys.agree(a, keys.public_bytes(b), *where) for where in (("box", b"there"), ("mask", b"here"))}
    assert len(others | {one}) == 3


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"", bytes(31)])
def test_keys_of_low_order_and_no_keys_are_refused(public: bytes) -> None:
    assert not keys.is_sound(public)
    with pytest.raises(WireError, match="no X25519 public key"):
        keys.agree(keys.private_key(bytes([1]) * 32), public, "box", b"")


def test_a_box_opens_whole_or_not_at_all() -> None:
    key = bytes(range(32))
    box = keys.seal(key, b"shares")
    assert keys.unseal(key, box) == b"shares"
    for bad in (box[:-1], box + b"\0", bytes([box[0] ^ 1]) + box[1:], b""):
        with pytest.raises(WireError, match="altered"):
            keys.unseal(key, bad)
    with pytest.raises(WireError, match="another sender"):
        keys.unseal(bytes(32), box)


def test_a_keystream_is_aes_in_counter_mode_read_from_any_place() -> None:
    stream = keys.Keystream(b"secret", "purpose", b"context")
    material = keys.derive(b"secret", "purpose", b"context", 32)
    length = (1 << 20) + 77
    whole = Cipher(algorithms.AES(material[:16]), modes.CTR(material[16:])).encryptor().update(bytes(length))
    for start, count in ((0, length), (16, 100), (5, 1 << 19), ((1 << 18) - 3, 7), (length - 1, 1), (3, 0)):
        out = bytearray(count)
        stream.read(start)(memoryview(out))
        assert out == whole[start : start + count]


def test_the_counter_wraps_as_the_cipher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "derive", lambda *args: b"k" * 16 + b"\xff" * 16)
    stream = keys.Keystream(b"", "", b"")
    whole, part = bytearray(64), bytearray(32)
    stream.read(0)(memoryview(whole))
    stream.read(32)(memoryview(part))
    assert part == whole[32:]


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_masks_are_added_in_place_and_cancel_whatever_the_blocks(dtype: type[np.unsignedinteger]) -> None:
    ring = np.dtype(dtype)
    streams = [keys.Keystream(bytes([i]), "m", b"") for i in range(3)]
    signs = [1, -1, 1]
    values = np.arange(200_003, dtype=ring)
    one = values.copy()
    keys.Masks(ring, zip(streams, signs, strict=True)).apply(0, one)
    assert (one == values).mean() < 0.01
    back = keys.Masks(ring, zip(streams, [-sign for sign in signs], strict=True))
    for start in (70_000, 0, 140_000):
        back.apply(start, one[start : start + 70_000])
    np.testing.assert_array_equal(one, values)


def test_masks_are_added_without_memory_of_their_own() -> None:
    ring = np.dtype(np.uint32)
    values = np.zeros(1 << 20, ring)
    masks = keys.Masks(ring, [(keys.Keystream(bytes([i]), "m", b""), 1) for i in range(20)])
    masks.apply(0, values)
    tracemalloc.start()
    try:
        masks.apply(0, values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10  # the values are 4 MiB
