# SPDX-License-Identifier: Apache-2.0
"""The pieces that transfers may have under way: shared out fairly, never more than there are."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from hansa.transport import budget
from hansa.transport.budget import Budget, Share


def test_one_peer_has_all_and_more_peers_share() -> None:
    pieces = Budget(12, 0)
    with pieces.share("riga") as one:
        assert one.grab(20) == 12
        with pieces.share("visby") as two:
            assert (two.size, two.grab(20)) == (6, 0)
            one.give(4)
            assert one.grab(20) == 0, "it has more than its share"
            assert two.grab(20) == 4
            one.give(3)
            assert (two.grab(20), one.grab(20)) == (2, 1)
        assert one.grab(20) == 6, "what a transfer had comes back when it ends"


def test_a_peers_transfers_share_one_share() -> None:
    pieces = Budget(12, 0)
    with pieces.share("riga") as first, pieces.share("riga") as second, pieces.share("visby") as other:
        assert (first.grab(20), second.grab(20), other.grab(20)) == (6, 0, 6)


async def test_more_peers_than_pieces_take_turns() -> None:
    pieces = Budget(2, 0)
    most = held = 0
    order = []

    async def transfer(peer: str) -> None:
        nonlocal most, held
        with pieces.share(peer) as share:
            for _ in range(3):
                await share.wait()
                held += 1
                most = max(most, held)
                await asyncio.sleep(0)
                order.append(peer)
                held -= 1
                share.give()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(transfer(f"site-{number}"))
    assert most == 2
    assert len(order) == 15
    assert set(order[:5]) == {f"site-{number}" for number in range(5)}, "nobody comes twice before all came once"


async def test_a_peer_that_has_its_share_holds_nobody_up() -> None:
    pieces = Budget(2, 0)
    with pieces.share("riga") as riga, pieces.share("visby") as visby, pieces.share("riga") as again:
        assert (riga.grab(2), visby.grab(2)) == (1, 1)
        first, second = (asyncio.create_task(share.wait()) for share in (again, visby))
        await asyncio.sleep(0)
        visby.give()
        async with asyncio.timeout(30):
            await second
        assert not first.done()
        riga.give()
        async with asyncio.timeout(30):
            await first


async def test_waiting_is_given_up() -> None:
    """Cancelled before its turn, or in the very moment that it came: no piece is lost."""
    for given_first in (False, True):
        pieces = Budget(1, 0)
        with pieces.share("riga") as one, pieces.share("visby") as two:
            assert one.grab(1) == 1
            waiting = asyncio.create_task(two.wait())
            await asyncio.sleep(0)
            if given_first:
                one.give()
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            if not given_first:
                one.give()
            assert one.grab(1) == 1


async def test_what_stands_still_makes_room_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STANDS_S", 0.0)
    pieces = Budget(2, 3)
    with contextlib.ExitStack() as stack:

        async def stands(peer: str, count: int) -> Share:
            share = stack.enter_context(pieces.share(peer))
            async with asyncio.timeout(30):
                await share.wait()
            share.grab(count - 1)
            stack.enter_context(share.stands(count))
            return share

        first = await stands("riga", 2)
        await stands("riga", 1)
        last = await stands("visby", 1)
        with pieces.share("lund") as other:
            async with asyncio.timeout(30):
                await other.wait()
            waiting = asyncio.create_task(other.wait())
            await asyncio.wait([waiting], timeout=0.1)
            assert (last.held, waiting.done()) == (1, False), "three stand still, and two move"
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        assert first.held == 2
    with pieces.share("riga") as alone:
        assert alone.grab(9) == 2, "all came back"
