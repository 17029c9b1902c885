# SPDX-License-Identifier: Apache-2.0
"""Files over a network that breaks, stalls and is killed: they arrive whole, and what has arrived is not sent again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import numpy as np
import pytest

from hansa.errors import AccessError, ChecksumError, JobError, StorageError, UnreachableError, WireError
from hansa.pki.identity import Identity, Role
from hansa.transport import budget, client, messages, protocol
from hansa.transport.client import Connection
from hansa.transport.messages import Get, Offer
from hansa.transport.pieces import PIECE_BYTES, Incoming, Manifest, describe
from hansa.transport.server import Destination, Server, serve
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
        while not part.exists() or part.stat().st_size < (6 + client.AHEAD) * PIECE_BYTES:  # some before it may lack
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
    frames = client.Connection._frames
    seen: list[bytes] = []

    async def without_end(self: client.Connection, call: object) -> AsyncIterator[bytes]:
        async for data in frames(self, call):
            seen.append(data)
            yield data
        if len(seen) == PIECES + 2:
            raise client._LostError("cut")

    monkeypatch.setattr(client.Connection, "_frames", without_end)
    async with dial() as connection:
        await connection.download("j", manifest.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert len(depot.gets) == 1
    assert len(seen) == PIECES + 2


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
    "no manifest": [Offer("j", "t", "0" * 64, 4)],
    "nothing": [],
    "a path": [{"job": "j", "task": "t", "digest": "../../etc/passwd", "manifest_bytes": 4}, b"HPM1"],
}


@pytest.mark.parametrize("said", HOSTILE.values(), ids=HOSTILE.keys())
async def test_uploads_that_are_none(dial: Dial, depot: Depot, said: list[Offer | dict[str, object] | bytes]) -> None:
    async with dial() as connection:
        with pytest.raises(WireError):
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
                await spoken(connection, [*offer, frame])
    assert depot.stored == []


async def spoken(
    connection: Connection, said: Sequence[Offer | dict[str, object] | bytes], method: str = "Upload"
) -> None:
    """Say anything over a stream, and hear it to its end."""
    async with connection._stream(method) as call:
        for item in said:
            await call.write(item if isinstance(item, bytes) else msgspec.msgpack.encode(item))
        await call.done_writing()
        async for _ in connection._frames(call):
            pass


@pytest.mark.parametrize(
    "ranges", [[(0, 1 << 40)], [(5, 5)], [(3, 2)], [(0, 1), (100, 101)], [(0, 2), (1, 3)], [(4, 5), (0, 1)]]
)
async def test_pieces_that_are_not_there(dial: Dial, depot: Depot, file: Path, ranges: list[tuple[int, int]]) -> None:
    manifest = depot.put(file)
    async with dial() as connection:
        with pytest.raises(WireError, match="There are no pieces"):
            await spoken(connection, [protocol.encode(Get("j", manifest.digest, ranges))], "Download")
    assert depot.num_bytes_sent == 0


async def test_more_ranges_than_a_message_may_have(dial: Dial, depot: Depot) -> None:
    ranges = [(2 * index, 2 * index + 1) for index in range(messages.MAX_RANGES + 1)]
    async with dial() as connection:
        with pytest.raises(WireError, match="This is no Get message"):
            await spoken(connection, [protocol.encode(Get("j", "0" * 64, ranges))], "Download")


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
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one end can not write, the other is asked for a window of pieces, and all of them arrive later."""
    monkeypatch.setattr(client, "WINDOW_BYTES", 8 << 20)
    manifest = depot.put(file)
    released, writing = threading.Event(), []
    write = Incoming.write

    def slow(self: Incoming, index: int, payload: bytes | memoryview) -> None:
        writing.append(index)
        released.wait()
        write(self, index, payload)

    monkeypatch.setattr(Incoming, "write", slow)
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        read.append(offset)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    async with dial() as connection:
        transfer = asyncio.create_task(connection.download("j", manifest.digest, tmp_path / "back"))
        settled = 0
        while not read or settled < 20:
            before = len(read)
            await asyncio.wait({transfer}, timeout=0.05)
            settled = settled + 1 if len(read) == before else 0
        assert len(writing) <= 3
        assert len(read) < PIECES, "the server has not read all of the file"
        released.set()
        await transfer
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All channels that are made."""
    found: list[Any] = []
    secure_channel = grpc.aio.secure_channel

    def noted(*arguments: object) -> object:
        found.append(secure_channel(*arguments))
        return found[-1]

    monkeypatch.setattr(grpc.aio, "secure_channel", noted)
    return found


READY, SHUTDOWN = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.SHUTDOWN


async def test_a_large_transfer_has_a_connection_that_was_dialled_ahead_and_ends_with_it(
    dial: Dial, depot: Depot, file: Path, tmp_path: Path, channels: list[Any]
) -> None:
    """gRPC keeps the buffers of the largest reads until a connection ends: memory would grow with the sites."""
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    async with dial() as connection:
        await connection.upload("j", "small", small, describe(small))
        await connection.call(messages.ListJobs())
        assert len(channels) == 1, "one connection serves calls and small files"
        await connection.upload("j", "t", file, describe(file))
        manifest = depot.put(file)
        await connection.download("j", manifest.digest, tmp_path / "back")
        assert len(channels) == 4, "the download had the one that the upload left, and left another"
        states = [channel.get_state() for channel in channels[:3]]
        assert states == [READY, SHUTDOWN, SHUTDOWN]
    assert [channel.get_state() for channel in channels] == 4 * [SHUTDOWN]


async def test_a_connection_dialled_ahead_is_not_kept_for_long(
    dial: Dial, channels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WARM_S", 0.05)
    async with dial() as connection:
        connection.warm()
        connection.warm()
        await asyncio.sleep(0)
        assert len(channels) == 1
        async with asyncio.timeout(20):
            while (state := channels[0].get_state()) is not SHUTDOWN:
                await channels[0].wait_for_state_change(state)
        connection.warm()
        await asyncio.sleep(0)
        assert len(channels) == 2


async def test_a_connection_dialled_ahead_with_a_certificate_that_was_renewed_is_not_used(
    dial: Dial, depot: Depot, federation: Federation, file: Path, channels: list[Any]
) -> None:
    async with dial() as connection:
        connection.warm()
        federation.renew(federation.site)
        federation.tell(federation.server)
        await connection.upload("j", "t", file, describe(file))
        assert channels[0].get_state() is SHUTDOWN
    assert len(depot.stored) == 1


async def test_a_connection_dialled_ahead_in_vain_stands_in_nobodys_way(
    federation: Federation, depot: Depot, file: Path, channels: list[Any]
) -> None:
    """The server was not there yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        async with Connection(federation.site, f"127.0.0.1:{port}", proxy="") as connection:
            connection.warm()
            async with asyncio.timeout(20):
                await asyncio.wait({connection._warm.dialling})  # type: ignore[union-attr]
            free.close()
            server = await serve(depot, federation.server, "127.0.0.1", port)
            try:
                await connection.upload("j", "t", file, describe(file))
            finally:
                await server.stop()
    assert len(depot.stored) == 1


