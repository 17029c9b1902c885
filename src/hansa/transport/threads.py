# SPDX-License-Identifier: Apache-2.0
"""Work in threads: over when its block is left, whatever ends the block; or done for many at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


class ThreadGroup(Generic[_T]):
    """Runs work in an executor's threads; leaving the block waits for all of it, so files can be closed after it.

    A thread can't be cancelled: who awaits its result can, and would close files under it. Here a cancellation
    waits for the threads and goes on then. Nothing is dropped: a piece that has come is written, its stream broken or
    not.

    Args:
        executor: where the threads are.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._queue: deque[Future[_T]] = deque()
        self._unfinished: set[Future[Any]] = set()

    async def __aenter__(self) -> ThreadGroup[_T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waiting = asyncio.gather(*map(asyncio.wrap_future, tuple(self._unfinished)), return_exceptions=True)
        cancelled = False
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def __len__(self) -> int:
        """How many results of `begin` were not taken yet."""
        return len(self._queue)

    def begin(self, work: Callable[[], _T]) -> None:
        """Begin some work; `next` returns what it returns."""
        self._queue.append(self._submit(work))

    async def next(self) -> _T:
        """Return the result of what was begun first; it is taken then."""
        return await asyncio.wrap_future(self._queue.popleft())

    async def do(self, work: Callable[[], _R]) -> _R:
        """Do some work beside what was begun, and return its result."""
        return await asyncio.wrap_future(self._submit(work))

    def _submit(self, work: Callable[[], _R]) -> Future[_R]:
        future = self._executor.submit(work)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future


class Together(Generic[_T, _R]):
    """Does in one go, in a thread, what was asked for while the last go was under way, as a group commit does.

    What is asked for in one turn of the event loop is done in one go, too. There is one go at a time, and whoever asks
    waits for at most two.

    Args:
        work: returns a result for each request, in order; one that is an exception is raised to who asked.
    """

    def __init__(self, work: Callable[[Sequence[_T]], Sequence[_R | Exception]]) -> None:
        self._work = work
        self._waiting: list[tuple[_T, asyncio.Future[_R]]] = []
        self._going: asyncio.Task[None] | None = None

    async def do(self, request: _T) -> _R:
        """Return what ``work`` returns for ``request``; it is done even if whoever asks is cancelled."""
        result: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, result))
        if self._going is None:
            self._going = asyncio.create_task(self._go())
        return await result

    async def _go(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, []
                results: Sequence[_R | Exception]
                try:
                    results = await asyncio.to_thread(self._work, [request for request, _ in asked])
                except Exception as error:  # noqa: BLE001 - each of them hears of it
                    results = [error] * len(asked)
                for (_, future), result in zip(asked, results, strict=True):
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._going = None
