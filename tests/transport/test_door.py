# SPDX-License-Identifier: Apache-2.0
"""The door passes on what is no lane as it is: bytes, ends, and how fast the other side reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from hansa.transport.door import Door

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HELLO = b"no TLS"


async def no_lane(connection: socket.socket, peer: str) -> None:
    raise AssertionError("nobody asked for a lane")


@contextlib.asynccontextmanager
async def behind_a_door(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[tuple[Door, int]]:
    """Start a server behind a door; it reads the hello first."""

    async def greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(HELLO)) == HELLO
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(greeted, "127.0.0.1", 0)
    door = Door("hansa-files/", no_lane)
    port = door.listen(host, 0)
    door.open(server.sockets[0].getsockname()[1])
    try:
        yield door, port
    finally:
        await door.close()
        server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", ""])
async def test_what_is_said_comes_back(host: str) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        await writer.drain()

    async with behind_a_door(echo, host) as (_, port):
        reader, writer = await asyncio.open_connection(host or "127.0.0.1", port)
        writer.write(HELLO + b"a" * 1_000_000)
        writer.write_eof()
        assert await reader.read() == b"a" * 1_000_000, "the server had our end before it ended"
        writer.close()


async def test_the_door_knows_who_is_behind_a_connection() -> None:
    ports: list[int] = []

    async def noted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ports.append(writer.get_extra_info("peername")[1])
        writer.write(b"!")
        await reader.read()

    async with behind_a_door(noted) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HELLO)
        await reader.readexactly(1)
        mine = writer.get_extra_info("sockname")[1]
        assert door.peer(f"ipv4:127.0.0.1:{ports[0]}") == f"ipv4:127.0.0.1:{mine}"
        assert door.peer("ipv4:127.0.0.1:1") == "ipv4:127.0.0.1:1"
        writer.close()


async def test_who_reads_slowly_is_sent_no_more() -> None:
    sent, size = 0, 64 << 20

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < size:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with behind_a_door(pour) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(HELLO)
        settled, before = 0, 0
        while not sent or settled < 20:
            before = sent
            await asyncio.sleep(0.02)
            settled = settled + 1 if sent == before else 0
        assert sent < 40 << 20, "what the system holds of four sockets"
        assert len(await reader.read(-1)) == size
        writer.close()


async def test_who_asks_for_a_lane_has_one_and_nothing_is_held_back() -> None:
    """By default a connection gathers small messages (RFC 896), and they wait 40 ms for each other."""
    found: asyncio.Queue[tuple[bytes, str, int]] = asyncio.Queue()

    async def lane(connection: socket.socket, peer: str) -> None:
        with connection:
            data = connection.recv(1 << 10)
            found.put_nowait((data, peer, connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    hello = b"\x16\x03\x01\x00\x20" + b"hansa-files/3".rjust(32)
    door = Door("hansa-files/", lane)
    port = door.listen("127.0.0.1", 0)
    door.open(0)
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello)
        data, peer, at_once = await asyncio.wait_for(found.get(), 20)
        assert data == hello, "the door has only looked at it"
        assert peer == "ipv4:{}:{}".format(*writer.get_extra_info("sockname"))
        assert at_once
        writer.close()
    finally:
        await door.close()


async def test_nobody_is_behind_the_door() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = free.getsockname()[1]
    door = Door("hansa-files/", no_lane)
    port = door.listen("127.0.0.1", 0)
    door.open(gone)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HELLO)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
    finally:
        await door.close()


async def test_closing_ends_what_is_under_way() -> None:
    ended = asyncio.Event()

    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"!")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()

    async with behind_a_door(stay) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HELLO)
        await reader.readexactly(1)
        await door.close()
        await asyncio.wait_for(ended.wait(), 20)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", port)
        writer.close()
