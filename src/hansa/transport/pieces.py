# SPDX-License-Identifier: Apache-2.0
"""Files in content-addressed pieces: what is here already is not sent, and what was cut off goes on.

A manifest lists a file's pieces in order, and its own digest is the file's address:

    magic      4 bytes    b"HPM1"
    piece*     36 bytes   length u32 (little-endian) · BLAKE3 digest

BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs. Pieces are cut where a value's tensors begin
(:func:`hansa.core.wire.cuts`), so a tensor that stayed as it was gives the pieces that it gave before.

===============================================  ================================================================
killed while a file arrives                      what has arrived is in ``NAME.part`` and is checked when it goes on
a piece with other bytes than its digest says    ChecksumError; it does not count as there
a disk that fills up                             StorageError; what is there stays and is used again
a manifest that promises too much                WireError before anything is written; no size is allocated ahead
equal pieces (zeros)                             travel once, but each counts as part of the file's size
ranges that overlap or descend                   WireError before anything is read
two receptions of one manifest at one path       both write the same bytes to the same places; either may finish
a donor that is gone, or was altered             its pieces are fetched like others
an empty file                                    no pieces; finished at once
===============================================  ================================================================
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from hansa.core import storage
from hansa.core.shared import shared
from hansa.errors import ChecksumError, StorageError, WireError

PIECE_BYTES = 1 << 20
"""How long pieces are where nothing says where to cut."""
MAX_PIECE_BYTES = (2 << 20) + (64 << 10)
MAX_MANIFEST_BYTES = 256 << 20
"""Room for seven million pieces: 7 TiB."""

_MAGIC = b"HPM1"
_PIECE = struct.Struct("<I32s")

Piece = tuple[int, bytes]
Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """What a file consists of.

    Attributes:
        pieces: (length in bytes, BLAKE3 digest) of each piece, in order.
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            WireError: these bytes are no manifest.
        """
        body = memoryview(data)[len(_MAGIC) :]
        if data[: len(_MAGIC)] != _MAGIC or len(body) % _PIECE.size or len(data) > MAX_MANIFEST_BYTES:
            raise WireError("These bytes are no manifest of a file.")
        pieces = tuple(_PIECE.iter_unpack(body))
        if any(not 0 < length <= MAX_PIECE_BYTES for length, _ in pieces):
            raise WireError(f"A manifest lists a piece that is empty or longer than {MAX_PIECE_BYTES} bytes.")
        return cls(pieces)

    def encode(self) -> bytes:
        """Return the manifest's bytes."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        return b"".join((_MAGIC, *(_PIECE.pack(*piece) for piece in self.pieces)))

    @cached_property
    def digest(self) -> str:
        """The manifest's BLAKE3 digest in hex: the file's address."""
        return blake3(self._encoded).hexdigest()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins, and where the last one ends."""
        return (0, *accumulate(length for length, _ in self.pieces))

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        return self.offsets[-1]


def describe(path: Path, cuts: Sequence[int] | None = None) -> Manifest:
    """Read a file once and return its manifest; a large one is read by two processors at once.

    Args:
        path: the file.
        cuts: where pieces begin, ascending from 0, and the file's size; each MiB if None. What lies between two cuts
            is cut further if it is too long for a piece.

    Raises:
        StorageError: the file can't be read, or shrinks while it is read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            cuts = (*range(0, size, PIECE_BYTES), size) if cuts is None else cuts
            if not cuts or cuts[0] != 0 or cuts[-1] != size or any(a > b for a, b in pairwise(cuts)):
                raise StorageError(f"{path} has {size} bytes, which is not where it was to be cut. Did it change?")
            found = list(lengths(cuts))
            pieces: list[Piece] = [(0, b"")] * len(found)

            def take(piece: tuple[int, int, int]) -> None:
                index, length, end = piece
                payload = os.pread(file.fileno(), length, end - length)
                if len(payload) != length:
                    raise StorageError(f"{path} became shorter while it was read.")
                pieces[index] = length, blake3(payload).digest()

            shared(size, take, zip(count(), found, accumulate(found)))
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    return Manifest(tuple(pieces))


