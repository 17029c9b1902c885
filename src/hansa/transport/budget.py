# SPDX-License-Identifier: Apache-2.0
"""How much of all files together may be under way or in memory: pieces, shared out among the peers that move files.

A few peers at a time have a lane: a connection that has carried a file keeps its buffers until it ends, so it is better
to end one than to begin another. Guarantee: never more than twice ``pieces`` are granted, whatever the number of peers
and transfers; half of them to those that have a lane.

===============================================  ================================================================
few peers                                        each has a large share: enough under way for a fast link that is long
more peers than lanes                            they wait for one, who waits longest first
a peer that keeps a lane for ``TURN_S``, slow    if others wait, it goes on beside the lanes: with a share of the other
or at a standstill                               half, as soon as what it holds has room there
a peer with many transfers                       they have one peer's lane and share together
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
LANES = 2
TURN_S = 10.0


class Budget:
    """The pieces of all transfers; for one event loop.

    Args:
        pieces: how many may be granted to peers that have a lane, and again to those beside them.
        lanes: how many peers have one at a time.
    """

    def __init__(self, pieces: int = PIECES, lanes: int = LANES) -> None:
        self._pieces = pieces
        self._lanes = lanes
        self._transfers: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._turns: dict[str, asyncio.TimerHandle] = {}  # of the peers that have a lane
        self._beside: set[str] = set()
        self._waiting: dict[asyncio.Future[None], str] = {}

    @contextlib.contextmanager
    def share(self, peer: str) -> Iterator[Share]:
        """Give a transfer of ``peer`` its share while the body runs."""
        self._transfers[peer] += 1
        share = Share(self, peer)
        try:
            yield share
        finally:
            self._transfers -= Counter([peer])
            self._held -= Counter({peer: share.held})
            if peer not in self._transfers:
                self._beside.discard(peer)
                if turn := self._turns.pop(peer, None):
                    turn.cancel()
            self._wake()

    def _size(self, peer: str) -> int:
        """Return how many pieces a peer may have now."""
        if peer in self._beside:
            return max(1, self._pieces // len(self._beside))
        return max(1, self._pieces // min(self._lanes, max(1, len(self._transfers) - len(self._beside))))

    def _take(self, peer: str, most: int) -> int:
        if peer not in self._turns and peer not in self._beside:
            if len(self._turns) == self._lanes:
                return 0
            self._begin_turn(peer)
        free = self._pieces - self._sum(self._beside if peer in self._beside else self._turns)
        count = max(0, min(most, free, self._size(peer) - self._held[peer]))
        self._held += Counter({peer: count})
        return count

    def _sum(self, peers: set[str] | dict[str, asyncio.TimerHandle]) -> int:
        return sum(self._held[peer] for peer in peers)

    def _begin_turn(self, peer: str) -> None:
        self._turns[peer] = asyncio.get_running_loop().call_later(TURN_S, self._end_turn, peer)

    def _end_turn(self, peer: str) -> None:
        wanted = any(waits not in self._turns and waits not in self._beside for waits in self._waiting.values())
        if wanted and self._sum(self._beside) + self._held[peer] <= self._pieces:
            del self._turns[peer]
            self._beside.add(peer)
            self._wake()
        else:
            self._begin_turn(peer)

    def _give(self, peer: str, count: int) -> None:
        self._held -= Counter({peer: count})
        self._wake()

    def _wake(self) -> None:
        for waiter, peer in list(self._waiting.items()):
            if not waiter.done() and self._take(peer, 1):
                del self._waiting[waiter]
                waiter.set_result(None)


class Share:
    """What one transfer has of a budget; `Budget.share` makes one.

    Attributes:
        held: pieces that were granted and not given back.
    """

    def __init__(self, budget: Budget, peer: str) -> None:
        self.held = 0
        self._budget = budget
        self._peer = peer

    @property
    def size(self) -> int:
        """How many pieces its peer may have now."""
        return self._budget._size(self._peer)

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
                self._budget._give(self._peer, 1)
            raise
        self.held += 1

    def give(self) -> None:
        """Give a piece back."""
        self.held -= 1
        self._budget._give(self._peer, 1)
