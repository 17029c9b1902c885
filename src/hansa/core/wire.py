# SPDX-License-Identifier: Apache-2.0
"""The form in which values travel and are spooled: a header, then checksummed chunks of tensors.

    magic      6 bytes    b"HANSA\\0"
    format     u16        FORMAT
    length     u32        bytes of the header
    digest     u64        XXH3-64 of the header
    header     JSON       {"kind", "meta", "parts": {part: {tensor: [dtype, shape]}}}
    chunk*                tensor u32 · length u32 · offset u64 (bytes) · digest u64 (XXH3-64) · payload

All integers and elements are little-endian. Tensors come in canonical order (parts, then names, sorted), their
chunks in order, without gaps, of ``tree.BLOCK`` elements each but a tensor's last. So a reader knows every byte's
place: truncation, surplus, reordering and damage are all errors. Nothing is unpickled, names are never used as
paths, and no size is trusted before its bytes are there; memory is one chunk. There is no limit on a tensor's or a
value's size. Digests find damage, not malice: who sent a value is the transport's to know.
"""

from __future__ import annotations

import math
import os
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest as digest_of

from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.lazy import Leaf, Memo
from hansa.core.tree import Array, Parts, Spec, Tree
from hansa.core.values import MAX_NAME, MAX_NAMES, MAX_POINTS, Chunk, Header, Plan, Task, Update
from hansa.errors import ChecksumError, HansaError, NonFiniteError, StorageError, VersionError, WireError

FORMAT = 3
MAGIC = b"HANSA\0"
MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 20
MAX_DIMS = 32

_PREAMBLE = struct.Struct("<6sHIQ")
_FRAME = struct.Struct("<IIQQ")


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    meta: dict[str, Any]
    parts: dict[str, dict[str, tuple[str, list[int]]]]


@dataclass(frozen=True)
class Envelope:
    """A decoded header: the value's kind, its metadata, and the layout of its parts."""

    kind: str
    meta: Mapping[str, Any]
    layout: Mapping[str, Mapping[str, Spec]]

    def tensors(self) -> list[tuple[str, str, Spec]]:
        """Return (part, name, spec) in canonical order."""
        return [
            (part, name, self.layout[part][name]) for part in sorted(self.layout) for name in sorted(self.layout[part])
        ]


def write(file: BinaryIO, kind: str, meta: Mapping[str, Any], parts: Parts) -> int:
    """Write one value to ``file`` and return the number of bytes written.

    Raises:
        WireError: a tensor's dtype or name is none that a Hansa value may have.
    """
    encoded = Encoded(kind, meta, parts)
    for number in range(len(encoded.cuts) - 1):
        for data in encoded.piece(number):
            file.write(data)
    return encoded.cuts[-1]


class Encoded:
    """A value as the bytes of its file, a piece at a time, in any order, by any thread.

    Attributes:
        cuts: where the pieces begin, and the file's size; as :func:`cuts` says of the file.

    Raises:
        WireError: a tensor's dtype or name is none that a Hansa value may have.
    """

    def __init__(self, kind: str, meta: Mapping[str, Any], parts: Parts) -> None:
        layout = {
            part: {name: (_sendable(name, leaf), list(leaf.shape)) for name, leaf in trees.leaves(tree).items()}
            for part, tree in parts.items()
        }
        try:
            head = msgspec.json.encode(_Head(kind, dict(meta), layout))
        except UnicodeEncodeError as error:
            raise WireError(f"The name {error.object!r} is not valid text.") from None
        self._parts = parts
        self._head = [_PREAMBLE.pack(MAGIC, FORMAT, len(head), digest_of(head)), head]
        self._tensors = [
            (part, name, Spec(dtype, tuple(shape)))
            for part in sorted(layout)
            for name, (dtype, shape) in sorted(layout[part].items())
        ]
        self.cuts, self._begins = _places(_PREAMBLE.size + len(head), [spec for _, _, spec in self._tensors])
        self._last: tuple[int, Array] | None = None

    def piece(self, number: int) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a piece, which are computed now."""
        if number == 0:
            yield from self._head
            return
        index, start = self._begins[number - 1]
        left = self.cuts[number + 1] - self.cuts[number]
        while left:
            spec = self._tensors[index][2]
            if start >= spec.size:
                index, start = index + 1, 0
                continue
            dtype = trees.dtype_of(spec.dtype)
            payload = np.ascontiguousarray(trees.block(self._leaf(index), start), dtype).view(np.uint8).data
            yield _FRAME.pack(index, len(payload), start * dtype.itemsize, digest_of(payload))
            yield payload
            left -= _FRAME.size + len(payload)
            start += trees.BLOCK

    def _leaf(self, index: int) -> Array:
        """Return a tensor; the last one is kept, for some are computed when they are asked for."""
        last = self._last  # one look: threads share it
        if last is None or last[0] != index:
            part, name, _ = self._tensors[index]
            self._last = last = index, trees.leaves(self._parts[part])[name]
        return last[1]


def _places(begin: int, specs: Sequence[Spec]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return where a file is cut whose tensors begin at ``begin``, and at which (tensor, element) each piece does.

    The first piece, of the header, begins at none.
    """
    cuts, begins = [0], []
    end = begin
    for index, spec in enumerate(specs):
        itemsize = int(trees.dtype_of(spec.dtype).itemsize)
        for start in range(0, spec.size, trees.BLOCK):
            step = _FRAME.size + itemsize * min(trees.BLOCK, spec.size - start)
            if end == begin or end + step - cuts[-1] > PIECE_BYTES + _FRAME.size:
                cuts.append(end)
                begins.append((index, start))
            end += step
    return [*cuts, end], begins


