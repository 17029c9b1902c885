# SPDX-License-Identifier: Apache-2.0
"""Threads that outlive nobody's block, and those that work for many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from hansa.transport.threads import Together, finished


@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_whoever_cancels_waits_for_the_threads(cancellations: int) -> None:
    """However often: a file may be closed after it, not before."""
    begun, go = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        go.wait(20)
        ended.append("work")

    task = asyncio.create_task(finished(work))
    await asyncio.to_thread(begun.wait, 20)
    for _ in range(cancellations):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["work"]


async def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await finished(lambda: 1 / 0)
    assert await finished(lambda: 7) == 7


async def test_what_is_asked_for_meanwhile_is_done_in_one_go() -> None:
    """Each gets its own result or error; who was cancelled is done all the same."""
    begun, go = threading.Event(), threading.Event()
    goes: list[list[int]] = []

    def work(numbers: Sequence[int]) -> list[int | Exception]:
        goes.append(list(numbers))
        begun.set()
        go.wait(20)
        return [ValueError(number) if number == 3 else 10 * number for number in numbers]

    together = Together(work)
    first = [asyncio.create_task(together.do(number)) for number in (1, 2)]
    await asyncio.to_thread(begun.wait, 20)
    then = [asyncio.create_task(together.do(number)) for number in (3, 4, 5)]
    await asyncio.sleep(0)
    then[2].cancel()
    go.set()
    assert await asyncio.gather(*first) == [10, 20]
    with pytest.raises(ValueError, match="3"):
        await then[0]
    assert await then[1] == 40
    assert goes == [[1, 2], [3, 4, 5]]
    assert await together.do(6) == 60


async def test_what_fails_as_a_whole_fails_for_each_and_not_for_the_next() -> None:
    results = iter([OSError("the disk is full"), None])

    def work(numbers: Sequence[int]) -> Sequence[int]:
        if error := next(results):
            raise error
        return numbers

    together = Together(work)
    failed = await asyncio.gather(together.do(1), together.do(2), return_exceptions=True)
    assert [str(error) for error in failed] == ["the disk is full"] * 2
    assert await together.do(3) == 3
