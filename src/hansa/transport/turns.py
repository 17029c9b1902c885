# SPDX-License-Identifier: Apache-2.0
"""A few threads that go on with whichever connection is ready, so many can be under way and none holds a thread.

One thread waits for all sockets; when one is ready it goes on with that, and another thread waits. So from one wait to
the next, work stays in threads: by way of the event loop each wait would cost a tenth of a millisecond of it.

===============================================  ================================================================
nothing moves for as long as it may              StalledError
cancelled while it waits                         nobody goes on with it
cancelled amid a turn                            the turn ends first, so nothing is closed under it
a turn raises                                    raised to whoever waits for the work
===============================================  ================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Wait(enum.Enum):
    """What a turn ends with: something may be read, or written, or others are to have theirs."""

    READ = 1
    WRITE = 2
    TURN = 3


Turn = Callable[[], Wait | None]


class LostError(Exception):
    """The network's doing: to be tried again.

    Args:
        cause: what happened.
        connecting: whether no connection came about at all.
    """

    def __init__(self, cause: str, *, connecting: bool = False) -> None:
        super().__init__(cause)
        self.connecting = connecting


class StalledError(LostError):
    """Nothing moved, though the connection is open."""


class _Work:
    def __init__(self, turn: Turn, descriptor: int) -> None:
        self.turn = turn
        self.descriptor = descriptor
        self.future: Future[Wait | None] = Future()
        self.since = time.monotonic()
        self.turns = 0
        self.parked = False
        self.stopped = False


class Turns:
    """The threads; for one event loop.

    Args:
        linger_ms: how long a thread stays with a connection that has to wait, if there is a thread for each.
    """

    def __init__(self, linger_ms: int) -> None:
        self.linger_ms = linger_ms
        self._most = max(2, os.cpu_count() or 1)
        self._threads: list[threading.Thread] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._heard = socket.socketpair()
        self._heard.setblocking(False)
        self._selector.register(self._heard, selectors.EVENT_READ)
        self._lead = threading.Lock()  # of the thread that waits for sockets
        self._state = threading.Lock()
        self._ready: deque[_Work] = deque()
        self._under_way = 0
        self._closed = False

    @property
    def crowded(self) -> bool:
        """Whether there is more under way than there are threads."""
        return self._under_way > self._most

    async def go(self, turn: Turn, descriptor: int, patience_s: float, stall_s: float) -> Wait | None:
        """Have ``turn`` called, in a thread, whenever the socket ``descriptor`` is ready for what it waits for.

        Args:
            turn: goes on as far as it can without waiting.
            descriptor: the socket's.
            patience_s: how long it may stand still at first.
            stall_s: how long it may stand still later.

        Returns:
            ``TURN``, or None, when ``turn`` does.

        Raises:
            StalledError: it stood still.
            Exception: what ``turn`` raises.
        """
        work = _Work(turn, descriptor)
        waiting = asyncio.wrap_future(work.future)
        self._begin(work)
        try:
            while True:
                limit = patience_s if work.turns < 2 else stall_s
                left = work.since + limit - time.monotonic()
                if (await asyncio.wait({waiting}, timeout=max(min(left, stall_s), 0.1)))[0]:
                    return waiting.result()
                if work.parked and time.monotonic() >= work.since + limit:
                    raise StalledError(f"nothing moved for {limit:g} s")
        except BaseException:  # let go of it; raised again
            if not self._stop(work):
                while not waiting.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait({waiting})
                waiting.exception()
            raise
        finally:
            with self._state:
                self._under_way -= 1

    def close(self) -> None:
        """End the threads; nothing is under way any more."""
        with self._state:
            self._closed = True
        self._bell.send(b"!")
        for thread in self._threads:
            thread.join()
        self._selector.close()
        self._bell.close()
        self._heard.close()

    def _begin(self, work: _Work) -> None:
        with self._state:
            self._under_way += 1
            self._ready.append(work)
            if len(self._threads) < min(self._most, self._under_way):
                self._threads.append(threading.Thread(target=self._run, name="lane", daemon=True))
                self._threads[-1].start()
        self._bell.send(b"!")

    def _stop(self, work: _Work) -> bool:
        """Leave a work be; return whether no thread is at it."""
        with self._state:
            work.stopped = True
            if work.parked:
                self._unpark(work)
            elif work in self._ready:
                self._ready.remove(work)
            else:
                return False
        return True

    def _unpark(self, work: _Work) -> None:
        self._selector.unregister(work.descriptor)
        work.parked = False

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work.since = time.monotonic()
            work.turns += 1
            try:
                wait = work.turn()
                parked = wait in (Wait.READ, Wait.WRITE) and self._park(work, wait)
            except BaseException as error:  # noqa: BLE001 - whoever waits for it hears of it
                work.future.set_exception(error)
            else:
                if not parked:
                    work.future.set_result(wait)

    def _next(self) -> _Work | None:
        with self._lead:
            while True:
                with self._state:
                    if self._ready:
                        return self._ready.popleft()
                    if self._closed:
                        return None
                for key, _ in self._selector.select():
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self._heard.recv(1 << 12)
                        continue
                    with self._state:
                        if key.data.parked:  # it may have been stopped just now
                            self._unpark(key.data)
                            self._ready.append(key.data)

    def _park(self, work: _Work, wait: Wait) -> bool:
        """Wait for a work's socket, unless the work was stopped."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wait is Wait.WRITE else 0)
        with self._state:
            if not work.stopped:
                self._selector.register(work.descriptor, events, work)
                work.parked = True
            return work.parked
