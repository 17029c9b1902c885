# SPDX-License-Identifier: Apache-2.0
"""Draws that a promise rests on: from a secret of the operating system's, expanded by ChaCha20.

They never come from the job's seed, which everybody knows. Who has the secret can take the noise off again, so it
never leaves its owner: the server's lies in the run's work folder until the run is finished, readable by its owner
alone; a site's noise is drawn afresh for each update.

| case | result |
|---|---|
| a run that is resumed | the same secret: a round that is made again has the same cohort and the same noise |
| the secret's file is gone | a new secret; no round that was released is made again |
| the same labels twice | the same draws, whatever block they are read in |

The noise is float64's approximation of a normal one (Mironov 2012, "On significance of the least significant bits for
differential privacy", is the caveat); it is rounded to the sum's dtype together with the sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hansa import registry
from hansa.core import storage
from hansa.core.lazy import BLOCK, Array, Leaf, Memo
from hansa.errors import StorageError

KEY_BYTES = 32


class Secret:
    """A key that draws are derived from, by labels."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._key = key

    @property
    def key(self) -> bytes:
        """The secret itself, for another process of its owner."""
        return self._key

    @classmethod
    def fresh(cls) -> Secret:
        """Return a new one, from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def kept(cls, path: Path) -> Secret:
        """Return the one in a file, which is made, durably, if there is none.

        Raises:
            StorageError: it can't be read or written, or is damaged.
        """
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(fresh, path)
                fresh.unlink()
                storage.sync_directory(path.parent)
            key = path.read_bytes()
        except OSError as error:
            raise StorageError(f"Can't keep the secret of protective draws in {path}: {error.strerror}.") from error
        if len(key) != KEY_BYTES:
            raise StorageError(f"{path} is damaged. Its run can't go on; begin a new one.")
        return cls(key)

    def derive(self, *labels: int | str) -> bytes:
        """Return 32 bytes that depend on the secret and every label, and tell nothing of other ones."""
        digest = hashlib.blake2b(key=self._key, digest_size=KEY_BYTES)
        for item in labels:
            data = str(item).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def generator(self, *labels: int | str) -> np.random.Generator:
        """Return a generator of draws that depend on the secret and every label."""
        chacha = registry.load_object("randomgen:ChaCha")
        return np.random.Generator(chacha(key=int.from_bytes(self.derive(*labels), "little"), rounds=20))

    def skellam(self, shape: tuple[int, ...], variance: float, *labels: int | str) -> Leaf:
        """Return whole draws (float64) of mean 0: differences of two Poisson ones, whose variances add up exactly."""

        def block(number: int, stop: int) -> Array:
            size = min(BLOCK, stop - number * BLOCK)
            generator = self.generator(*labels, number)
            drawn = generator.poisson(variance / 2, size) - generator.poisson(variance / 2, size)
            return drawn.astype(np.float64)

        return _in_blocks(shape, np.dtype(np.float64), block)

    def gaussian(self, shape: tuple[int, ...], dtype: np.dtype[np.generic], std: float, *labels: int | str) -> Leaf:
        """Return normal draws of standard deviation ``std``, made a block at a time where they are read."""

        def block(number: int, stop: int) -> Array:
            size = min(BLOCK, stop - number * BLOCK)
            return self.generator(*labels, number).standard_normal(size) * std

        return _in_blocks(shape, np.dtype(dtype), block)


def _in_blocks(shape: tuple[int, ...], dtype: np.dtype[np.generic], block: Callable[[int, int], Array]) -> Leaf:
    """Return a leaf of ``block(number, stop)``: the elements of one whole block, or up to ``stop``."""

    def read(start: int, stop: int, memo: Memo) -> Array:
        first = start // BLOCK
        drawn = [block(number, stop) for number in range(first, -(-stop // BLOCK))]
        whole = np.concatenate(drawn) if drawn else np.empty(0)
        return whole[start - first * BLOCK :].astype(dtype)

    return Leaf(shape, dtype, read)
