# SPDX-License-Identifier: Apache-2.0
"""Trees on disk as safetensors, and files that are there whole or not at all.

safetensors is written and read here, not by the library, so that a tree is streamed tensor by tensor, mapped when
it is read, and bfloat16 is a dtype like any other: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from hansa.core import tree as trees
from hansa.core.shared import shared
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
_CODES = {name: code for code, name in _NAMES.items()}

MAX_HEADER_BYTES = 100 << 20
"""The largest header that the safetensors library reads."""


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


def write_whole(path: Path, data: bytes, spares: Spares | None = None) -> None:
    """Write ``data`` to ``path`` so that whoever looks finds all of it or what was there before; it is not durable.

    Args:
        path: where to; of two writers of one path, only one at a time.
        data: what.
        spares: files that a large one may be written over.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        if spares is not None:
            temporary.unlink(missing_ok=True)
            spares.take(temporary, len(data))
        with rewritten(temporary) as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise full(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON (:func:`to_json`), atomically."""
    write_atomic(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Return ``value`` as indented JSON; NumPy numbers become plain ones, and NaN becomes null."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=2) + b"\n"


def link(source: Path, target: Path) -> None:
    """Give the file ``source`` the second name ``target``, or a copy of it where a file can't have two.

    Raises:
        OSError: the disk is full or the folder can't be written.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise NotImplementedError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it can't be read or is no JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} is damaged: {error}.") from error


def num_bytes(path: Path) -> int:
    """Return a file's size; 0 where there is none, or it can't be told: whoever reads it then says so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def full(path: Path, error: OSError) -> StorageError:
    """Return the error to raise when ``path`` could not be written."""
    return StorageError(
        f"Can't write {path}: {error.strerror}. Free some space or choose another output.dir; "
        "the finished rounds are safe, and resuming goes on from the last one."
    )


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    _sync(path)


def sync(paths: Collection[Path]) -> None:
    """Make files, and what folders list, durable; all of it is when this returns.

    They are synced at once, in threads: a disk does that in about the time of one.

    Raises:
        OSError: one can't be opened or synced; none may be taken for durable then.
    """
    first, *others = paths
    syncing = [_syncing().submit(_sync, path) for path in others]
    try:
        _sync(first)
    finally:
        wait(syncing)
    for done in syncing:
        done.result()


@contextlib.contextmanager
def syncing(path: Path) -> Iterator[None]:
    """Make a file durable beside whatever else is done; it is when this ends.

    Raises:
        OSError: it can't be opened or synced.
    """
    done = _syncing().submit(_sync, path)
    try:
        yield
    finally:
        wait([done])
    done.result()


@cache
def _syncing() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, "sync")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_SYNC_FILE_RANGE_WRITE = 2


def begin_sync(descriptor: int, offset: int, num_bytes: int) -> None:
    """Have what was written sent to the disk, so that a sync to come waits less; only Linux does.

    It makes nothing durable. What goes wrong is told by the sync.
    """
    with contextlib.suppress(AttributeError):
        call = _libc().sync_file_range
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def rewritten(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written from its beginning: over what it holds, of which nothing stays."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:
        yield file
        file.truncate()


SPARES = "spare"
"""What a folder of spares is called."""

_WORTH_BYTES = 1 << 20
_MOST = 64


class Spares:
    """Files that are needed no more, kept to be written over: a page of a file that is in memory already costs a
    tenth of a new one, which the system has to find, clear and give a place on the disk.

    A file is used again only if it has no other name and nobody has it open or mapped: so what somebody reads stays as
    it was, as it does when a file is deleted. Files that can't be used so are deleted, small ones too, and those that
    come when there are more than anybody takes.

    Args:
        directory: where they lie, on the file system of those that come and go; several processes may share it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def give(self, path: Path) -> None:
        """Take the file ``path``, if there is one, for the next to come."""
        with contextlib.suppress(OSError):
            if path.stat().st_size >= _WORTH_BYTES:
                self._directory.mkdir(exist_ok=True)
                if len(self._found()) < _MOST:
                    path.rename(self._directory / secrets.token_hex(8))
                    return
        path.unlink(missing_ok=True)

    def take(self, path: Path, num_bytes: int = _WORTH_BYTES) -> bool:
        """Make a spare file ``path``, whatever it holds.

        Args:
            path: the file that is to be; one that is there already stays.
            num_bytes: how much is to be written: the smallest spare that has as much is taken, or else the largest; for
                a few bytes none is.

        Returns:
            Whether there is one now, to be written over.
        """
        sizes: dict[Path, int] = {}
        for spare in self._found() if num_bytes >= _WORTH_BYTES else []:
            with contextlib.suppress(FileNotFoundError):  # another process took it
                sizes[spare] = spare.stat().st_size
        for spare in sorted(sizes, key=lambda path: (sizes[path] < num_bytes, abs(sizes[path] - num_bytes))):
            mine = spare.with_name(f".{spare.name}")
            with contextlib.suppress(OSError):
                spare.rename(mine)  # of several who want it one succeeds
                try:
                    if _is_free(mine):
                        os.link(mine, path)
                        return True
                except FileExistsError:
                    return False
                finally:
                    mine.unlink()
        return False

    def clear(self) -> None:
        """Delete them all."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _found(self) -> list[Path]:
        try:
            return [path for path in self._directory.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []


def _is_free(path: Path) -> bool:
    """Say whether a file has one name and is open nowhere: only then does Linux give a lease for writing."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return os.fstat(descriptor).st_nlink == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


