# SPDX-License-Identifier: Apache-2.0
"""One port for everything: what asks for a lane gets one, and all else goes on to gRPC, which listens behind the door.

What a connection wants is in the first thing that it says, TLS's ClientHello with the protocols that it offers (ALPN,
RFC 7301); the door looks at it and takes nothing. gRPC can't be given connections, so bytes are passed on, as they
are, to its port on the loopback: TLS is between the caller and gRPC.

===============================================  ================================================================
says nothing for ``HELLO_S``                     closed
says something that is no TLS                    gRPC's to refuse
one side reads slowly                            no more is taken from the other
one side ends                                    the other is told so
===============================================  ================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

HELLO_S = 20.0
PAUSE_S = 0.01
RELAY_BYTES = 256 << 10
BACKLOG = 1024

_HANDSHAKE = 0x16
_RECORD_BYTES = 5
_LONGEST_RECORD = _RECORD_BYTES + (1 << 14)

Lane = Callable[[socket.socket, str], Awaitable[None]]


class Door:
    """Listens at one port.

    Args:
        marker: what is in the name of a protocol by which a lane is asked for.
        lane: what is done with such a connection and its peer's address; the connection is its own from then on.
    """

    def __init__(self, marker: str, lane: Lane) -> None:
        self._marker = marker.encode()
        self._lane = lane
        self._inner = 0
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._peers: dict[int, str] = {}
        self._buffer = memoryview(bytearray(RELAY_BYTES))

    def listen(self, host: str, port: int) -> int:
        """Bind the addresses of a host and return the port.

        Raises:
            OSError: the port is in use, or the host is not this one.
        """
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        families = {family for family, *_ in found}
        try:
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                bound = (address[0], port)
                dual = address[0] == "::" and socket.has_dualstack_ipv6() and len(families) == 1
                listener = socket.create_server(bound, family=family, backlog=BACKLOG, dualstack_ipv6=dual)
                listener.setblocking(False)
                self._listeners.append(listener)
                port = listener.getsockname()[1]
        except OSError:
            self._shut()
            raise
        return port

    def open(self, inner: int) -> None:
        """Let callers in; gRPC listens at the loopback's port ``inner``."""
        self._inner = inner
        for listener in self._listeners:
            self._begin(self._admitting(listener))

    async def close(self) -> None:
        """Let nobody in any more, and end what is under way."""
        self._shut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def peer(self, address: str) -> str:
        """Return the address of who is behind a connection that gRPC knows by ``address``."""
        return self._peers.get(int(address.rpartition(":")[2] or 0), address)

    def _shut(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(RuntimeError):  # there is no loop yet
                asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listeners.clear()

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admitting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError:  # too many open files, or the caller is gone again
                await asyncio.sleep(PAUSE_S)
                continue
            family = "ipv6" if connection.family == socket.AF_INET6 else "ipv4"
            host = f"[{address[0]}]" if family == "ipv6" else address[0]
            self._begin(self._meet(connection, f"{family}:{host}:{address[1]}"))

    async def _meet(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does for connections that it made
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await _hello(connection)
        except (OSError, TimeoutError):
            connection.close()
            return
        except BaseException:  # let go of the connection; raised again
            connection.close()
            raise
        if self._marker in hello:
            await self._lane(connection, peer)
        else:
            await self._pass_on(connection, peer)

    async def _pass_on(self, connection: socket.socket, peer: str) -> None:
        loop = asyncio.get_running_loop()
        outer = _Side(self._buffer)
        inner = _Side(self._buffer)
        outer.other, inner.other = inner, outer
        try:
            with contextlib.closing(connection):
                transport, _ = await loop.create_connection(lambda: inner, "127.0.0.1", self._inner)
                port = transport.get_extra_info("sockname")[1]
                self._peers[port] = peer
                try:
                    await loop.connect_accepted_socket(lambda: outer, connection)
                    await asyncio.gather(outer.ended.wait(), inner.ended.wait())
                finally:
                    del self._peers[port]
        except OSError:
            return  # gRPC is not there any more
        finally:
            outer.abort()
            inner.abort()


class _Side(asyncio.BufferedProtocol):
    """One side of a connection that is passed on; what it says goes to the other at once."""

    def __init__(self, buffer: memoryview) -> None:
        self.other: _Side
        self.ended = asyncio.Event()
        self.silent = False
        self._transport: asyncio.Transport | None = None
        self._buffer = buffer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.other._transport is None:
            transport.pause_reading()
        else:
            self.other._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer  # one for all: what is in it is sent or copied before anybody else reads

    def buffer_updated(self, nbytes: int) -> None:
        assert self.other._transport
        self.other._transport.write(self._buffer[:nbytes])

    def eof_received(self) -> bool:
        self.silent = True
        if self.other.silent:
            return False
        if self.other._transport and not self.other._transport.is_closing():
            self.other._transport.write_eof()
        return True

    def pause_writing(self) -> None:
        if self.other._transport:
            self.other._transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other._transport:
            self.other._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()
        if self.other._transport:
            self.other._transport.close()

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()


async def _hello(connection: socket.socket) -> bytes:
    """Return the first record that somebody sends, without taking it; or what there is, if it is none of TLS."""
    loop = asyncio.get_running_loop()
    while True:
        await _readable(loop, connection)
        data = connection.recv(_LONGEST_RECORD, socket.MSG_PEEK)
        if not data or data[0] != _HANDSHAKE:
            return data
        if len(data) >= _RECORD_BYTES and len(data) >= _RECORD_BYTES + int.from_bytes(data[3:5], "big"):
            return data
        if len(data) == _LONGEST_RECORD:
            return data
        await asyncio.sleep(PAUSE_S)  # it stays readable: the rest can't be waited for


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
