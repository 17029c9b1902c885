# SPDX-License-Identifier: Apache-2.0
"""Work in threads that is over when its block is left, whatever ends the block."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
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
