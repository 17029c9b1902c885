# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and safetensors as the library itself reads them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hansa.core import shared as sharing
from hansa.core import storage
from hansa.core import tree as trees
from hansa.errors import StorageError, WireError

names = st.text(st.characters(codec="utf-8"), max_size=10).filter(lambda name: name != "__metadata__")


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = trees.dtype_of(draw(st.sampled_from(trees.dtype_names())))
    shape = draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    numbers = draw(hnp.arrays(np.bool_ if dtype == np.bool_ else np.int8, shape))
    return numbers.astype(dtype)


def assert_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert (right[name].dtype, right[name].shape) == (leaf.dtype, leaf.shape)
        assert right[name].tobytes() == leaf.tobytes()


# --- safetensors ---------------------------------------------------------------------------------------------


@given(tree=st.dictionaries(names, arrays(), max_size=5))
def test_any_tree_comes_back_as_it_was(tree: dict[str, np.ndarray], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    storage.save_tree(path, tree)
    assert_same(tree, storage.load_tree(path))


@given(
    tree=st.dictionaries(names, arrays(), max_size=5),
    metadata=st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=5), max_size=2),
)
def test_the_safetensors_library_reads_what_we_write(
    tree: dict[str, np.ndarray], metadata: dict[str, str], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    storage.save_tree(path, tree, metadata)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert theirs.keys() == tree.keys()
    for name, leaf in tree.items():
        assert str(theirs[name].dtype).removeprefix("torch.") == leaf.dtype.name
        assert tuple(theirs[name].shape) == leaf.shape
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == leaf.tobytes()


@given(tree=st.dictionaries(names, arrays(), max_size=5))
def test_we_read_what_the_safetensors_library_writes(tree: dict[str, np.ndarray], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    tensors = {
        name: torch.tensor(leaf.tolist(), dtype=getattr(torch, leaf.dtype.name)).reshape(leaf.shape)
        for name, leaf in tree.items()
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert_same(tree, storage.load_tree(path))


def test_a_tree_is_mapped_read_only_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tree = {"c": np.ones(3, np.int8), "b": np.ones(5, np.float64), "a": np.ones(3, np.float16)}
    storage.save_tree(path, tree)
    loaded = storage.load_tree(path)
    for leaf in loaded.values():
        assert leaf.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            leaf[0] = 2
    path.unlink()
    assert_same(tree, loaded)


@pytest.mark.parametrize(
    "leaf",
    [np.arange(6.0).reshape(2, 3).T, np.arange(6)[::-1], np.arange(4, dtype=">f4"), np.float32(2), np.zeros((0, 2))],
    ids=["transposed", "reversed", "big-endian", "scalar", "empty"],
)
def test_odd_memory_layouts_keep_their_values(leaf: np.ndarray, tmp_path: Path) -> None:
    storage.save_tree(tmp_path / "t", {"w": leaf})
    np.testing.assert_array_equal(storage.load_tree(tmp_path / "t")["w"], leaf)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "t")["w"], leaf)


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="'w' is complex64"):
        storage.save_tree(tmp_path / "t", {"w": np.zeros(1, np.complex64)})
    assert not [*tmp_path.iterdir()]


def crafted(head: Any, data: bytes = b"") -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


