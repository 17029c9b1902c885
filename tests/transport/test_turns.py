# SPDX-License-Identifier: Apache-2.0
"""A few threads serve many connections, and let go of each when they should."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from hansa.transport.turns import StalledError, Turns, Wait

PAIRS = 40


@pytest.fixture
def turns() -> Iterator[Turns]:
    made = Turns(1)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield near, far


async def test_many_connections_share_a_few_threads(turns: Turns) -> None:
    """Each echoes what it is told, in any order, and all end."""
    used: set[str] = set()

    class Echo:
        def __init__(self) -> None:
            self.near, self.far = socket.socketpair()
            self.near.setblocking(False)
            self.heard = b""

        def turn(self) -> Wait | None:
            used.add(str(threading.get_ident()))
            while True:
                try:
                    data = self.near.recv(1)
                except BlockingIOError:
                    return Wait.READ
                if data == b".":
                    return None
                self.heard += data

    async with contextlib.AsyncExitStack() as stack:
        echoes = [Echo() for _ in range(PAIRS)]
        for echo in echoes:
            stack.enter_context(echo.near)
            stack.enter_context(echo.far)
        works = [asyncio.create_task(turns.go(echo.turn, echo.near.fileno(), 60, 60)) for echo in echoes]
        for letter in (b"a", b"b", b"c"):
            for echo in reversed(echoes):
                echo.far.send(letter)
            await asyncio.sleep(0)
        assert turns.crowded
        for echo in echoes:
            echo.far.send(b".")
        assert await asyncio.gather(*works) == PAIRS * [None]
        assert {echo.heard for echo in echoes} == {b"abc"}
    assert not turns.crowded
    assert len(used) <= max(2, len(turns._threads))


async def test_a_turn_that_others_are_to_have_comes_back(
    turns: Turns, pair: tuple[socket.socket, socket.socket]
) -> None:
    assert await turns.go(lambda: Wait.TURN, pair[0].fileno(), 1, 1) is Wait.TURN


async def test_who_stands_still_is_told(turns: Turns, pair: tuple[socket.socket, socket.socket]) -> None:
    """After the first sign of life the other limit holds."""
    near, far = pair

    def turn() -> Wait:
        with contextlib.suppress(BlockingIOError):
            near.recv(1)
        return Wait.READ

    with pytest.raises(StalledError, match=r"0\.05 s"):
        await turns.go(turn, near.fileno(), 0.05, 60)
    asyncio.get_running_loop().call_later(0.05, far.send, b"x")
    with pytest.raises(StalledError, match=r"0\.07 s"):
        await turns.go(turn, near.fileno(), 60, 0.07)


async def test_what_a_turn_raises_is_raised(turns: Turns, pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ZeroDivisionError):
        await turns.go(lambda: 1 // 0, pair[0].fileno(), 1, 1)  # type: ignore[arg-type,return-value]


async def test_cancelled_while_it_waits(turns: Turns, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    calls, waits = 0, asyncio.Event()
    loop = asyncio.get_running_loop()

    def turn() -> Wait:
        nonlocal calls
        calls += 1
        loop.call_soon_threadsafe(waits.set)
        return Wait.READ

    work = asyncio.create_task(turns.go(turn, near.fileno(), 60, 60))
    await waits.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    far.send(b"x")
    near_again = asyncio.create_task(turns.go(lambda: None, near.fileno(), 60, 60))
    assert await near_again is None, "the socket is free for other work"
    assert calls == 1


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_cancelled_amid_a_turn(
    turns: Turns, pair: tuple[socket.socket, socket.socket], cancellations: int
) -> None:
    begun, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    ended = []

    def turn() -> Wait:
        loop.call_soon_threadsafe(begun.set)
        go.wait(20)
        ended.append("turn")
        return Wait.READ

    work = asyncio.create_task(turns.go(turn, pair[0].fileno(), 60, 60))
    await begun.wait()
    for _ in range(cancellations):
        work.cancel()
        await asyncio.sleep(0.01)
    assert not work.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert ended == ["turn"]
