# SPDX-License-Identifier: Apache-2.0
"""Files over a network that breaks, stalls and is killed: they arrive whole, and what has arrived is not sent again."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import (
    AccessError,
    ChecksumError,
    JobError,
    StorageError,
    UnreachableError,
    VersionError,
    WireError,
)
from hansa.pki.identity import Identity, Role
from hansa.transport import client, diagnosis, door, lane, messages, protocol
from hansa.transport.client import Connection
from hansa.transport.lane import Kind, Lane
from hansa.transport.messages import Get, Offer
from hansa.transport.pieces import PIECE_BYTES, Arrival, Incoming, Manifest, describe
from hansa.transport.server import Destination, Server, serve
from hansa.transport.turns import LostError
from relay import Relay, relay

from .conftest import Depot, Dial, Federation

PIECES = 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(np.random.default_rng(0).bytes(PIECES * PIECE_BYTES + 5))
    return path


def asked(gets: list[Get]) -> list[int]:
    return [sum(end - begin for begin, end in get.ranges or []) for get in gets]


async def test_there_and_back(dial: Dial, depot: Depot, file: Path, tmp_path: Path) -> None:
    manifest = describe(file)
    async with dial() as connection:
        seen: list[int] = []
        await connection.upload("j", "t", file, manifest, progress=lambda done, size: seen.append(done))
        assert seen == sorted(seen)
        assert seen[-1] == manifest.num_bytes
        assert depot.stored == [Offer("j", "t", manifest.digest, len(manifest.encode()))]
        assert (depot.folder / manifest.digest).read_bytes() == file.read_bytes()
        depot.put(depot.folder / manifest.digest)
        seen.clear()
        back = await connection.download(
            "j", manifest.digest, tmp_path / "back", progress=lambda done, size: seen.append(done)
        )
    assert back == manifest
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert seen == sorted(seen)
    assert seen[-1] == manifest.num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1])
async def test_small_files(dial: Dial, depot: Depot, tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "a").write_bytes(bytes(num_bytes))
    manifest = depot.put(tmp_path / "a")
    async with dial() as connection:
        await connection.upload("j", "t", tmp_path / "a", manifest)
        await connection.download("j", manifest.digest, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(num_bytes)
    assert len(depot.stored) == 1


async def test_an_upload_that_is_there_is_not_sent(dial: Dial, server: Server, depot: Depot, file: Path) -> None:
    manifest = describe(file)
    async with relay(server.port) as network, dial(port=network.port) as connection:
        await connection.upload("j", "t", file, manifest)
        before = network.passed
        await connection.upload("j", "t", file, manifest)
        assert network.passed - before < PIECE_BYTES
    assert len(depot.stored) == 1


@pytest.mark.parametrize("trouble", ["cut", "stall"])
async def test_a_download_goes_on_where_it_was(
    dial: Dial, server: Server, depot: Depot, file: Path, tmp_path: Path, trouble: str
) -> None:
    manifest = depot.put(file)
    async with relay(server.port) as network, dial(port=network.port, stall_s=1.0) as connection:
        network.at(14 * PIECE_BYTES, lambda: hinder(network, trouble))
        await connection.download("j", manifest.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert network.dialled > 1
    assert asked(depot.gets)[0] == PIECES + 1
    assert asked(depot.gets)[1] < PIECES - 3


@pytest.mark.parametrize("trouble", ["cut", "stall"])
async def test_an_upload_goes_on_where_it_was(
    dial: Dial, server: Server, depot: Depot, file: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = describe(file)
    lacking: list[int] = []
    missing = Incoming.missing

    def noted(self: Incoming) -> list[tuple[int, int]]:
        lacking.append(self.num_bytes_missing)
        return missing(self)

    monkeypatch.setattr(Incoming, "missing", noted)
    async with relay(server.port) as network, dial(port=network.port, stall_s=1.0) as connection:
        network.at(12 * PIECE_BYTES, lambda: hinder(network, trouble))
        await connection.upload("j", "t", file, manifest)
    assert (depot.folder / manifest.digest).read_bytes() == file.read_bytes()
    assert network.dialled > 1
    assert lacking[0] == manifest.num_bytes
    assert lacking[-1] < manifest.num_bytes - 3 * PIECE_BYTES
    assert len(depot.stored) == 1


def hinder(network: Relay, trouble: str) -> None:
    if trouble == "cut":
        network.cut()
    else:
        network.stall()
        asyncio.get_running_loop().call_later(2.0, network.flow)


async def test_a_receipt_that_is_lost(dial: Dial, server: Server, depot: Depot, file: Path) -> None:
    """The file was taken, then the network broke: told again, the server says that it is there."""
    manifest = describe(file)
    async with relay(server.port) as network, dial(port=network.port) as connection:
        received = depot.received

        async def then_break(caller: Identity, offer: Offer, incoming: Incoming) -> None:
            await received(caller, offer, incoming)
            network.cut()

        depot.received = then_break  # type: ignore[method-assign]
        await connection.upload("j", "t", file, manifest)
        assert network.dialled == 2
    assert len(depot.stored) == 1


SCRIPT = """
import asyncio, sys
from pathlib import Path
from hansa.pki.kit import Kit
from hansa.transport.client import Connection

