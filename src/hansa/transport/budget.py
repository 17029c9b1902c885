# SPDX-License-Identifier: Apache-2.0
"""How much of all files together may be under way or in memory: pieces, shared out among the peers that move files.

Guarantee: never more than ``pieces`` + ``standing`` pieces are granted, whatever the number of peers and transfers.

===============================================  ================================================================
few peers                                        each has a large share: enough under way for a fast link that is long
more peers than pieces                           they take turns, a piece each
a peer with many transfers                       they have one peer's share together
a transfer that stands still                     what it was granted takes up nobody's turn (`Share.stands`), its own
                                                 peer's included, so long as no more than ``standing`` pieces do
a transfer that ends, however                    gives back what it had
===============================================  ================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

PIECES = 24
"""Of a MiB each: what a link of 800 Mbit/s holds over a round trip of 200 ms, and some."""
STANDING = 24
STANDS_S = 2.0
"""A transfer of which nothing has moved for so long stands still."""


class Budget:
    """The pieces of all transfers; for one event loop.

    Args:
        pieces: how many may be granted to transfers that move.
        standing: how many more to those that stand still.
    """

    def __init__(self, pieces: int = PIECES, standing: int = STANDING) -> None:
        self._pieces = self._free = pieces
        self._room = standing
        self._transfers: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], str] = {}

    @property
    def fair(self) -> int:
        """How many pieces a peer may have now."""
        return max(1, self._pieces // max(1, len(self._transfers)))

    @contextlib.contextmanager
    def share(self, peer: str) -> Iterator[Share]:
        """Give a transfer of ``peer`` its share while the body runs."""
        self._transfers[peer] += 1
        share = Share(self, peer)
        try:
            yield share
        finally:
            self._transfers -= Counter([peer])
            share.give(share.held)

    def _take(self, peer: str, most: int) -> int:
        count = max(0, min(most, self._free, self.fair - self._held[peer]))
        self._free -= count
        self._held[peer] += count
        return count

    def _give(self, peer: str, moving: int, standing: int) -> None:
        self._free += moving
        self._room += standing
        self._held -= Counter({peer: moving})
        self._wake()

    def _wake(self) -> None:
        for waiter, waits in list(self._waiting.items()):
            if self._free and not waiter.done() and self._take(waits, 1):
                del self._waiting[waiter]
                waiter.set_result(None)


class Share:
    """What one transfer has of a budget; `Budget.share` makes one.

    Attributes:
        held: pieces that were granted and not given back.
    """

    def __init__(self, budget: Budget, peer: str) -> None:
        self.held = 0
        self._standing = 0
        self._budget = budget
        self._peer = peer

    @property
    def size(self) -> int:
        """How many pieces its peer may have now."""
        return self._budget.fair

    def grab(self, most: int) -> int:
        """Take up to ``most`` pieces, as many as may be had at once, and return how many these are."""
        count = self._budget._take(self._peer, most)
        self.held += count
        return count

    async def wait(self) -> None:
        """Take one piece, once it may be had; who waits longest is first."""
        if self.grab(1):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._budget._waiting[turn] = self._peer
        try:
            await turn
        except asyncio.CancelledError:
            if self._budget._waiting.pop(turn, None) is None:  # it came at the same moment
                self._budget._give(self._peer, 1, 0)
            raise
        self.held += 1

    def give(self, count: int = 1) -> None:
        """Give pieces back."""
        standing = min(count, self._standing)
        self.held -= count
        self._standing -= standing
        self._budget._give(self._peer, count - standing, standing)

    @contextlib.contextmanager
    def stands(self, count: int) -> Iterator[None]:
        """Let go of up to ``count`` pieces for others' sake if the body takes longer than ``STANDS_S``."""
        timer = asyncio.get_running_loop().call_later(STANDS_S, self._stand, count)
        try:
            yield
        finally:
            timer.cancel()

    def _stand(self, count: int) -> None:
        count = min(count - self._standing, self._budget._room)
        if count > 0:
            self._standing += count
            self._budget._give(self._peer, count, -count)