def lengths(cuts: Sequence[int]) -> Iterator[int]:
    """Yield how long each piece is: what lies between two cuts, cut further where that is too long for one."""
    for begin, end in pairwise(cuts):
        step = end - begin if end - begin <= MAX_PIECE_BYTES else PIECE_BYTES
        for offset in range(begin, end, step or 1):
            yield min(step, end - offset)


def fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer with what a file holds from ``offset`` on.

    Raises:
        StorageError: the file can't be read, or ends before.
    """
    done = 0
    while done < len(view):
        try:
            step = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise StorageError(f"Can't read {path}: {error.strerror}.") from error
        if not step:
            raise StorageError(f"{path} is shorter than it was. Something outside Hansa changed it.")
        done += step


def as_ranges(indices: Iterable[int]) -> Ranges:
    """Return ascending indices as half-open ranges.

    >>> as_ranges([0, 1, 2, 7, 9, 10])
    [(0, 3), (7, 8), (9, 11)]
    """
    ranges: Ranges = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges


def in_ranges(ranges: Sequence[tuple[int, int]], manifest: Manifest) -> Iterator[int]:
    """Return the indices in ranges that came from the network.

    Raises:
        WireError: at once, if a range is empty, begins before the last one's end, or goes beyond the manifest.
    """
    last = 0
    for begin, end in ranges:
        if not last <= begin < end <= len(manifest.pieces):
            raise WireError(
                f"There are no pieces {begin} to {end} after {last}; the file has {len(manifest.pieces)}. "
                "Ranges ascend and do not overlap."
            )
        last = end
    return chain.from_iterable(range(begin, end) for begin, end in ranges)


class Incoming:
    """A file that is arriving, in ``NAME.part`` beside where it is to be; safe to use from several threads.

    To make one reads what is there already and what donors hold, which takes as long as reading them does.

    Args:
        path: where the file is to be; if it is there already, whole, nothing is missing.
        manifest: what it consists of.
        donors: files that may hold some of its pieces, with their manifests.
        max_bytes: the largest file that is accepted.
        spares: files that one which is new may be written over.

    Raises:
        WireError: the file would be too large.
        StorageError: the disk is full or the folder can't be written.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        donors: Sequence[tuple[Path, Manifest]] = (),
        *,
        max_bytes: int | None = None,
        spares: storage.Spares | None = None,
    ) -> None:
        if max_bytes is not None and manifest.num_bytes > max_bytes:
            raise WireError(f"{path.name} would have {manifest.num_bytes:,} bytes; at most {max_bytes:,} are accepted.")
        self.path = path
        self.manifest = manifest
        self._part = path.with_name(f"{path.name}.part")
        self._places: dict[Piece, list[int]] = {}
        for index, piece in enumerate(manifest.pieces):
            self._places.setdefault(piece, []).append(index)
        self._lacking = set(self._places)
        self._missing = manifest.num_bytes
        self._lock = threading.Lock()
        self._descriptor = -1
        self._whole = self._is_there()
        if not self._whole:
            try:
                begun = spares is None or not manifest.pieces or not spares.take(self._part, manifest.num_bytes)
                self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if begun:
                    self._take(self._part, manifest)
                for donor, described in donors:
                    self._take(donor, described)
            except OSError as error:
                self.close()
                raise self._failed(error) from error
            except BaseException:  # let go of what was begun; raised again
                self.close()
                raise

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what has arrived stays for the next time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def num_bytes_missing(self) -> int:
        """How many bytes are still to come."""
        return self._missing

    def missing(self) -> Ranges:
        """Return which pieces are still to come; of equal ones, the first."""
        with self._lock:
            return as_ranges(sorted(self._places[piece][0] for piece in self._lacking))

    def begin(self, index: int) -> Arrival:
        """Begin to take a piece.

        Raises:
            ChecksumError: there is no such piece.
        """
        if not 0 <= index < len(self.manifest.pieces):
            raise ChecksumError(f"{self.path.name} has no piece {index}.")
        return Arrival(self, index)

    def finish(self, *, durable: bool = True) -> None:
        """Make the file durable, unless it can be had again, and give it its name; every piece must be there.

        Raises:
            StorageError: the disk is full or fails.
        """
        assert not self._lacking, f"{self.path} is not complete"
        if self._whole:
            return
        try:
            os.ftruncate(self._descriptor, self.manifest.num_bytes)
            if durable:
                os.fsync(self._descriptor)
            try:
                self._part.rename(self.path)
            except FileNotFoundError:  # another reception of the same file came first
                if not os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                    raise
            if durable:
                storage.sync_directory(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        self._whole = True
        self.close()

    def _is_there(self) -> bool:
        try:
            if self.path.stat().st_size != self.manifest.num_bytes:
                return False
            found = {self.manifest.pieces[index] for index, _ in self._matching(self.path, self.manifest)}
        except OSError:
            return False
        if self._lacking - found:
            return False
        self._lacking.clear()
        self._missing = 0
        return True

    def _take(self, path: Path, manifest: Manifest) -> None:
        """Use what a file holds of what is lacking: this one's own beginning, or a donor."""
        for index, payload in self._matching(path, manifest):
            self._put(manifest.pieces[index], payload, there=index if path == self._part else None)

    def _matching(self, path: Path, manifest: Manifest) -> Iterator[tuple[int, memoryview]]:
        """Yield the lacking pieces that a file holds where its manifest says so: (index, payload)."""
        with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            buffer = memoryview(bytearray(min(MAX_PIECE_BYTES, size)))
            for index, (piece, offset) in enumerate(zip(manifest.pieces, manifest.offsets, strict=False)):
                if piece in self._lacking and offset + piece[0] <= size:
                    view = buffer[: piece[0]]
                    if os.preadv(file.fileno(), [view], offset) == piece[0] and blake3(view).digest() == piece[1]:
                        yield index, view

    def _put(self, piece: Piece, payload: memoryview, there: int | None = None) -> None:
        """Write a piece to all its places but ``there``, where it is."""
        for index in self._places[piece]:
            if index != there:
                self._write(payload, self.manifest.offsets[index])
        with self._lock:
            if piece in self._lacking:
                self._lacking.discard(piece)
                self._missing -= piece[0] * len(self._places[piece])

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"Can't write {self._part}: {error.strerror}. What has arrived is kept: free some space and repeat it."
        )