async def main(kit, address, digest, path):
    async with Connection(Kit(Path(kit)), address, proxy="") as connection:
        await connection.download("j", digest, Path(path))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_client_that_is_killed(
    federation: Federation, dial: Dial, server: Server, depot: Depot, file: Path, tmp_path: Path
) -> None:
    manifest = depot.put(file)
    async with relay(server.port) as network:
        halfway = asyncio.Event()

        def stall() -> None:
            network.stall()
            halfway.set()

        network.at(10 * PIECE_BYTES, stall)
        child = subprocess.Popen(
            [
                sys.executable, "-c", SCRIPT, str(federation.site.directory),
                f"127.0.0.1:{network.port}", manifest.digest, str(tmp_path / "back"),
            ]
        )  # fmt: skip
        await asyncio.wait_for(halfway.wait(), 60)
        part = tmp_path / "back.part"
        while not part.exists() or part.stat().st_size < 8 * PIECE_BYTES:
            await asyncio.sleep(0.01)
        child.kill()
        child.wait()
    assert not (tmp_path / "back").exists()
    async with dial() as connection:
        await connection.download("j", manifest.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert asked(depot.gets)[-1] <= PIECES + 1 - 6


async def test_a_server_that_is_restarted_mid_way(
    federation: Federation, depot: Depot, dial: Dial, file: Path, tmp_path: Path
) -> None:
    manifest = depot.put(file)
    first = await serve(depot, federation.server, "127.0.0.1", 0)
    async with relay(first.port) as network, dial(port=network.port, patience_s=None) as connection:
        halfway = asyncio.Event()
        network.at(10 * PIECE_BYTES, halfway.set)
        transfer = asyncio.create_task(connection.download("j", manifest.digest, tmp_path / "back"))
        await halfway.wait()
        await first.stop()
        second = await serve(depot, federation.server, "127.0.0.1", first.port)
        await transfer
        await second.stop()
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


async def test_a_download_that_breaks_after_its_last_piece(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is there and only the call's end is lost: nothing is asked for again, and nothing is missing."""
    manifest = depot.put(file)
    receive = Lane.receive_pieces
    broken = []

    async def then_break(
        self: Lane, incoming: Incoming, indices: Iterable[int], told: Callable[[], object] = lambda: None
    ) -> None:
        await receive(self, incoming, indices, told)
        broken.append(incoming.num_bytes_missing)
        raise LostError("cut")

    monkeypatch.setattr(Lane, "receive_pieces", then_break)
    async with dial() as connection:
        await connection.download("j", manifest.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert len(depot.gets) == 1
    assert broken == [0]


async def test_patience_ends(dial: Dial, server: Server, depot: Depot, file: Path, tmp_path: Path) -> None:
    manifest = depot.put(file)
    async with relay(server.port) as network, dial(port=network.port, patience_s=0, stall_s=0.5) as connection:
        network.at(4 * PIECE_BYTES, network.stall)
        with pytest.raises(UnreachableError, match="nothing moved"):
            await connection.download("j", manifest.digest, tmp_path / "back")
        with pytest.raises(UnreachableError):
            await connection.upload("j", "t", file, manifest)


async def test_donors_save_the_journey(dial: Dial, depot: Depot, file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3 * PIECE_BYTES] ^= 1
    (tmp_path / "next").write_bytes(data)
    old, manifest = describe(file), depot.put(tmp_path / "next")
    async with dial() as connection:
        await connection.download("j", manifest.digest, tmp_path / "back", donors=[(file, old)])
    assert (tmp_path / "back").read_bytes() == data
    assert [get.ranges for get in depot.gets] == [[(3, 4)]]


async def test_a_whole_file_asks_for_no_pieces(dial: Dial, depot: Depot, file: Path) -> None:
    manifest = depot.put(file)
    async with dial() as connection:
        await connection.download("j", manifest.digest, file)
    assert depot.gets == []


# What is refused


async def test_a_file_that_one_may_not_have(dial: Dial, tmp_path: Path) -> None:
    async with dial() as connection:
        with pytest.raises(JobError, match="has no file"):
            await connection.download("j", "0" * 64, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


async def test_a_file_that_is_too_large(dial: Dial, depot: Depot, file: Path, tmp_path: Path) -> None:
    manifest = depot.put(file)
    async with dial() as connection:
        with pytest.raises(WireError, match="at most 1,000"):
            await connection.download("j", manifest.digest, tmp_path / "back", max_bytes=1000)
    assert depot.gets == []


async def test_a_file_that_changed_at_the_server(dial: Dial, depot: Depot, file: Path, tmp_path: Path) -> None:
    manifest = depot.put(file)
    with file.open("r+b") as change:
        change.seek(5 * PIECE_BYTES)
        change.write(b"changed")
    async with dial() as connection:
        with pytest.raises(ChecksumError, match="Piece 5"):
            await connection.download("j", manifest.digest, tmp_path / "back")
        file.write_bytes(b"short")
        with pytest.raises(StorageError, match="shorter"):
            await connection.download("j", manifest.digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()


async def test_a_file_that_changed_before_it_was_sent(dial: Dial, depot: Depot, file: Path) -> None:
    manifest = describe(file)
    with file.open("r+b") as change:
        change.seek(5 * PIECE_BYTES)
        change.write(b"changed")
    async with dial() as connection:
        with pytest.raises(ChecksumError, match="Piece 5"):
            await connection.upload("j", "t", file, manifest)
    assert depot.stored == []


async def test_a_server_that_sends_another_manifest(dial: Dial, depot: Depot, file: Path, tmp_path: Path) -> None:
    manifest = depot.put(file)
    depot.files["1" * 64] = (file, manifest)
    async with dial() as connection:
        with pytest.raises(WireError, match="another manifest"):
            await connection.download("j", "1" * 64, tmp_path / "back")


async def test_a_file_that_is_not_there_to_send(dial: Dial, tmp_path: Path) -> None:
    async with dial() as connection:
        with pytest.raises(StorageError, match="No such file"):
            await connection.upload("j", "t", tmp_path / "none", Manifest(()))


async def test_an_upload_that_the_handler_refuses(dial: Dial, depot: Depot, file: Path) -> None:
    async def refuse(caller: Identity, offer: Offer) -> Destination | None:
        raise AccessError("This task is not yours.", site=caller.name)

    depot.offered = refuse  # type: ignore[method-assign]
    async with dial() as connection:
        with pytest.raises(AccessError, match="This task is not yours") as met:
            await connection.upload("j", "t", file, describe(file))
    assert met.value.site == "riga"


async def test_an_upload_is_refused_before_its_manifest_is_read(dial: Dial, depot: Depot) -> None:
    async def refuse(caller: Identity, offer: Offer) -> Destination | None:
        raise AccessError("This task is not yours.", site=caller.name)

    depot.offered = refuse  # type: ignore[method-assign]
    async with dial() as connection:
        with pytest.raises(AccessError, match="This task is not yours"):
            await spoken(connection, [Offer("j", "t", "0" * 64, 1 << 20)])


async def test_a_manifest_longer_than_the_file_allows(dial: Dial, depot: Depot, file: Path) -> None:
    depot.max_manifest_bytes = 100
    async with dial() as connection:
        with pytest.raises(WireError, match="100 are accepted"):
            await connection.upload("j", "t", file, describe(file))
    assert list(depot.folder.iterdir()) == []


async def test_a_piece_that_is_repeated_counts_each_time(dial: Dial, depot: Depot, file: Path) -> None:
    depot.max_bytes = 10 * PIECE_BYTES
    manifest = Manifest((describe(file).pieces[0],) * 11)
    async with dial() as connection:
        with pytest.raises(WireError, match="are accepted"):
            await connection.upload("j", "t", file, manifest)
    assert list(depot.folder.iterdir()) == []


async def test_nobody_waits_for_a_file_that_is_being_opened(
    dial: Dial, depot: Depot, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves while the server looks at what it has already leaves no open file behind."""
    begun, go, closed = asyncio.Event(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    take, close = Incoming._take, Incoming.close

    def slow(self: Incoming, path: Path, manifest: Manifest) -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(60)
        take(self, path, manifest)

    def noted(self: Incoming) -> None:
        close(self)
        loop.call_soon_threadsafe(closed.set)

    monkeypatch.setattr(Incoming, "_take", slow)
    monkeypatch.setattr(Incoming, "close", noted)
    async with dial() as connection:
        sending = asyncio.create_task(connection.upload("j", "t", file, describe(file)))
        await begun.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    go.set()
    await asyncio.wait_for(closed.wait(), 60)
    assert depot.stored == []


HOSTILE = {
    "a manifest of another digest": [Offer("j", "t", "0" * 64, 4), b"HPM1"],
    "a manifest that is none": [Offer("j", "t", "0" * 64, 4), b"HPMX"],
    "a manifest too long": [Offer("j", "t", "0" * 64, 1 << 40), bytes(1 << 20)],
    "more manifest than offered": [Offer("j", "t", "0" * 64, 4), bytes(1 << 20)],
    "a path": [{"type": "Offer", "job": "j", "task": "t", "digest": "../../etc/passwd", "manifest_bytes": 4}, b"HPM1"],
    "an offer of no kind": [{"job": "j", "task": "t", "digest": "0" * 64, "manifest_bytes": 4}],
    "a piece instead of an offer": [(Kind.PIECE, b"x")],
    "a problem instead of an offer": [(Kind.PROBLEM, protocol.problem(AccessError("You are not the server.")))],
    "a beat with a body": [(Kind.BEAT, b"x")],
    "a frame of no kind": [(77, b"x")],
    "a request that is too long": [
        (Kind.PART, bytes(lane.FRAME_BYTES)),
        (Kind.PART, bytes(lane.FRAME_BYTES)),
        b"x" * 9,
    ],
    "a frame that is too long": [(Kind.MESSAGE, bytes(lane.FRAME_BYTES + 1))],
}
Said = Sequence[Offer | Get | dict[str, object] | bytes | tuple[int, bytes]]


@pytest.mark.parametrize("said", HOSTILE.values(), ids=HOSTILE.keys())
async def test_uploads_that_are_none(dial: Dial, depot: Depot, said: Said) -> None:
    async with dial() as connection:
        with pytest.raises(WireError):
            await spoken(connection, said)
        await connection.call(messages.ListJobs())
    assert depot.stored == []
    assert list(depot.folder.iterdir()) == []


@pytest.mark.parametrize("said", [[], [Offer("j", "t", "0" * 64, 4)]], ids=["nothing", "no manifest"])
async def test_an_upload_that_ends_early(dial: Dial, depot: Depot, said: Said) -> None:
    async with dial() as connection:
        with pytest.raises(LostError):
            await spoken(connection, said)
        await connection.call(messages.ListJobs())
    assert depot.stored == []
    assert list(depot.folder.iterdir()) == []


async def test_pieces_that_nobody_asked_for(dial: Dial, depot: Depot, file: Path) -> None:
    manifest = describe(file)
    offer = [Offer("j", "t", manifest.digest, len(manifest.encode())), manifest.encode()]
    async with dial() as connection:
        for frame in (b"", b"\0\0\0\0", b"x" * PIECE_BYTES, b"x" * (PIECE_BYTES + 1)):
            with pytest.raises((WireError, ChecksumError)):
                await spoken(connection, [*offer, (Kind.PIECE, frame)])
    assert depot.stored == []


async def test_a_server_that_sends_more_than_it_was_asked_for(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, dialled: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The surplus is not taken for what is asked for next."""
    manifest, send = depot.put(file), Lane.send_pieces

    async def twice(
        self: Lane, opened: int, manifest: Manifest, indices: Iterable[int], path: Path, *told: Callable[[int], object]
    ) -> None:
        wanted = list(indices)
        await send(self, opened, manifest, [*wanted, wanted[0]], path, *told)

    monkeypatch.setattr(Lane, "send_pieces", twice)
    async with dial() as connection:
        for name in ("back", "again"):
            await connection.download("j", manifest.digest, tmp_path / name)
            assert (tmp_path / name).read_bytes() == file.read_bytes()
    assert len(dialled) == 2


async def spoken(connection: Connection, said: Said) -> None:
    """Say anything over a lane, and hear it to its end."""
    async with connection._lane() as lane:
        for item in said:
            match item:
                case (int(), bytes()):
                    kind, data = item
                case bytes():
                    kind, data = Kind.MESSAGE, item
                case _:
                    kind, data = Kind.MESSAGE, msgspec.msgpack.encode(item)
            lane._encrypt(lane_header(kind, data) + data)
            await lane._drive(lane._flush())
        lane._socket.shutdown(socket.SHUT_WR)
        while True:
            await lane.hear(1 << 20)


def lane_header(kind: int, data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + bytes([kind])


@pytest.mark.parametrize(
    "ranges", [[(0, 1 << 40)], [(5, 5)], [(3, 2)], [(0, 1), (100, 101)], [(0, 2), (1, 3)], [(4, 5), (0, 1)]]
)
async def test_pieces_that_are_not_there(dial: Dial, depot: Depot, file: Path, ranges: list[tuple[int, int]]) -> None:
    manifest = depot.put(file)
    async with dial() as connection:
        with pytest.raises(WireError, match="There are no pieces"):
            await spoken(connection, [Get("j", manifest.digest, ranges)])
    assert depot.num_bytes_sent == 0


async def test_more_ranges_than_a_message_may_have(dial: Dial, depot: Depot) -> None:
    ranges = [(2 * index, 2 * index + 1) for index in range(messages.MAX_RANGES + 1)]
    async with dial() as connection:
        with pytest.raises(WireError, match="This is no Get"):
            await spoken(connection, [Get("j", "0" * 64, ranges)])


frames = st.lists(
    st.tuples(
        st.sampled_from([*Kind, *(5 * [Kind.MESSAGE]), 9]),
        st.binary(max_size=200)
        | st.sampled_from([Offer("j", "t", "0" * 64, 4), Get("j", "0" * 64), Get("j", "1" * 64, [(0, 1)])]).map(
            msgspec.msgpack.encode
        )
        | st.just(b"HPM1"),
    ),
    max_size=4,
)


async def test_a_lane_survives_any_frames(dial: Dial, depot: Depot, caplog: pytest.LogCaptureFixture) -> None:
    cases: list[list[tuple[int, bytes]]] = []
    outcomes = set()

    @given(frames)
    @settings(max_examples=60)
    def collect(said: list[tuple[int, bytes]]) -> None:
        cases.append(said)

    await asyncio.to_thread(collect)
    async with dial() as connection:
        for said in cases:
            try:
                await spoken(connection, said)
            except (WireError, JobError, LostError) as error:
                outcomes.add(type(error))
        await connection.call(messages.ListJobs())
    assert outcomes == {WireError, JobError, LostError}
    assert depot.stored == []
    assert not [record for record in caplog.records if record.exc_info], "nothing of this is a defect"


async def test_many_gaps_are_asked_for_in_turn(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_RANGES", 5)
    data = bytearray(file.read_bytes())
    for index in range(0, PIECES, 2):
        data[index * PIECE_BYTES] ^= 1
    (tmp_path / "next").write_bytes(data)
    old, manifest = describe(file), depot.put(tmp_path / "next")
    async with dial() as connection:
        await connection.download("j", manifest.digest, tmp_path / "back", donors=[(file, old)])
    assert (tmp_path / "back").read_bytes() == data
    assert asked(depot.gets) == [5, 5, 2]
    assert depot.num_bytes_sent == 12 * PIECE_BYTES


# Memory


async def test_a_slow_disk_holds_the_network_back(
    dial: Dial, depot: Depot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one end can not write, the other reads no more than TCP's windows hold, and all of it arrives later."""
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(0).bytes(64 << 20))
    manifest = depot.put(file)
    released, reading, add, preadv = threading.Event(), [0], Arrival.add, os.preadv

    def slow(self: Arrival, payload: bytes | bytearray | memoryview) -> None:
        released.wait()
        add(self, payload)

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading[0] += len(buffers[0])
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(Arrival, "add", slow)
    monkeypatch.setattr(os, "preadv", counted)
    async with dial() as connection:
        transfer = asyncio.create_task(connection.download("j", manifest.digest, tmp_path / "back"))
        settled = 0
        while not reading[0] or settled < 20:
            before = reading[0]
            await asyncio.wait({transfer}, timeout=0.05)
            settled = settled + 1 if reading[0] == before else 0
        assert reading[0] < 32 << 20, "the server has not read all of the file"
        released.set()
        await transfer
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


# Lanes


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """All connections that were made for lanes."""
    found: list[socket.socket] = []
    reach = diagnosis.reach

    async def noted(*arguments: object) -> socket.socket:
        found.append(await reach(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(diagnosis, "reach", noted)
    return found


async def test_one_lane_carries_one_file_after_another(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, dialled: list[socket.socket]
) -> None:
    async with dial() as connection:
        connection.warm()
        connection.warm()
        await connection.upload("j", "t", file, describe(file))
        manifest = depot.put(file)
        await connection.download("j", manifest.digest, tmp_path / "back")
        assert len(dialled) == 1
        with pytest.raises(JobError):
            await connection.download("j", "0" * 64, tmp_path / "none")
        assert dialled[0].fileno() < 0, "a lane ends with a problem"
        await connection.upload("j", "u", file, describe(file))
        assert len(dialled) == 2
    assert dialled[1].fileno() < 0


async def test_files_at_once_have_a_lane_each(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, dialled: list[socket.socket]
) -> None:
    manifest = depot.put(file)
    async with dial() as connection:
        paths = [tmp_path / str(number) for number in range(3)]
        await asyncio.gather(*(connection.download("j", manifest.digest, path) for path in paths))
        assert len(dialled) == 3
    assert all(path.read_bytes() == file.read_bytes() for path in paths)


async def test_a_lane_that_nobody_uses_is_not_kept_for_long(
    dial: Dial, depot: Depot, file: Path, dialled: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WARM_S", 0.05)
    async with dial() as connection:
        await connection.upload("j", "t", file, describe(file))
        async with asyncio.timeout(20):
            while dialled[0].fileno() >= 0:
                await asyncio.sleep(0.01)
        await connection.upload("j", "u", file, describe(file))
        assert len(dialled) == 2


async def test_a_lane_that_the_server_has_left_is_not_used(
    federation: Federation, depot: Depot, dial: Dial, file: Path, dialled: list[socket.socket]
) -> None:
    first = await serve(depot, federation.server, "127.0.0.1", 0)
    async with dial(port=first.port, patience_s=0) as connection:
        await connection.upload("j", "t", file, describe(file))
        await first.stop()
        second = await serve(depot, federation.server, "127.0.0.1", first.port)
        try:
            await connection.upload("j", "u", file, describe(file))
        finally:
            await second.stop()
    assert len(dialled) == 2


async def test_a_lane_of_a_certificate_that_was_renewed_is_not_used(
    dial: Dial, depot: Depot, federation: Federation, file: Path, dialled: list[socket.socket]
) -> None:
    async with dial() as connection:
        connection.warm()
        async with asyncio.timeout(20):
            while not connection._idle:
                await asyncio.sleep(0.01)
        federation.renew(federation.site)
        federation.tell(federation.server)
        await connection.upload("j", "t", file, describe(file))
        assert len(dialled) == 2
        assert dialled[0].fileno() < 0
    assert len(depot.stored) == 1


async def test_a_lane_dialled_ahead_in_vain_stands_in_nobodys_way(
    federation: Federation, depot: Depot, file: Path
) -> None:
    """The server was not there yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        async with Connection(federation.site, f"127.0.0.1:{port}", proxy="") as connection:
            connection.warm()
            async with asyncio.timeout(20):
                while connection._dialling:
                    await asyncio.sleep(0.01)
            free.close()
            server = await serve(depot, federation.server, "127.0.0.1", port)
            try:
                await connection.upload("j", "t", file, describe(file))
            finally:
                await server.stop()
    assert len(depot.stored) == 1


async def test_slow_sites_take_up_nobodys_turn(
    federation: Federation, server: Server, depot: Depot, file: Path, tmp_path: Path
) -> None:
    """More sites than the server has threads stand still amid an upload; another one gets through meanwhile."""
    manifest = describe(file)
    offer = Offer("j", "slow", manifest.digest, len(manifest.encode()))
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[::-1])
    kits = [federation.kit(Role.SITE, f"slow{number}") for number in range(12)]
    federation.tell(federation.server)
    slow = [Connection(kit, f"127.0.0.1:{server.port}", proxy="") for kit in kits]
    try:
        for connection in slow:
            _, lane = await connection._lent()
            connection._keep(connection._identity_now(), lane)  # so that it ends with its connection
            await lane.say(protocol.encode(offer))
            await lane.say(manifest.encode())
            assert protocol.decode(messages.Wanted, await lane.hear(1000)).ranges
            lane._encrypt(lane_header(Kind.PIECE, bytes(PIECE_BYTES)) + b"some of it")
            await lane._drive(lane._flush())
        async with asyncio.timeout(40), Connection(federation.site, slow[0].address, proxy="") as fast:
            await fast.upload("j", "t", other, describe(other))
            await fast.download("j", depot.put(other).digest, tmp_path / "back")
    finally:
        for connection in slow:
            await connection.__aexit__(None, None, None)
    assert (tmp_path / "back").read_bytes() == other.read_bytes()


# The door


async def test_who_says_nothing_is_not_waited_for(server: Server, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HELLO_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    async with dial() as connection:
        await connection.call(messages.ListJobs())


async def test_a_hello_that_comes_in_crumbs(federation: Federation, server: Server, dial: Dial, file: Path) -> None:
    """The door waits for all of it before it decides."""

    async def crumbs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server.port)
        writers.extend((writer, far_writer))
        hello = await reader.read(1 << 16)
        for begin in range(0, len(hello), 100):
            far_writer.write(hello[begin : begin + 100])
            await far_writer.drain()
            await asyncio.sleep(0.005)

        async def passed(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(passed(reader, far_writer), passed(far_reader, writer))

    writers: list[asyncio.StreamWriter] = []
    between = await asyncio.start_server(crumbs, "127.0.0.1", 0)
    async with between, dial(port=between.sockets[0].getsockname()[1]) as connection:
        await connection.upload("j", "t", file, describe(file))
        await connection.call(messages.ListJobs())
    for writer in writers:
        writer.close()


async def test_another_protocol_gets_no_lane(dial: Dial, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context_for = lane.context_for

    def other(*arguments: bytes, server_side: bool) -> object:
        context = context_for(*arguments, server_side=server_side)
        context.set_alpn_protocols([f"{lane.FAMILY}{messages.PROTOCOL + 1}"])
        return context

    monkeypatch.setattr(client, "context_for", other)
    async with dial() as connection:
        with pytest.raises(VersionError, match="same release"):
            await connection.upload("j", "t", file, describe(file))
