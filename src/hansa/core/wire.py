# SPDX-License-Identifier: Apache-2.0
"""The form in which values travel and are spooled: a header, then checksummed chunks of tensors.

    magic      6 bytes    b"HANSA\\0"
    format     u16        FORMAT
    length     u32        bytes of the header
    crc        u32        CRC-32 of the header
    header     JSON       {"kind", "meta", "parts": {part: {tensor: [dtype, shape]}}}
    chunk*                tensor u32 · offset u64 (bytes) · length u32 · crc u32 · payload

All integers are little-endian. Tensors come in canonical order (parts, then names, sorted), their chunks in
order and without gaps, so a reader knows the exact number of bytes to expect: truncation, surplus, reordering
and damage are all errors. Nothing is unpickled, and no size is trusted before it is checked; memory is one
chunk. There is no limit on a tensor's or a value's size.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from hansa.core import tree as trees
from hansa.core.tree import Array, Parts, Spec
from hansa.core.values import Chunk, Header, Plan, Task, Update
from hansa.errors import ChecksumError, StorageError, VersionError, WireError

FORMAT = 1
MAGIC = b"HANSA\0"
MAX_HEADER_BYTES = 64 << 20
MAX_CHUNK_BYTES = 16 << 20
MAX_TENSORS = 1 << 20
MAX_DIMS = 32

_PREAMBLE = struct.Struct("<6sHII")
_FRAME = struct.Struct("<IQII")


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
    """Write one value to ``file`` and return the number of bytes written."""
    layout = {
        part: {name: (leaf.dtype.name, list(leaf.shape)) for name, leaf in tree.items()} for part, tree in parts.items()
    }
    head = msgspec.json.encode(_Head(kind, dict(meta), layout))
    written = file.write(_PREAMBLE.pack(MAGIC, FORMAT, len(head), zlib.crc32(head)))
    written += file.write(head)
    index = 0
    for part in sorted(parts):
        for name in sorted(parts[part]):
            leaf = parts[part][name]
            for start, values in trees.blocks(np.ascontiguousarray(leaf)):
                payload = memoryview(values.view(np.uint8)) if values.size else memoryview(b"")
                frame = _FRAME.pack(index, start * leaf.itemsize, len(payload), zlib.crc32(payload))
                written += file.write(frame)
                written += file.write(payload)
            index += 1
    return written


def _read_exactly(file: BinaryIO, count: int, what: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise WireError(f"The value ends inside {what}: {len(data)} of {count} bytes are there.")
    return data


def read_envelope(file: BinaryIO) -> Envelope:
    """Read and check the header; ``file`` is then at the first chunk.

    Raises:
        WireError: the bytes are no Hansa value, or their sizes are absurd.
        VersionError: they are in a format that this release does not read.
        ChecksumError: the header is damaged.
    """
    magic, version, length, crc = _PREAMBLE.unpack(_read_exactly(file, _PREAMBLE.size, "the preamble"))
    if magic != MAGIC:
        raise WireError("These bytes are not a Hansa value (wrong magic number).")
    if version != FORMAT:
        raise VersionError(f"The value has wire format {version}; this release reads format {FORMAT}.")
    if length > MAX_HEADER_BYTES:
        raise WireError(f"The header claims {length} bytes; at most {MAX_HEADER_BYTES} are read.")
    raw = _read_exactly(file, length, "the header")
    if zlib.crc32(raw) != crc:
        raise ChecksumError("The header is damaged (its checksum does not match).")
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"The header is malformed: {error}.") from None
    if sum(len(tensors) for tensors in head.parts.values()) > MAX_TENSORS:
        raise WireError(f"The header names more than {MAX_TENSORS} tensors.")
    layout = {
        part: {name: _spec(name, dtype, shape) for name, (dtype, shape) in tensors.items()}
        for part, tensors in head.parts.items()
    }
    return Envelope(head.kind, head.meta, layout)


def _spec(name: str, dtype: str, shape: list[int]) -> Spec:
    if dtype not in trees.dtype_names():
        raise WireError(f"Tensor {name!r} has an unknown dtype {dtype!r}.")
    if len(shape) > MAX_DIMS or any(side < 0 for side in shape):
        raise WireError(f"Tensor {name!r} has an impossible shape {shape}.")
    spec = Spec(dtype, tuple(shape))
    if spec.num_bytes >= 1 << 63:
        raise WireError(f"Tensor {name!r} has an impossible shape {shape}.")
    return spec


def read_chunks(file: BinaryIO, envelope: Envelope) -> Iterator[Chunk]:
    """Yield every chunk after the header, checked; the whole value has been read when it ends.

    Raises:
        WireError: a chunk is out of order, too long, missing, or bytes follow the last one.
        ChecksumError: a chunk is damaged.
    """
    for index, (part, name, spec) in enumerate(envelope.tensors()):
        dtype = trees.dtype_of(spec.dtype)
        offset = 0
        while offset < spec.num_bytes:
            where = f"{part}/{name} at byte {offset}"
            tensor, start, length, crc = _FRAME.unpack(_read_exactly(file, _FRAME.size, where))
            if tensor != index or start != offset:
                raise WireError(f"A chunk is out of order: expected {where}.")
            if not 0 < length <= min(MAX_CHUNK_BYTES, spec.num_bytes - offset) or length % dtype.itemsize:
                raise WireError(f"A chunk of {length} bytes does not fit {where}.")
            payload = _read_exactly(file, length, where)
            if zlib.crc32(payload) != crc:
                raise ChecksumError(f"A chunk is damaged (its checksum does not match): {where}.")
            yield Chunk(part, name, offset // dtype.itemsize, np.frombuffer(payload, dtype))
            offset += length
    if file.read(1):
        raise WireError("Bytes follow the last chunk.")


def read_parts(file: BinaryIO, envelope: Envelope) -> dict[str, dict[str, Array]]:
    """Read all chunks into whole tensors, allocated only as their bytes arrive."""
    parts: dict[str, dict[str, Array]] = {part: {} for part in envelope.layout}
    pending: dict[tuple[str, str], list[Array]] = {}
    for part, name, spec in envelope.tensors():
        if spec.size == 0:
            parts[part][name] = np.zeros(spec.shape, trees.dtype_of(spec.dtype))
    for chunk in read_chunks(file, envelope):
        spec = envelope.layout[chunk.part][chunk.tensor]
        key = (chunk.part, chunk.tensor)
        pieces = pending.setdefault(key, [])
        pieces.append(chunk.values)
        if chunk.start + chunk.values.size == spec.size:
            whole = np.concatenate(pieces) if len(pieces) > 1 else pieces[0].copy()
            parts[chunk.part][chunk.tensor] = whole.reshape(spec.shape)
            del pending[key]
    return parts


def _meta(envelope: Envelope, kind: str, shape: type[Any]) -> Any:
    if envelope.kind != kind:
        raise WireError(f"Expected a value of kind {kind!r}, got {envelope.kind!r}.")
    try:
        return msgspec.convert(envelope.meta, shape)
    except msgspec.ValidationError as error:
        raise WireError(f"The {kind}'s metadata are malformed: {error}.") from None


class _UpdateMeta(msgspec.Struct, forbid_unknown_fields=True):
    site: str
    round: int
    version: int
    weight: float
    sums: dict[str, float]
    completed: float
    seconds: float


class _PlanMeta(msgspec.Struct, forbid_unknown_fields=True):
    job: str
    round: int
    task: Task
    version: int
    seed: int
    inbox: str | None
    outbox: str | None
    deadline_s: float | None
    acknowledged: dict[str, int]


_PARAMS = "params"


def write_update(file: BinaryIO, update: Update) -> int:
    """Write an update; returns the number of bytes."""
    meta = _UpdateMeta(
        update.site,
        update.round,
        update.version,
        update.weight,
        dict(update.sums),
        update.completed,
        update.seconds,
    )
    return write(file, "update", msgspec.to_builtins(meta), update.parts)


def write_plan(file: BinaryIO, plan: Plan) -> int:
    """Write a plan; returns the number of bytes."""
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
    )
    return write(file, "plan", msgspec.to_builtins(meta), {**plan.parts, _PARAMS: plan.params})


def read_plan(file: BinaryIO) -> Plan:
    """Read a plan written by :func:`write_plan`."""
    envelope = read_envelope(file)
    meta: _PlanMeta = _meta(envelope, "plan", _PlanMeta)
    parts = read_parts(file, envelope)
    if _PARAMS not in parts:
        raise WireError("The plan carries no parameters.")
    params = parts.pop(_PARAMS)
    return Plan(
        meta.job,
        meta.round,
        meta.task,
        meta.version,
        params,
        parts,
        meta.seed,
        meta.inbox,
        meta.outbox,
        meta.deadline_s,
        meta.acknowledged,
    )


def read_update(file: BinaryIO) -> Update:
    """Read a whole update written by :func:`write_update`."""
    envelope = read_envelope(file)
    header = _header(envelope)
    return Update(
        header.site,
        header.round,
        header.version,
        read_parts(file, envelope),
        header.weight,
        header.sums,
        header.completed,
        header.seconds,
    )


def _header(envelope: Envelope) -> Header:
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
    )


class Spooled:
    """An update in a file: read a chunk at a time, as often as needed, and deleted by :meth:`release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._header = _header(read_envelope(file))
        except OSError as error:
            raise StorageError(f"Can't read the spooled update {path}: {error.strerror}.") from error

    @property
    def header(self) -> Header:
        """Everything but the tensors."""
        return self._header

    def chunks(self) -> Iterator[Chunk]:
        """Yield all tensors in canonical order, a chunk at a time, checking every checksum."""
        with self.path.open("rb") as file:
            yield from read_chunks(file, read_envelope(file))

    def release(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def spool(update: Update, path: Path) -> Spooled:
    """Write ``update`` to ``path`` and return a handle on it.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    try:
        with path.open("wb") as file:
            write_update(file, update)
    except OSError as error:
        raise StorageError(
            f"Can't spool the update of site {update.site!r} to {path}: {error.strerror}. "
            "Free some space or set output.dir to a larger disk, then run again with --resume."
        ) from error
    return Spooled(path)
