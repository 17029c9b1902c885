# SPDX-License-Identifier: Apache-2.0
"""A network that misbehaves: a TCP relay that cuts or stalls what passes, and an HTTP proxy that only tunnels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Relay:
    """Passes bytes on between whoever dials it and ``port``.

    Attributes:
        port: where it listens.
        passed: bytes that went through, both ways.
        dialled: connections so far.
        targets: what CONNECT was asked for, if it is a proxy.
    """

    def __init__(self, target: int, *, tunnels: bool = False, local: str = "127.0.0.1") -> None:
        self.port = 0
        self.passed = 0
        self.dialled = 0
        self.targets: list[str] = []
        self._target = target
        self._tunnels = tunnels
        self._local = local
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._marks: list[tuple[int, Callable[[], None]]] = []

    def at(self, passed: int, do: Callable[[], None]) -> None:
        """Do something once ``passed`` bytes have gone through."""
        self._marks.append((passed, do))

    def cut(self) -> None:
        """Break all connections; new ones are welcome."""
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Keep connections open, take new ones, and pass nothing on."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass things on again, for new connections; what stalled stays silent."""
        for task in self._tasks:
            task.cancel()
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled += 1
        self._writers.add(writer)
        port = self._target
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if self._tunnels:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                assert method == "CONNECT"
                self.targets.append(target)
                port = int(target.rpartition(":")[2])
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(self._local, 0))
            self._writers.add(far_writer)
            for source, sink in ((reader, far_writer), (far_reader, writer)):
                task = asyncio.create_task(self._pass(source, sink))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._flowing.wait()
                self.passed += len(data)
                sink.write(data)
                await sink.drain()
                for mark in [mark for mark in self._marks if self.passed >= mark[0]]:
                    self._marks.remove(mark)
                    mark[1]()
        sink.close()

    async def _end(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def relay(target: int, *, tunnels: bool = False, local: str = "127.0.0.1") -> AsyncIterator[Relay]:
    """Start a relay to a port of this machine; with ``tunnels`` it is an HTTP proxy that knows CONNECT alone.

    The address ``local`` is where it dials from.
    """
    made = Relay(target, tunnels=tunnels, local=local)
    server = await asyncio.start_server(made._serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made._end()