def _sendable(name: str, leaf: Array) -> str:
    if leaf.dtype.name not in trees.dtype_names():
        raise WireError(
            f"Tensor {name!r} is {leaf.dtype.name}, which can't be sent; cast it to one of: "
            f"{', '.join(trees.dtype_names())}."
        )
    return leaf.dtype.name


def _shown(text: str) -> str:
    """Return what a stranger wrote, short enough for a message."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


class Source(Protocol):
    """What a value is read from."""

    def read(self, count: int, /) -> bytes:
        """Return the next bytes, ``count`` unless there are fewer."""
        ...


def _read_exactly(file: Source, count: int, what: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise WireError(f"The value ends inside {what}: {len(data)} of {count} bytes are there.")
    return data


def read_envelope(file: Source) -> Envelope:
    """Read and check the header; ``file`` is then at the first chunk.

    Raises:
        WireError: the bytes are no Hansa value, or their sizes are absurd.
        VersionError: they are in a format that this release does not read.
        ChecksumError: the header is damaged.
    """
    magic, version, length, digest = _PREAMBLE.unpack(_read_exactly(file, _PREAMBLE.size, "the preamble"))
    if magic != MAGIC:
        raise WireError("These bytes are not a Hansa value (wrong magic number).")
    if version != FORMAT:
        raise VersionError(f"The value has wire format {version}; this release reads format {FORMAT}.")
    if length > MAX_HEADER_BYTES:
        raise WireError(f"The header claims {length} bytes; at most {MAX_HEADER_BYTES} are read.")
    raw = _read_exactly(file, length, "the header")
    if digest_of(raw) != digest:
        raise ChecksumError("The header is damaged (its checksum does not match).")
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"The header is malformed: {_shown(str(error))}.") from None
    if sum(len(tensors) for tensors in head.parts.values()) > MAX_TENSORS:
        raise WireError(f"The header names more than {MAX_TENSORS} tensors.")
    layout = {
        part: {name: _spec(name, dtype, shape) for name, (dtype, shape) in tensors.items()}
        for part, tensors in head.parts.items()
    }
    return Envelope(head.kind, head.meta, layout)


def _spec(name: str, dtype: str, shape: list[int]) -> Spec:
    if dtype not in trees.dtype_names():
        raise WireError(f"Tensor {_shown(name)} has an unknown dtype {_shown(dtype)}.")
    # Sides of 0 do not save a shape whose other sides are too large for NumPy.
    sides = [max(side, 1) for side in shape[: MAX_DIMS + 1]]
    too_big = len(shape) > MAX_DIMS or Spec(dtype, tuple(sides)).num_bytes >= 1 << 63
    if too_big or min(shape, default=0) < 0:
        raise WireError(f"Tensor {_shown(name)} has an impossible shape {_shown(str(shape[:MAX_DIMS]))}.")
    return Spec(dtype, tuple(shape))


def read_chunks(file: Source, envelope: Envelope) -> Iterator[Chunk]:
    """Yield every chunk after the header, checked; the whole value has been read when it ends.

    Raises:
        WireError: a chunk is out of order, too long, missing, or bytes follow the last one.
        ChecksumError: a chunk is damaged.
    """
    for index, (part, name, spec) in enumerate(envelope.tensors()):
        dtype = trees.dtype_of(spec.dtype)
        offset = 0
        while offset < spec.num_bytes:
            where = f"tensor {_shown(name)} of {_shown(part)} at byte {offset}"
            head = _read_exactly(file, _FRAME.size, where)
            expected = min(trees.BLOCK * dtype.itemsize, spec.num_bytes - offset)
            _check_frame(head, index, offset, expected, where)
            payload = _read_exactly(file, expected, where)
            _check_payload(head, payload, dtype, where)
            yield Chunk(part, name, offset // dtype.itemsize, np.frombuffer(payload, dtype))
            offset += expected
    if file.read(1):
        raise WireError("Bytes follow the last chunk.")


def _check_frame(head: bytes, index: int, offset: int, length: int, where: str) -> None:
    tensor, claimed, start, _ = _FRAME.unpack(head)
    if tensor != index or start != offset:
        raise WireError(f"A chunk is out of order: expected {where}.")
    if claimed != length:
        raise WireError(f"A chunk has {claimed} bytes instead of {length}: {where}.")


def _check_payload(head: bytes, payload: bytes | memoryview, dtype: np.dtype[Any], where: str) -> None:
    if digest_of(payload) != _FRAME.unpack(head)[-1]:
        raise ChecksumError(f"A chunk is damaged (its checksum does not match): {where}.")
    if dtype == np.bool_ and bytes(payload).translate(None, b"\0\1"):
        raise WireError(f"A boolean is neither 0 nor 1: {where}.")


PIECE_BYTES = 1 << 20
"""About how many bytes of a value's file travel at a time."""