async def test_slow_sites_take_up_nobodys_turn(
    federation: Federation, server: Server, depot: Depot, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many sites as there are lanes stand still, granted all that there is; another one gets through meanwhile."""
    monkeypatch.setattr(budget, "TURN_S", 0.2)
    manifest = describe(file)
    offer = Offer("j", "slow", manifest.digest, len(manifest.encode()))
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[::-1])
    kits = [federation.kit(Role.SITE, name) for name in ("lund", "visby", "kiel")]
    federation.tell(federation.server)
    async with contextlib.AsyncExitStack() as stack:
        granted = 0
        *slow, fast = [
            await stack.enter_async_context(Connection(kit, f"127.0.0.1:{server.port}", proxy="")) for kit in kits
        ]
        assert len(slow) == budget.LANES
        for connection in slow:
            call = await stack.enter_async_context(connection._stream("Upload"))
            await call.write(protocol.encode(offer))
            await call.write(manifest.encode())
            assert protocol.decode(messages.Wanted, await call.read()).ranges
            if not granted:
                granted = protocol.decode(messages.Grant, await call.read()).pieces
        assert granted == budget.PIECES
        async with asyncio.timeout(40):
            await fast.upload("j", "t", other, describe(other))
            await fast.download("j", depot.put(other).digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == other.read_bytes()