def flush(array: np.memmap[Any, Any]) -> None:
    """Make what was written to a mapped file durable.

    Raises:
        StorageError: the disk is full or damaged.
    """
    try:
        array.flush()
    except OSError as error:
        raise full(Path(str(array.filename)), error) from error


def publish(temporary: Path, final: Path) -> None:
    """Make the folder ``temporary`` appear as ``final``, whole, after its files are durable.

    A crash at any instant leaves the old ``final`` or the new one. (Where the system can't swap two folders, which
    Linux can, a crash between two renames may leave none.)

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    try:
        sync([temporary, *temporary.rglob("*")])
        if final.exists():
            _swap(temporary, final)
            sync_directory(final.parent)
            shutil.rmtree(temporary)
        else:
            temporary.replace(final)
            sync_directory(final.parent)
    except OSError as error:
        raise full(final, error) from error


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _swap(a: Path, b: Path) -> None:
    """Swap two folders: at once with renameat2(2), or else by three renames."""
    try:
        renameat2 = _libc().renameat2
    except AttributeError:
        code = errno.ENOSYS
    else:
        done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
        code = ctypes.get_errno() if done else 0
    if code in (errno.ENOSYS, errno.EINVAL):
        aside = b.with_name(f".{b.name}.old")
        b.replace(aside)
        a.replace(b)
        aside.replace(a)
    elif code:
        raise OSError(code, os.strerror(code), str(b))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, whose items are bytes, to its place in a file.

    Raises:
        OSError: the disk is full or fails.
    """
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def save_tree(path: Path, tree: Tree, metadata: Mapping[str, str] | None = None, *, durable: bool = False) -> None:
    """Write ``tree`` as a safetensors file, block by block, of a large one two at once.

    Args:
        path: where to.
        tree: what.
        metadata: for the file's header.
        durable: whether the file is going to be synced: it is on its way to the disk then.

    Raises:
        StorageError: the disk is full or the folder can't be written.
        WireError: a tensor has a dtype that no Hansa value may have.
    """
    leaves = trees.leaves(tree)
    for name, leaf in leaves.items():
        if leaf.dtype.name not in _CODES:
            raise WireError(f"Tensor {name!r} is {leaf.dtype.name}, which safetensors files don't hold.")
    # The widest dtypes come first, as the library writes them, so that every tensor is aligned when it is mapped.
    names = sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        leaf = leaves[name]
        begin, end = end, end + leaf.nbytes
        head[name] = {"dtype": _CODES[leaf.dtype.name], "shape": list(leaf.shape), "data_offsets": [begin, end]}
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % 8)
    places = [
        (name, start, 8 + len(text) + head[name]["data_offsets"][0] + start * leaves[name].dtype.itemsize)
        for name in names
        for start in range(0, leaves[name].size, trees.BLOCK)
    ]
    try:
        with rewritten(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()

            def save(place: tuple[str, int, int]) -> None:
                name, start, offset = place
                values = trees.block(leaves[name], start)
                raw = np.ascontiguousarray(values, trees.dtype_of(leaves[name].dtype.name)).view(np.uint8).data
                write_at(file.fileno(), raw, offset)
                if durable:
                    begin_sync(file.fileno(), offset, len(raw))

            shared(end, save, places)
            file.seek(8 + len(text) + end)
    except OSError as error:
        raise full(path, error) from error


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def load_tree(path: Path) -> dict[str, Array]:
    """Map a safetensors file into memory and return its tensors, read-only, bfloat16 included.

    Raises:
        StorageError: the file can't be read.
        WireError: it is no well-formed safetensors file.
    """
    try:
        data: Array = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error
    length = int.from_bytes(data[:8].tobytes(), "little") if data.size >= 8 else -1
    if not 0 <= length <= min(MAX_HEADER_BYTES, data.size - 8):
        raise WireError(f"{path} is no safetensors file.")
    try:
        head = msgspec.json.decode(data[8 : 8 + length].tobytes(), type=dict[str, msgspec.Raw])
        head.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in head.items()}
        return dict(_leaves(data[8 + length :], entries))
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise WireError(f"{path} is no well-formed safetensors file: {error}.") from error


def _leaves(data: Array, entries: Mapping[str, _Entry]) -> Iterator[tuple[str, Array]]:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _NAMES:
            raise ValueError(f"a tensor has an unknown dtype {entry.dtype[:20]!r}")
        spec = trees.Spec(_NAMES[entry.dtype], tuple(entry.shape))
        begin, previous = entry.data_offsets[0], end
        end = entry.data_offsets[1]
        if begin != previous or min(spec.shape, default=0) < 0 or end - begin != spec.num_bytes or end > data.size:
            raise ValueError("its tensors do not fill it without gaps")
        leaf = data[begin:end].view(np.ndarray)
        if spec.dtype == "bool" and (leaf > 1).any():
            raise ValueError("a boolean is neither 0 nor 1")
        yield name, leaf.view(trees.dtype_of(spec.dtype)).reshape(spec.shape)
    if end != data.size:
        raise ValueError("its tensors do not fill it without gaps")