def cuts(path: Path) -> list[int]:
    """Return where the file of a value may be cut for the journey: the offsets at which its pieces begin, and its end.

    The first piece is all that comes before the first tensor. The others hold about ``PIECE_BYTES`` of tensors and
    depend on the layout alone, so tensors that stay as they were give the same pieces whatever the header says.

    Raises:
        WireError: the file is no Hansa value.
        StorageError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            envelope = read_envelope(file)
            end = file.tell()
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    return _places(end, [spec for _, _, spec in envelope.tensors()])[0]


def read_parts(file: BinaryIO, envelope: Envelope) -> dict[str, dict[str, Array]]:
    """Read all chunks into whole tensors, in the writer's order; memory grows only as bytes arrive."""
    buffers = {part: {name: bytearray() for name in layout} for part, layout in envelope.layout.items()}
    for chunk in read_chunks(file, envelope):
        buffers[chunk.part][chunk.tensor] += chunk.values.view(np.uint8).data
    return {
        part: {
            name: np.frombuffer(buffers[part][name], trees.dtype_of(spec.dtype)).reshape(spec.shape)
            for name, spec in layout.items()
        }
        for part, layout in envelope.layout.items()
    }


def open_parts(path: Path, *, lazily: bool = False) -> tuple[Envelope, dict[str, Tree]]:
    """Return the header and the parts of a value in a file; those of a large value are read when they are asked for.

    Args:
        path: the file.
        lazily: whether those of a small one are, too.

    Every chunk is checked each time it is read. The file is held open, so it may be deleted meanwhile.

    Raises:
        WireError: at once or, what only a chunk tells, when that is read: as :func:`read_chunks`.
        StorageError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            envelope = read_envelope(file)
            if not lazily and sum(spec.num_bytes for _, _, spec in envelope.tensors()) <= trees.LARGE:
                return envelope, dict(read_parts(file, envelope))
            return envelope, _Stored(path, file.fileno(), file.tell(), envelope).parts()
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error


class _Stored:
    """The tensors of a value in an open file.

    A block that was read in part is kept: who reads in steps that are not this file's needs each one twice in a row.
    """

    def __init__(self, path: Path, descriptor: int, begin: int, envelope: Envelope) -> None:
        self._path = path
        self._envelope = envelope
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._last: tuple[tuple[int, int], Array] | None = None
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        for index, (part, name, spec) in enumerate(envelope.tensors()):
            self._places[part, name] = index, begin
            begin += spec.num_bytes + _FRAME.size * -(-spec.size // trees.BLOCK)
        size = os.fstat(descriptor).st_size
        if size != begin:
            raise WireError(f"The value ends {'inside a tensor' if size < begin else 'before its file'}: {path}.")

    def parts(self) -> dict[str, Tree]:
        return {
            part: trees.Lazy({name: self._leaf(part, name, spec) for name, spec in layout.items()})
            for part, layout in self._envelope.layout.items()
        }

    def _leaf(self, part: str, name: str, spec: Spec) -> Leaf:
        dtype = trees.dtype_of(spec.dtype)
        index, begin = self._places[part, name]

        def block(number: int, stop: int) -> Array:
            last = self._last  # one look: threads share it
            if last is not None and last[0] == (index, number):
                return last[1]
            offset = number * trees.BLOCK * dtype.itemsize
            length = min(trees.BLOCK * dtype.itemsize, spec.num_bytes - offset)
            where = f"tensor {_shown(name)} of {_shown(part)} at byte {offset}, in {self._path}"
            raw = self._read(begin + number * (_FRAME.size + trees.BLOCK * dtype.itemsize), _FRAME.size + length, where)
            head, payload = raw[: _FRAME.size], memoryview(raw)[_FRAME.size :]
            _check_frame(head, index, offset, length, where)
            _check_payload(head, payload, dtype, where)
            found = np.frombuffer(payload, dtype)
            self._last = ((index, number), found) if stop < min((number + 1) * trees.BLOCK, spec.size) else None
            return found

        def read(start: int, stop: int, memo: Memo) -> Array:
            if start == stop:
                return np.empty(0, dtype)
            edges = range(start - start % trees.BLOCK, stop, trees.BLOCK)
            found = [block(edge // trees.BLOCK, stop)[max(start - edge, 0) : stop - edge] for edge in edges]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return Leaf(spec.shape, dtype, read)

    def _read(self, position: int, count: int, where: str) -> bytes:
        try:
            raw = os.pread(self._descriptor, count, position)
        except OSError as error:
            raise StorageError(f"Can't read {where}: {error.strerror}.") from error
        if len(raw) != count:
            raise WireError(f"The value ends inside {where}: {len(raw)} of {count} bytes are there.")
        return raw


def _meta(envelope: Envelope, kind: str, shape: type[Any]) -> Any:
    if envelope.kind != kind:
        raise WireError(f"Expected a value of kind {kind!r}, got {_shown(envelope.kind)}.")
    try:
        return msgspec.convert(envelope.meta, shape)
    except msgspec.ValidationError as error:
        raise WireError(f"The {kind}'s metadata are malformed: {error}.") from None


_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


_Step = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Points = Annotated[list[tuple[_Step | None, float | None]], msgspec.Meta(max_length=MAX_POINTS)]


class _UpdateMeta(msgspec.Struct, forbid_unknown_fields=True):
    site: str
    round: _Number
    version: _Number
    weight: float
    sums: dict[str, float]
    completed: Annotated[float, msgspec.Meta(gt=0, le=1)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    logged: Annotated[dict[_Name, _Points], msgspec.Meta(max_length=MAX_NAMES)] = {}


class _PlanMeta(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    job: str
    round: _Number
    task: Task
    version: _Number
    seed: _Number
    inbox: str | None
    outbox: str | None
    deadline_s: float | None
    acknowledged: dict[str, int]
    sealed: str | None = None


_PARAMS = "params"


def write_update(file: BinaryIO, update: Update) -> int:
    """Write an update; returns the number of bytes.

    Raises:
        NonFiniteError: its weight or a metric is NaN or infinite, which the format does not hold.
    """
    sums = {name: float(value) for name, value in update.sums.items()}
    for name, value in {"weight": update.weight, **sums}.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"The update's {name} is {value}.", site=update.site, round=update.round)
    meta = _UpdateMeta(
        update.site,
        update.round,
        update.version,
        float(update.weight),
        sums,
        float(update.completed),
        float(update.seconds),
        {name: list(points) for name, points in update.logged.items()},
    )
    return write(file, "update", msgspec.to_builtins(meta), update.parts)


def write_plan(file: BinaryIO, plan: Plan) -> int:
    """Write a plan; returns the number of bytes."""
    return write(file, *_of_plan(plan))


def encoded_plan(plan: Plan) -> Encoded:
    """Return a plan as the bytes of its file."""
    return Encoded(*_of_plan(plan))


def _of_plan(plan: Plan) -> tuple[str, Mapping[str, Any], Parts]:
    assert _PARAMS not in plan.parts, "a strategy's part may not be called 'params'"
    meta = _PlanMeta(
        plan.job,
        plan.round,
        plan.task,
        plan.version,
        plan.seed,
        plan.inbox,
        plan.outbox,
        plan.deadline_s,
        dict(plan.acknowledged),
        plan.sealed,
    )
    return "plan", msgspec.to_builtins(meta), {**plan.parts, _PARAMS: plan.params}


def read_plan(file: BinaryIO) -> Plan:
    """Read a plan written by :func:`write_plan`, whole."""
    envelope = read_envelope(file)
    meta: _PlanMeta = _meta(envelope, "plan", _PlanMeta)
    return _plan(meta, read_parts(file, envelope))


def open_plan(path: Path, *, lazily: bool = False) -> Plan:
    """Return the plan in a file; a large one's tensors are read when they are asked for (:func:`open_parts`)."""
    envelope, parts = open_parts(path, lazily=lazily)
    return _plan(_meta(envelope, "plan", _PlanMeta), parts)


