# SPDX-License-Identifier: Apache-2.0
"""Trees on disk as safetensors, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hansa.core import tree as trees
from hansa.core.tree import Array, Tree
from hansa.errors import StorageError, WireError

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash at any instant leaves the old file or the new one.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise full(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it can't be read or is no JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged: {error}.") from error


def full(path: Path, error: OSError) -> StorageError:
    """Return the error to raise when ``path`` could not be written."""
    return StorageError(
        f"Can't write {path}: {error.strerror}. Free some space or choose another output.dir; "
        "the finished rounds are safe, and --resume goes on from the last one."
    )


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make the folder ``temporary`` appear as ``final``, whole, after its files are durable."""
    try:
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            else:
                sync_directory(path)
        sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        sync_directory(final.parent)
    except OSError as error:
        raise full(final, error) from error


def save_tree(path: Path, tree: Tree, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tree`` as a safetensors file.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    contiguous = {name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in tree.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise StorageError(
            f"Can't write {path}: {error}. Free some space or choose another output.dir; "
            "the finished rounds are safe, and --resume goes on from the last one."
        ) from error
    except OSError as error:
        raise full(path, error) from error


def load_tree(path: Path) -> dict[str, Array]:
    """Map a safetensors file into memory and return its tensors, read-only, bfloat16 included.

    Raises:
        StorageError: the file can't be read.
        WireError: it is no well-formed safetensors file.
    """
    try:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    length = int.from_bytes(data[:8].tobytes(), "little") if data.size >= 8 else -1
    if not 0 <= length <= min(100 << 20, data.size - 8):
        raise WireError(f"{path} is no safetensors file.")
    try:
        head = msgspec.json.decode(data[8 : 8 + length].tobytes(), type=dict[str, dict[str, Any]])
        head.pop("__metadata__", None)
        return {name: _leaf(data[8 + length :], entry) for name, entry in head.items()}
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise WireError(f"{path} is no well-formed safetensors file: {error}.") from error


def _leaf(data: Array, entry: Mapping[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    dtype = trees.dtype_of(_NAMES[entry["dtype"]])
    spec = trees.Spec(dtype.name, tuple(entry["shape"]))
    if not 0 <= begin <= end <= data.size or end - begin != spec.num_bytes:
        raise ValueError("a tensor lies outside the file")
    return np.frombuffer(data[begin:end], dtype).reshape(spec.shape)