HOSTILE = {
    "nothing": b"",
    "too short": b"\1\0\0",
    "endless header": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header beyond the file": struct.pack("<Q", 3) + b"{}",
    "no JSON": crafted(b"{"),
    "not UTF-8": crafted(b'{"\xff": 1}'),
    "deep": crafted(b'{"w": ' + b'{"a":' * 50_000),
    "a list": crafted([]),
    "an entry that is no table": crafted({"w": 1}),
    "an unknown dtype": crafted(entry("F128"), bytes(4)),
    "a dtype that is no text": crafted(entry(["F32"]), bytes(4)),
    "a negative side": crafted(entry(shape=[-1]), bytes(4)),
    "negative sides": crafted(entry(shape=[-1, -1]), bytes(4)),
    "a fraction": crafted(entry(shape=[1.5]), bytes(4)),
    "text for a side": crafted(entry(shape=["1"]), bytes(4)),
    "endless sides": crafted(entry(shape=[2**64, 0], offsets=[0, 0])),
    "endless product": crafted(entry(shape=[2**62, 2**62, 0], offsets=[0, 0])),
    "a huge tensor": crafted(entry(shape=[2**50], offsets=[0, 2**52]), bytes(4)),
    "another size than its shape": crafted(entry(shape=[2]), bytes(4)),
    "before the data": crafted(entry(offsets=[-4, 0]), bytes(4)),
    "beyond the data": crafted(entry(offsets=[4, 8]), bytes(4)),
    "backwards": crafted(entry(offsets=[4, 0]), bytes(4)),
    "one offset": crafted(entry(offsets=[0]), bytes(4)),
    "three offsets": crafted(entry(offsets=[0, 4, 8]), bytes(4)),
    "a fraction of an offset": crafted(entry(offsets=[0.5, 4]), bytes(4)),
    "an unknown key": crafted(entry(more=1), bytes(4)),
    "a missing key": crafted({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "a gap": crafted(entry(offsets=[4, 8]), bytes(8)),
    "surplus": crafted(entry(), bytes(8)),
    "an overlap": crafted({**entry(), "v": entry()["w"]}, bytes(4)),
    "no boolean": crafted(entry("BOOL", [1], [0, 1]), b"\2"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_end_in_wire_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(WireError, match=r"t\.safetensors is no"):
        storage.load_tree(path)


def test_damaged_files_end_in_wire_error_or_load_in_full(tmp_path: Path) -> None:
    """Every truncation fails; a flipped byte either fails or leaves names, dtypes and sizes that fill the file."""
    path = tmp_path / "t.safetensors"
    storage.save_tree(path, {"w": np.arange(3, dtype=np.float32), "b": np.ones((2, 1), np.int8)}, {"a": "b"})
    good = path.read_bytes()
    for end in range(len(good)):
        path.write_bytes(good[:end])
        with pytest.raises(WireError):
            storage.load_tree(path)
    for place in range(len(good)):
        for flip in (1, 2, 0x20, 0x80):
            path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            try:
                loaded = storage.load_tree(path)
            except WireError:
                continue
            assert sum(leaf.nbytes for leaf in loaded.values()) == 14


@given(data=st.binary(max_size=100))
def test_random_bytes_end_in_wire_error(data: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    for content in (data, crafted(data), crafted({"w": {"dtype": "F32", "shape": [7777], "data_offsets": []}}, data)):
        path.write_bytes(content)
        with pytest.raises(WireError):
            storage.load_tree(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "dtype"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner),
    max_leaves=6,
)


@given(dtype=json_values, shape=json_values, offsets=json_values, other=json_values)
def test_random_entries_end_in_wire_error_or_a_tree(
    dtype: Any, shape: Any, offsets: Any, other: Any, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "entries.safetensors"
    for head in (
        {"w": other},
        other,
        entry(dtype),
        entry(shape=shape),
        entry(offsets=offsets),
        entry(dtype, shape, offsets),
    ):
        path.write_bytes(crafted(head, bytes(4)))
        try:
            storage.load_tree(path)
        except WireError:
            continue


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(StorageError, match="Can't read"):
            storage.load_tree(path)


# --- JSON ----------------------------------------------------------------------------------------------------


def test_json_round_trip_with_numpy_numbers(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "j", {"a": np.float32(1.5), "b": np.int64(3), "c": np.arange(2), "d": [None, "ü"]})
    assert storage.read_json(tmp_path / "j") == {"a": 1.5, "b": 3, "c": [0, 1], "d": [None, "ü"]}
    storage.write_json(tmp_path / "j", {"loss": float("nan")})
    assert storage.read_json(tmp_path / "j") == {"loss": None}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000], ids=str)
def test_a_damaged_json_file_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(StorageError, match="j is damaged"):
        storage.read_json(tmp_path / "j")
    with pytest.raises(StorageError, match=r"Can't read .*none"):
        storage.read_json(tmp_path / "none")


# --- whole or not at all -------------------------------------------------------------------------------------

ATOMIC = """
import itertools, sys
from pathlib import Path
from hansa.core import storage
path = Path(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    storage.write_atomic(path / "file", str(i % 10).encode() * 200_000)
"""

PUBLISH = """
import itertools, shutil, sys
from pathlib import Path
from hansa.core import storage
path = Path(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    temporary = path / "temporary"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (temporary / name).write_bytes(str(i % 10).encode() * 20_000)
    storage.publish(temporary, path / "folder")
"""


def killed_after(code: str, folder: Path, seconds: float) -> None:
    child = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        child.kill()
    assert child.wait() == -signal.SIGKILL


def test_a_file_written_under_sigkill_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "file", b"x" * 200_000)
    rng, seen = random.Random(1), set()
    for _ in range(5):
        killed_after(ATOMIC, tmp_path, rng.uniform(0, 0.05))
        data = (tmp_path / "file").read_bytes()
        assert data == data[:1] * 200_000
        seen.add(data[:1])
    assert len(seen) > 1, "the child wrote nothing"


def test_a_folder_published_under_sigkill_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    rng, seen = random.Random(2), set()
    for turn in range(8):
        killed_after(PUBLISH, tmp_path, 0.3 if turn == 0 else rng.uniform(0, 0.05))
        content = {(tmp_path / "folder" / name).read_bytes() for name in ("a", "b", "inner/c")}
        assert len(content) == 1, "half of one and half of another"
        (data,) = content
        assert data == data[:1] * 20_000
        seen.add(data[:1])
    assert len(seen) > 1, "the child published nothing"


def test_a_folder_that_is_replaced_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / f"file-{i}").write_text("x")
        storage.publish(tmp_path / "new", tmp_path / "final")
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert [path.name for path in (tmp_path / "final").iterdir()] == [f"file-{i}"]


def test_folders_are_swapped_by_renames_where_the_system_can_do_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_args, **_more: object())
    test_a_folder_that_is_replaced_leaves_nothing_of_the_old_one(tmp_path)