def _plan(meta: _PlanMeta, parts: Mapping[str, Tree]) -> Plan:
    if _PARAMS not in parts:
        raise WireError("The plan carries no parameters.")
    return Plan(
        meta.job,
        meta.round,
        meta.task,
        meta.version,
        parts[_PARAMS],
        {part: tree for part, tree in parts.items() if part != _PARAMS},
        meta.seed,
        meta.inbox,
        meta.outbox,
        meta.sealed,
        meta.deadline_s,
        meta.acknowledged,
    )


def read_update(file: BinaryIO) -> Update:
    """Read a whole update written by :func:`write_update`."""
    envelope = read_envelope(file)
    header = header_of(envelope)
    return Update(
        header.site,
        header.round,
        header.version,
        read_parts(file, envelope),
        header.weight,
        header.sums,
        header.completed,
        header.seconds,
        header.logged,
    )


def header_of(envelope: Envelope) -> Header:
    """Return what an update's header says (WireError: it is none of an update)."""
    meta: _UpdateMeta = _meta(envelope, "update", _UpdateMeta)
    return Header(
        meta.site,
        meta.round,
        meta.version,
        envelope.layout,
        meta.weight,
        meta.sums,
        meta.completed,
        meta.seconds,
        meta.logged,
    )


class Spooled:
    """An update in a file: read a chunk at a time, as often as needed, and deleted by :meth:`release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._header = header_of(read_envelope(file))
        except OSError as error:
            raise StorageError(f"Can't read the spooled update {path}: {error.strerror}.") from error

    @property
    def header(self) -> Header:
        """Everything but the tensors."""
        return self._header

    @property
    def parts(self) -> Parts:
        """All tensors; those of a large update are read when they are asked for."""
        return open_parts(self.path)[1]

    def chunks(self) -> Iterator[Chunk]:
        """Yield all tensors in canonical order, a chunk at a time, checking every checksum."""
        try:
            with self.path.open("rb") as file:
                yield from read_chunks(file, read_envelope(file))
        except OSError as error:
            raise StorageError(f"Can't read the spooled update {self.path}: {error.strerror}.") from error

    def release(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def spool(update: Update, path: Path) -> Spooled:
    """Write ``update`` to ``path`` and return a handle on it.

    Raises:
        StorageError: the disk is full or the folder can't be written.
        NonFiniteError: it holds what can't be sent, and no file is left.
    """
    try:
        with storage.rewritten(path) as file:
            write_update(file, update)
    except HansaError:
        path.unlink(missing_ok=True)
        raise
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"Can't spool the update of site {update.site!r} to {path}: {error.strerror}. "
            "Free some space or set output.dir to a larger disk, then resume."
        ) from error
    return Spooled(path)
