# SPDX-License-Identifier: Apache-2.0
"""A file's manifest, made while something else reads the file: so that nothing is read twice.

What is described is what has been read, byte for byte: a file that changes later is not the one of the manifest.

===============================================  ================================================================
a file that ended early, or was not read whole   StorageError when the manifest is asked for
more bytes than there were to be                 the same
===============================================  ================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from blake3 import blake3

from hansa.errors import StorageError
from hansa.transport.pieces import Manifest, Piece, lengths


class Describing:
    """Reads a file, and describes it on the way.

    Args:
        file: at its beginning.
        cuts: as :func:`hansa.transport.pieces.describe` takes them; it gives the same manifest.
    """

    def __init__(self, file: BinaryIO, cuts: Sequence[int]) -> None:
        self._file = file
        self._lengths = list(lengths(cuts))
        self._pieces: list[Piece] = []
        self._state = blake3()
        self._taken = 0  # of the piece at hand
        self._surplus = False

    def read(self, count: int, /) -> bytes:
        """Return the next bytes, ``count`` unless the file ends."""
        data = self._file.read(count)
        view = memoryview(data)
        while view and len(self._pieces) < len(self._lengths):
            length = self._lengths[len(self._pieces)]
            part = view[: length - self._taken]
            self._state.update(part)
            self._taken += len(part)
            view = view[len(part) :]
            if self._taken == length:
                self._pieces.append((length, self._state.digest()))
                self._taken, self._state = 0, blake3()
        self._surplus = self._surplus or bool(view)
        return data

    def manifest(self) -> Manifest:
        """Return what the file consists of.

        Raises:
            StorageError: what was read is not a file of such pieces.
        """
        if self._surplus or len(self._pieces) < len(self._lengths):
            raise StorageError("A file changed while it was described, or was not read to its end.")
        return Manifest(tuple(self._pieces))
