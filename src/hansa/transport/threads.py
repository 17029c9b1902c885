# SPDX-License-Identifier: Apache-2.0
"""Work in threads: over when whoever began it goes on, whatever happens; or done for many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


async def finished(work: Callable[[], _R]) -> _R:
    """Return what ``work`` returns, done in a thread of the event loop's.

    A thread can't be cancelled: who awaits its result can, and would close files under it. Here a cancellation, or
    several, wait for the thread and go on then.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        future.exception()  # whoever cancels does not want to know
        raise asyncio.CancelledError
    return future.result()


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