class Arrival:
    """A piece on its way into its file, a stretch at a time; `Incoming.begin` makes one.

    It is written as it comes, so that nobody has to hold it, and counts once it is known to be right.
    """

    def __init__(self, incoming: Incoming, index: int) -> None:
        self._incoming = incoming
        self._index = index
        self._hash = blake3()
        self._done = 0

    def add(self, payload: bytes | bytearray | memoryview) -> None:
        """Take the next stretch of it.

        Raises:
            ChecksumError: the piece is not as long as that.
            StorageError: the disk is full or fails.
        """
        incoming, manifest = self._incoming, self._incoming.manifest
        if self._done + len(payload) > manifest.pieces[self._index][0]:
            raise self._damaged()
        self._hash.update(payload)
        try:
            incoming._write(memoryview(payload), manifest.offsets[self._index] + self._done)
        except OSError as error:
            raise incoming._failed(error) from error
        self._done += len(payload)

    def finish(self) -> None:
        """Count it as there, and write it to its other places.

        Raises:
            ChecksumError: these are not the bytes that the manifest lists.
            StorageError: the disk is full or fails.
        """
        incoming = self._incoming
        piece = incoming.manifest.pieces[self._index]
        if (self._done, self._hash.digest()) != piece:
            raise self._damaged()
        try:
            payload = memoryview(b"")
            if len(incoming._places[piece]) > 1:
                payload = memoryview(os.pread(incoming._descriptor, piece[0], incoming.manifest.offsets[self._index]))
            incoming._put(piece, payload, there=self._index)
        except OSError as error:
            raise incoming._failed(error) from error

    def _damaged(self) -> ChecksumError:
        return ChecksumError(
            f"Piece {self._index} of {self._incoming.path.name} was damaged on its way, or its sender changed it."
        )