def test_a_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "file", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- a full or missing disk ----------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hansa.core import storage
from hansa.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
for write in (
    lambda: storage.write_atomic(path / "file", bytes(200_000)),
    lambda: storage.write_json(path / "json", ["x" * 200_000]),
    lambda: storage.save_tree(path / "tree", {"w": np.zeros(200_000)}),
):
    try:
        write()
    except StorageError as error:
        assert error.exit_code == 7
        print(error)
"""


def test_a_disk_that_fills_up_leaves_the_old_file_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("Can't write ")
        assert "Free some space or choose another output.dir" in line
    assert (tmp_path / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "tree"}


def test_a_device_without_space_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        storage.save_tree(Path("/dev/full"), {"w": np.zeros(100_000)})


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        storage.write_atomic(tmp_path / "none" / "file", b"")
    with pytest.raises(StorageError, match="No such file"):
        storage.save_tree(tmp_path / "none" / "file", {})
    with pytest.raises(StorageError, match="No such file"):
        storage.publish(tmp_path / "none", tmp_path / "final")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What happens to the disk, in order: inodes that were synced, names that were renamed."""
    steps: list[object] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        steps.append(os.fstat(descriptor).st_ino)

    def renamed(path: Path, target: Path) -> Path:
        steps.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    return steps


