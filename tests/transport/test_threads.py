# SPDX-License-Identifier: Apache-2.0
"""Threads that outlive nobody's block."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hansa.transport.threads import ThreadGroup


async def test_results_come_in_order_and_errors_where_they_are_taken() -> None:
    def late(index: int) -> int:
        time.sleep(0.02 * (3 - index))
        if index == 2:
            raise ValueError("two")
        return index

    with ThreadPoolExecutor(3) as executor:
        async with ThreadGroup[int](executor) as threads:
            for index in range(3):
                threads.begin(lambda index=index: late(index))
            assert [await threads.next(), await threads.next()] == [0, 1]
            assert len(threads) == 1
            with pytest.raises(ValueError, match="two"):
                await threads.next()


@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_whoever_cancels_waits_for_the_threads(cancellations: int) -> None:
    """However often: a file may be closed after the block, not before. What was begun is done."""
    begun, go = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        go.wait(20)
        ended.append("first")

    async def use(executor: ThreadPoolExecutor) -> None:
        async with ThreadGroup[None](executor) as threads:
            threads.begin(work)
            threads.begin(lambda: ended.append("second"))
            await threads.next()

    with ThreadPoolExecutor(1) as executor:
        task = asyncio.create_task(use(executor))
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["first", "second"]
