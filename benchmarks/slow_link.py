# SPDX-License-Identifier: Apache-2.0
"""A link that delays what it carries and limits its rate, each way, for each connection; a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection as PipeConnection


class SlowLink:
    """A relay that passes each connection's bytes on after a delay, and no faster than a rate, each way.

    It is a process of its own: among the threads that sample memory it would be the slower one.
    """

    def __init__(self, port: int, delay_s: float, bytes_per_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        told, tells = context.Pipe(duplex=False)
        self._process = context.Process(target=relay, args=(port, delay_s, bytes_per_s, tells), daemon=True)
        self._process.start()
        self.port: int = told.recv()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def relay(target: int, delay_s: float, bytes_per_s: float, tells: PipeConnection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    tells.send(listener.getsockname()[1])
    while True:
        near = listener.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", target))
        except OSError:  # the server is being started again
            near.close()
            continue
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(4096)
            threading.Thread(target=take, args=(source, waiting, delay_s, bytes_per_s), daemon=True).start()
            threading.Thread(target=deliver, args=(sink, waiting), daemon=True).start()


def take(source: socket.socket, waiting: queue.Queue[tuple[float, bytes]], delay_s: float, bytes_per_s: float) -> None:
    """Read no faster than the link is; what was read is on its way for the delay."""
    free_at = time.monotonic()
    data = b"-"
    while data:
        try:
            data = source.recv(1 << 18)
        except OSError:
            data = b""
        free_at = max(free_at, time.monotonic()) + len(data) / bytes_per_s
        waiting.put((free_at + delay_s, data))
        time.sleep(max(0.0, free_at - time.monotonic()))


def deliver(sink: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
    data = b"-"
    with suppress(OSError):
        while data:
            when, data = waiting.get()
            time.sleep(max(0.0, when - time.monotonic()))
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
