# SPDX-License-Identifier: Apache-2.0
"""Who shares masks with whom, and how many must answer: Bonawitz et al. 2017 and SecAgg+ (Bell et al. 2020).

Up to ``COMPLETE`` sites all pairs do. Above, sites stand in a circle and each has the k/2 next to it on either side as
neighbours (Harary's graph); their order is that of a hash over all sites' public keys, so nobody chooses it. A site's
*holders*, its neighbours and itself, hold the shares of its secrets.

With N sites asked, n that take part, C corrupt and c of any site's holders corrupt at most:

    threshold t = floor((holders + c) / 2) + 1    no two sets of t holders without an honest one in common, so that the
                                                  server can't get both secrets of a site, each from another set
    quorum    q = floor((N + C) / 2) + 1          the same for those who sign the survivor set: there is only one, with
                                                  more than (N - C) / 2 honest sites; and never fewer than the minimum

A complete graph has c = C, and nothing is left to chance. For a sparse one k is the least even number with

    n · P[more than c of k neighbours corrupt]                        <= 2^-80
    n · P[fewer than t of k neighbours left]                          <= 2^-30
    n² · P[k given neighbours gone: the circle cut in two places]     <= 2^-40, or impossible

the first two of hypergeometric tails, C and D being the shares of corrupt and of dropped sites that the session allows
for. The first is 2^-40 beyond what is asked for, since a server that lets corrupt sites choose their keys last can try
2^40 orders. The other two suppose that sites do not drop out by the server's choice. Against a server that chooses, the
recovery is its own loss, and what it can get by cutting the circle are sums over no fewer than t - c honest sites: a
site's mask comes off only if t of its holders are on the same side.

| case | result |
|---|---|
| fewer than three sites | PrivacyError: with two each would read the other's values in the sum |
| as many corrupt sites as leave no threshold | PrivacyError |
| shares of corrupt and dropped sites that no k serves | the complete graph; above ``MOST_NEIGHBOURS`` PrivacyError |
| sites that are asked and left out | C and q stay as they were: a server that asks only its friends gains nothing |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hansa.errors import PrivacyError

COMPLETE = 64
MOST_NEIGHBOURS = 1024
LEAST = 3
"""Fewer sites than this are never summed."""

PRIVACY_BITS = 80
RECOVERY_BITS = 30
CONNECTED_BITS = 40


@dataclass(frozen=True)
class Shape:
    """The numbers of a session's graph.

    Attributes:
        degree: k, the neighbours of a site.
        corrupt: c, how many of a site's holders may be corrupt.
        threshold: t, how many shares give a secret back.
        quorum: q, the fewest sites that are summed, and that must sign the survivor set.
    """

    degree: int
    corrupt: int
    threshold: int
    quorum: int


@lru_cache(maxsize=256)
def shape(members: int, asked: int, corrupt: float, dropout: float, minimum: int = LEAST) -> Shape:
    """Return the graph's numbers.

    Args:
        members: n, the sites that advertised keys.
        asked: the sites that were asked.
        corrupt: the share of those asked that may work with the server.
        dropout: the share of those asked that may drop out; only a sparse graph needs to know.
        minimum: the fewest sites that may be summed, at least three.

    Raises:
        PrivacyError: no threshold protects so few sites against so many corrupt ones.
    """
    minimum = max(minimum, LEAST)
    bad = math.floor(corrupt * asked)
    quorum = max(minimum, (asked + bad) // 2 + 1)
    if members < quorum:
        raise PrivacyError(
            f"Of {asked} sites {members} take part; a secure sum needs {quorum} of them, as it is to hold against "
            f"{bad} that work with the server. Wait for more sites, or ask for a smaller share of corrupt ones."
        )
    if members > COMPLETE:
        found = _sparse(members, min(bad, members), min(math.floor(dropout * asked), members))
        if found:
            return Shape(*found, quorum)
        if members > MOST_NEIGHBOURS:
            raise PrivacyError(
                f"No graph with {MOST_NEIGHBOURS} neighbours protects {members} sites of which {bad} work with the "
                f"server and {dropout:.0%} drop out. Ask for smaller shares."
            )
    return Shape(members - 1, bad, (members + bad) // 2 + 1, quorum)


def _sparse(members: int, bad: int, gone: int) -> tuple[int, int, int] | None:
    each = math.log2(members)
    corrupt = 0
    for degree in range(4, min(members - 2, MOST_NEIGHBOURS) + 1, 2):
        while each + _tail(members - 1, bad, degree, corrupt) > -PRIVACY_BITS:
            corrupt += 1
        threshold = (degree + 1 + corrupt) // 2 + 1
        if threshold > degree or each + _tail(members - 1, gone, degree, degree - threshold) > -RECOVERY_BITS:
            continue
        out = bad + gone
        if out < degree or 2 * each + degree * math.log2(out / members) <= -CONNECTED_BITS:
            return degree, corrupt, threshold
    return None


def _tail(population: int, marked: int, drawn: int, most: int) -> float:
    """Return log2 P[more than ``most`` marked ones among ``drawn`` of ``population``], without replacement."""
    low, high = max(most + 1, drawn - (population - marked)), min(drawn, marked)
    if low > high:
        return -math.inf
    all_ways = _log_ways(population, drawn)
    logs = [_log_ways(marked, i) + _log_ways(population - marked, drawn - i) - all_ways for i in range(low, high + 1)]
    top = max(logs)
    return (top + math.log(math.fsum(math.exp(value - top) for value in logs))) / math.log(2)


def _log_ways(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


class Graph:
    """Everybody's neighbours.

    Args:
        members: the sites' names.
        seed: the hash of all public keys.
        degree: k, even, or all others.
    """

    def __init__(self, members: Sequence[str], seed: bytes, degree: int) -> None:
        prefix = b"hansa secagg circle v1\0" + seed
        self._circle = sorted(members, key=lambda name: hashlib.sha256(prefix + name.encode()).digest())
        self._place = {name: place for place, name in enumerate(self._circle)}
        count = len(self._circle)
        everybody = degree >= count - 1
        self._steps = range(1, count) if everybody else [s for s in range(-(degree // 2), degree // 2 + 1) if s]
        self._found: dict[str, tuple[str, ...]] = {}

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Return a site's neighbours, sorted."""
        if name not in self._found:
            place, count = self._place[name], len(self._circle)
            self._found[name] = tuple(sorted(self._circle[(place + step) % count] for step in self._steps))
        return self._found[name]
