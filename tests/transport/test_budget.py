# SPDX-License-Identifier: Apache-2.0
"""The pieces that transfers may have under way: shared out fairly, never more than there are."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from hansa.transport import budget
from hansa.transport.budget import Budget


async def test_one_peer_has_all_and_two_share() -> None:
    pieces = Budget(12, 2)
    with pieces.share("riga") as one:
        assert one.grab(20) == 12
        with pieces.share("visby") as two:
            assert (two.size, two.grab(20)) == (6, 0)
            one.give()
            assert one.grab(20) == 0, "it has more than its share"
            assert two.grab(20) == 1
        assert one.grab(20) == 1, "what a transfer had comes back when it ends"


async def test_a_peers_transfers_share_one_share() -> None:
    pieces = Budget(12, 2)
    with pieces.share("riga") as first, pieces.share("riga") as second, pieces.share("visby") as other:
        assert (first.grab(20), second.grab(20), other.grab(20)) == (6, 0, 6)


async def test_more_peers_than_lanes_come_one_after_another() -> None:
    pieces = Budget(4, 2)
    moving: set[str] = set()
    most, ended = 0, []

    async def transfer(peer: str) -> None:
        nonlocal most
        with pieces.share(peer) as share:
            for _ in range(5):
                await share.wait()
                moving.add(peer)
                most = max(most, len(moving))
                await asyncio.sleep(0)
                share.give()
            moving.discard(peer)
        ended.append(peer)

    sites = [f"site-{number}" for number in range(7)]
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for site in sites:
            group.create_task(transfer(site))
    assert ended == sites
    assert most == 2


async def test_waiting_is_given_up() -> None:
    """Cancelled before its turn, or in the very moment that it came: no piece is lost."""
    for given_first in (False, True):
        pieces = Budget(1, 2)
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


async def test_who_is_slow_goes_on_beside_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TURN_S", 0.01)
    pieces = Budget(4, 1)
    with contextlib.ExitStack() as stack:
        shares = []
        for number in range(3):
            shares.append(stack.enter_context(pieces.share(f"slow-{number}")))
            async with asyncio.timeout(30):
                await shares[-1].wait()
            shares[-1].grab(2 - len(shares))
        assert [share.held for share in shares] == [2, 1, 1]
        assert [share.size for share in shares] == [2, 2, 4], "two share what is beside the lanes, one has the lane"
        assert shares[1].grab(9) == 1
        with pieces.share("riga") as waits:
            waiting = asyncio.create_task(waits.wait())
            await asyncio.wait([waiting], timeout=0.1)
            assert not waiting.done(), "what is beside the lanes is taken: never more than twice the pieces"
            shares[0].give()
            async with asyncio.timeout(30):
                await waiting
            assert shares[0].grab(9) == 0, "three share it now"
    with pieces.share("riga") as alone:
        assert alone.grab(9) == 4, "all came back"