def test_a_folder_appears_after_all_in_it_is_durable_and_is_durable_then(tmp_path: Path, disk: list[object]) -> None:
    inner = tmp_path / "new" / "inner"
    inner.mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (tmp_path / "new" / name).write_text(name)
    inside = {path.stat().st_ino for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))}
    storage.publish(tmp_path / "new", tmp_path / "final")
    place = disk.index("new")
    assert set(disk[:place]) == inside
    assert disk[place + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("name", ["a", "b", "inner", "inner/c", "."])
def test_a_folder_of_which_anything_can_t_be_synced_does_not_appear(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new" / "inner").mkdir(parents=True)
    for file in ("a", "b", "inner/c"):
        (tmp_path / "new" / file).write_text(file)
    bad, fsync = (tmp_path / "new" / name).stat().st_ino, os.fsync

    def failing(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "the disk failed")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="the disk failed"):
        storage.publish(tmp_path / "new", tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_what_is_written_whole_is_the_old_file_until_it_is_the_new_one(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    number = filled(tmp_path / "old").stat().st_ino
    spares.give(tmp_path / "old")
    storage.write_whole(tmp_path / "file", b"y" * (3 << 20), spares)
    assert (tmp_path / "file").stat().st_ino == number
    storage.write_whole(tmp_path / "file", b"short", spares)
    assert (tmp_path / "file").read_bytes() == b"short"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")

    def failing(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def filled(path: Path, byte: bytes = b"x", num_bytes: int = 2 << 20) -> Path:
    path.write_bytes(byte * num_bytes)
    return path


def test_a_spare_is_written_over(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    number = filled(tmp_path / "old").stat().st_ino
    spares.give(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    assert spares.take(tmp_path / "new")
    with storage.rewritten(tmp_path / "new") as file:
        file.write(b"short")
    assert (tmp_path / "new").stat().st_ino == number
    assert (tmp_path / "new").read_bytes() == b"short"
    assert not spares.take(tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_what_somebody_reads_is_not_written_over(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    mapped = np.memmap(filled(tmp_path / "mapped"), np.uint8, "r")
    filled(tmp_path / "linked")
    storage.link(tmp_path / "linked", tmp_path / "other")
    with filled(tmp_path / "open").open("rb") as file:
        for name in ("mapped", "linked", "open"):
            spares.give(tmp_path / name)
        assert not spares.take(tmp_path / "new")
        assert file.read() == b"x" * (2 << 20)
    assert (mapped == ord("x")).all()
    assert (tmp_path / "other").read_bytes() == b"x" * (2 << 20)
    assert list((tmp_path / "spare").iterdir()) == []


def test_small_files_and_files_that_are_gone_are_no_spares(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    filled(tmp_path / "small", num_bytes=100)
    spares.give(tmp_path / "small")
    spares.give(tmp_path / "gone")
    assert not spares.take(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_there_are_never_many_spares(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    for _ in range(70):
        spares.give(filled(tmp_path / "old", num_bytes=1 << 20))
    assert len(list((tmp_path / "spare").iterdir())) == 64
    assert not (tmp_path / "old").exists()


def test_for_a_few_bytes_no_spare_is_taken(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    spares.give(filled(tmp_path / "old"))
    assert not spares.take(tmp_path / "new", 1000)
    assert not (tmp_path / "new").exists()
    assert spares.take(tmp_path / "new", 1 << 20)


def test_a_spare_takes_nobodys_place(tmp_path: Path) -> None:
    spares = storage.Spares(tmp_path / "spare")
    spares.give(filled(tmp_path / "old"))
    filled(tmp_path / "there", b"y")
    assert not spares.take(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"y" * (2 << 20)


def test_a_spare_has_one_taker(tmp_path: Path) -> None:
    spares = [storage.Spares(tmp_path / "spare") for _ in range(8)]
    for i in range(20):
        spares[0].give(filled(tmp_path / f"old{i}", num_bytes=1 << 20))
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda i: spares[i % 8].take(tmp_path / f"new{i}"), range(40)))
    files = list(tmp_path.glob("new*"))
    assert sum(taken) == len(files) == len({path.stat().st_ino for path in files})
    spares[0].clear()
    assert not (tmp_path / "spare").exists()


def test_a_folder_that_can_t_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "spare").write_text("a file where the folder would be")
    spares = storage.Spares(tmp_path / "spare")
    spares.give(filled(tmp_path / "old"))
    assert not (tmp_path / "old").exists()
    assert not spares.take(tmp_path / "new")


def test_a_large_tree_is_saved_by_two_processors_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "w": np.arange(5 * trees.BLOCK + 1, dtype=np.float32),
        "b": np.ones((3, 5)),
        "n": np.arange(4),
        "e": np.zeros(0),
    }
    for threads in (1, 2):
        monkeypatch.setattr(sharing, "_count", lambda threads=threads: threads)
        (tmp_path / str(threads)).write_bytes(b"longer than the tree" * 1_000_000)
        storage.save_tree(tmp_path / str(threads), tree, durable=threads > 1)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded = storage.load_tree(tmp_path / "2")
    assert all(np.array_equal(loaded[name], leaf) for name, leaf in tree.items())


def test_what_is_synced_meanwhile_is_synced_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with storage.syncing(tmp_path / "file"):
        pass
    with pytest.raises(FileNotFoundError), storage.syncing(tmp_path / "gone"):
        pass
    with pytest.raises(KeyError), storage.syncing(tmp_path / "gone"):
        raise KeyError
