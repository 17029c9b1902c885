# SPDX-License-Identifier: Apache-2.0
"""A file's manifest, made while something else reads the file, or while it is written: so nothing is read for it.

What is described is what was read or written, byte for byte: a file that changes later is not the one of the manifest.

===============================================  ================================================================
a file that ended early, or was not read whole   StorageError when the manifest is asked for
more bytes than there were to be                 the same
a header that is too long for a piece            several pieces
===============================================  ================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import BinaryIO

from blake3 import blake3

from hansa.core import storage
from hansa.core.shared import shared
from hansa.core.wire import Encoded
from hansa.errors import StorageError
from hansa.transport.pieces import Manifest, Piece, lengths


class Describing:
    """Reads a file, and describes it on the way.

    Args:
        file: at its beginning.
        cuts: as :func:`hansa.transport.pieces.describe` takes them, which gives the same manifest.
    """

    def __init__(self, file: BinaryIO, cuts: Sequence[int]) -> None:
        self._file = file
        self._digests = _Digests(cuts)

    def read(self, count: int, /) -> bytes:
        """Return the next bytes, ``count`` unless the file ends."""
        data = self._file.read(count)
        self._digests.take(data)
        return data

    def manifest(self) -> Manifest:
        """Return what the file consists of.

        Raises:
            StorageError: what was read is not a file of such pieces.
        """
        return Manifest(tuple(self._digests.pieces()))


def write(file: BinaryIO, value: Encoded) -> Manifest:
    """Write a value to the beginning of a file, where ``file`` stands, and return the manifest.

    Of a large value two pieces are computed and written at once; ``file`` is at its end then.

    Raises:
        OSError: the disk is full or fails.
    """
    found: list[list[Piece]] = [[] for _ in value.cuts[1:]]

    def put(number: int) -> None:
        offset = value.cuts[number]
        digests = _Digests(value.cuts[number : number + 2])
        parts = [*value.piece(number)]
        for data in parts if len(parts) <= 2 else [b"".join(parts)]:
            digests.take(data)
            storage.write_at(file.fileno(), memoryview(data), offset)
            offset += len(data)
        found[number] = digests.pieces()

    shared(value.cuts[-1], put, range(len(found)))
    file.seek(value.cuts[-1])
    return Manifest(tuple(chain.from_iterable(found)))


class _Digests:
    """The digests of the pieces of some bytes that come in order."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self._lengths = list(lengths(cuts))
        self._pieces: list[Piece] = []
        self._state = blake3()
        self._taken = 0  # of the piece at hand
        self._surplus = False

    def take(self, data: bytes | memoryview) -> None:
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

    def pieces(self) -> list[Piece]:
        if self._surplus or len(self._pieces) < len(self._lengths):
            raise StorageError("A file changed while it was described, or was not read to its end.")
        return self._pieces
