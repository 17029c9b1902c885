# SPDX-License-Identifier: Apache-2.0
"""Manifests, and files that arrive in pieces: resumed, taken from donors, checked; hostile manifests are refused."""

from __future__ import annotations

import os
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from hansa.core import wire
from hansa.core.storage import Spares
from hansa.core.values import Plan
from hansa.errors import ChecksumError, HansaError, StorageError, WireError
from hansa.transport.pieces import (
    MAX_PIECE_BYTES,
    PIECE_BYTES,
    Incoming,
    Manifest,
    as_ranges,
    describe,
    in_ranges,
)


def write(path: Path, num_bytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(num_bytes)
    path.write_bytes(data)
    return data


def payload(path: Path, manifest: Manifest, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(manifest.offsets[index])
        return file.read(manifest.pieces[index][0])


def arrive(incoming: Incoming, index: int, data: bytes) -> None:
    """Let a piece come, in three stretches."""
    piece = incoming.begin(index)
    for stretch in (data[:7], data[7 : len(data) // 2], data[max(7, len(data) // 2) :]):
        piece.add(stretch)
    piece.finish()


def copy(source: Path, incoming: Incoming) -> None:
    for index in in_ranges(incoming.missing(), incoming.manifest):
        arrive(incoming, index, payload(source, incoming.manifest, index))


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
def test_a_manifest_is_its_file(tmp_path: Path, num_bytes: int) -> None:
    data = write(tmp_path / "a", num_bytes)
    manifest = describe(tmp_path / "a")
    assert manifest.num_bytes == num_bytes
    assert [length for length, _ in manifest.pieces] == [
        min(PIECE_BYTES, num_bytes - offset) for offset in range(0, num_bytes, PIECE_BYTES)
    ]
    for (length, digest), begin in zip(manifest.pieces, manifest.offsets, strict=False):
        assert blake3(data[begin : begin + length]).digest() == digest
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.digest == blake3(manifest.encode()).hexdigest()


def test_cuts_are_kept_and_long_stretches_cut_further(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 5 * PIECE_BYTES)
    manifest = describe(tmp_path / "a", [0, 100, 100, MAX_PIECE_BYTES + 100, len(data)])
    lengths = [length for length, _ in manifest.pieces]
    rest = len(data) - MAX_PIECE_BYTES - 100
    assert lengths[:2] == [100, MAX_PIECE_BYTES]
    assert lengths[2:] == [PIECE_BYTES, PIECE_BYTES, rest - 2 * PIECE_BYTES]


@pytest.mark.parametrize("cuts", [[], [0], [0, 99], [1, 100], [0, 101], [0, 60, 50, 100]])
def test_cuts_of_another_file_are_refused(tmp_path: Path, cuts: list[int]) -> None:
    write(tmp_path / "a", 100)
    with pytest.raises(StorageError, match="was to be cut"):
        describe(tmp_path / "a", cuts)


def test_what_is_not_there_can_not_be_described(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        describe(tmp_path / "a")


def test_tensors_that_stay_give_the_pieces_that_they_gave(tmp_path: Path) -> None:
    def save(name: str, round: int, head: float) -> Manifest:
        path, params = tmp_path / name, {"base": base, "head": np.full(5, head, np.float32)}
        with path.open("wb") as file:
            wire.write_plan(file, Plan("job", round, "train", round, params))
        return describe(path, wire.cuts(path))

    base = np.random.default_rng(0).normal(size=3_000_000).astype(np.float32)
    first, second = save("a", 1, 0.5), save("b", 12, 0.25)
    shared = set(first.pieces) & set(second.pieces)
    assert len(first.pieces) > 10
    assert len(shared) >= len(first.pieces) - 2


def test_a_file_arrives(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 3 * PIECE_BYTES + 5)
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "b", manifest) as incoming:
        assert incoming.missing() == [(0, 4)]
        for index in (3, 0, 2, 1):
            assert not (tmp_path / "b").exists()
            arrive(incoming, index, payload(tmp_path / "a", manifest, index))
        assert incoming.missing() == []
        assert incoming.num_bytes_missing == 0
        incoming.finish()
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data
    assert not (tmp_path / "b.part").exists()


def test_an_empty_file_arrives(tmp_path: Path) -> None:
    with Incoming(tmp_path / "b", Manifest(())) as incoming:
        assert incoming.missing() == []
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == b""


def test_what_has_arrived_stays(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 5 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "b", manifest) as incoming:
        for index in (0, 1, 3):
            arrive(incoming, index, payload(tmp_path / "a", manifest, index))
    with (tmp_path / "b.part").open("r+b") as file:  # as a crash of the machine may leave it
        file.seek(PIECE_BYTES + 17)
        file.write(b"torn")
        file.seek(7 * PIECE_BYTES)
        file.write(b"surplus")
    with Incoming(tmp_path / "b", manifest) as incoming:
        assert incoming.missing() == [(1, 3), (4, 5)]
        assert incoming.num_bytes_missing == 3 * PIECE_BYTES
        copy(tmp_path / "a", incoming)
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data


@pytest.mark.parametrize("num_bytes", [2 * PIECE_BYTES, 6 * PIECE_BYTES + 3])
def test_a_new_file_is_written_over_a_spare_one(tmp_path: Path, num_bytes: int) -> None:
    """Whether the old file was shorter or longer, and killed on the way or not."""
    data = write(tmp_path / "a", 4 * PIECE_BYTES + 17)
    manifest = describe(tmp_path / "a")
    spares = Spares(tmp_path / "spare")
    write(tmp_path / "old", num_bytes, seed=1)
    number = (tmp_path / "old").stat().st_ino
    spares.give(tmp_path / "old")
    with Incoming(tmp_path / "b", manifest, spares=spares) as incoming:
        assert incoming.missing() == [(0, 5)]
        arrive(incoming, 2, payload(tmp_path / "a", manifest, 2))
    with Incoming(tmp_path / "b", manifest, spares=spares) as incoming:
        assert incoming.missing() == [(0, 2), (3, 5)]
        copy(tmp_path / "a", incoming)
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data
    assert (tmp_path / "b").stat().st_ino == number


def test_a_file_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    write(tmp_path / "a", 2 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "a", manifest) as incoming:
        assert incoming.missing() == []
        incoming.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_another_file_of_that_name_is_replaced_at_the_end(tmp_path: Path) -> None:
    data, old = write(tmp_path / "a", 2 * PIECE_BYTES), write(tmp_path / "b", 2 * PIECE_BYTES, seed=1)
    with Incoming(tmp_path / "b", describe(tmp_path / "a")) as incoming:
        copy(tmp_path / "a", incoming)
        assert (tmp_path / "b").read_bytes() == old
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data


def test_donors_give_what_they_hold(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 4 * PIECE_BYTES)
    (tmp_path / "old").write_bytes(b"x" * 10 + data[PIECE_BYTES : 3 * PIECE_BYTES])
    donor = describe(tmp_path / "old", [0, 10, 10 + PIECE_BYTES, 10 + 2 * PIECE_BYTES])
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "b", manifest, [(tmp_path / "old", donor), (tmp_path / "gone", donor)]) as incoming:
        assert incoming.missing() == [(0, 1), (3, 4)]
        copy(tmp_path / "a", incoming)
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data


def test_a_donor_that_was_altered_is_not_believed(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 2 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    (tmp_path / "old").write_bytes(data[: PIECE_BYTES + 3] + b"!" + data[PIECE_BYTES + 4 :])
    with Incoming(tmp_path / "b", manifest, [(tmp_path / "old", manifest)]) as incoming:
        assert incoming.missing() == [(1, 2)]


def test_equal_pieces_travel_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4 * PIECE_BYTES) + b"end")
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "b", manifest) as incoming:
        assert incoming.missing() == [(0, 1), (4, 5)]
        arrive(incoming, 0, bytes(PIECE_BYTES))
        assert incoming.num_bytes_missing == 3
        arrive(incoming, 4, b"end")
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_two_receptions_of_one_file(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 3 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    with Incoming(tmp_path / "b", manifest) as one, Incoming(tmp_path / "b", manifest) as other:
        arrive(one, 0, payload(tmp_path / "a", manifest, 0))
        copy(tmp_path / "a", other)
        other.finish()
        copy(tmp_path / "a", one)
        one.finish()
    assert (tmp_path / "b").read_bytes() == data


def test_a_damaged_piece_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "a", 2 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    good = payload(tmp_path / "a", manifest, 0)
    with Incoming(tmp_path / "b", manifest) as incoming:
        for index, bad in ((0, good[:-1] + b"x"), (0, good[:-1]), (0, b""), (1, good), (2, good), (-1, good)):
            with pytest.raises(ChecksumError):
                arrive(incoming, index, bad)
        assert incoming.missing() == [(0, 2)]
    with Incoming(tmp_path / "b", manifest) as incoming:
        assert incoming.missing() == [(0, 2)], "nor later"
        copy(tmp_path / "a", incoming)
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_full_disk_keeps_what_has_arrived(tmp_path: Path) -> None:
    # RLIMIT_FSIZE makes the kernel refuse to write beyond a size, as a full disk does.
    data = write(tmp_path / "a", 4 * PIECE_BYTES)
    manifest = describe(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Incoming(tmp_path / "b", manifest) as incoming:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE_BYTES, hard))
        try:
            with pytest.raises(StorageError, match="What has arrived is kept"):
                copy(tmp_path / "a", incoming)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Incoming(tmp_path / "b", manifest) as incoming:
        assert incoming.missing() == [(2, 4)]
        copy(tmp_path / "a", incoming)
        incoming.finish()
    assert (tmp_path / "b").read_bytes() == data


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        Incoming(tmp_path / "none" / "b", Manifest(()))


def test_a_manifest_that_promises_too_much(tmp_path: Path) -> None:
    bomb = Manifest(tuple((MAX_PIECE_BYTES, os.urandom(32)) for _ in range(1000)))
    with pytest.raises(WireError, match="at most 1,000,000"):
        Incoming(tmp_path / "b", bomb, max_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []
    with Incoming(tmp_path / "b", bomb):
        assert (tmp_path / "b.part").stat().st_size == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HPM",
        b"HPM2",
        b"HPM1" + bytes(36),
        b"HPM1" + bytes(35),
        b"HPM1" + b"\1\0\0\0" + bytes(33),
        b"HPM1" + b"\xff\xff\xff\xff" + bytes(32),
        b"HPM1" + (MAX_PIECE_BYTES + 1).to_bytes(4, "little") + bytes(32),
    ],
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(WireError):
        Manifest.decode(data)


@given(st.one_of(st.binary(max_size=400), st.binary(max_size=400).map(lambda tail: b"HPM1" + tail)))
def test_any_bytes_are_a_manifest_or_an_error(data: bytes) -> None:
    try:
        manifest = Manifest.decode(data)
    except HansaError:
        return
    assert manifest.encode() == data
    assert all(begin < end for begin, end in pairwise(manifest.offsets))


@given(st.sets(st.integers(0, 50)))
def test_ranges_are_their_indices(indices: set[int]) -> None:
    manifest = Manifest(((1, bytes(32)),) * 51)
    ranges = as_ranges(sorted(indices))
    assert list(in_ranges(ranges, manifest)) == sorted(indices)
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))


@pytest.mark.parametrize("bad", [(0, 4), (2, 2), (2, 1), (3, 4), (-1, 1)])
def test_ranges_beyond_the_file(bad: tuple[int, int]) -> None:
    with pytest.raises(WireError):
        list(in_ranges([(0, 1), bad], Manifest(((1, bytes(32)),) * 3)))
