# SPDX-License-Identifier: Apache-2.0
"""A whole session of secure aggregation, in memory, with sites that drop out and restarts between all phases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hansa.core.lazy import BLOCK, Array
from hansa.core.tree import Parts
from hansa.secagg.local import LocalSigner, local_signers
from hansa.secagg.protocol import Signer, Terms
from hansa.secagg.ring import Encoding, Range, encoding
from hansa.secagg.server import Server
from hansa.secagg.site import Site

PHASES = ("advertise", "share", "mask", "vote", "reveal")


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{number:03d}" for number in range(count))


def small_ring(sites: int, size: int = 5, bound: float = 1.0, **options: bool) -> Encoding:
    return encoding({"delta": {"w": Range(-bound, bound, shape=(size,))}}, sites, **options)


def terms_for(count: int, ring: Encoding | None = None, *, round: int = 1, attempt: int = 1, **more: float) -> Terms:
    return Terms("job-1", round, attempt, names(count), ring or small_ring(count), **more)  # type: ignore[arg-type]


def masked(site: Site, parts: Parts) -> Array:
    return np.asarray(site.masked(parts))


class Disk:
    """Where a state is durable: what was stored last, and how often."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.writes: list[bytes] = []

    def store(self, data: bytes) -> None:
        self.data = data
        self.writes.append(data)


@dataclass
class Federation:
    """Sites and a server, each with its disk; with ``restarts`` nobody keeps anything in memory from call to call."""

    terms: Terms
    restarts: bool = False
    signers: Mapping[str, Signer] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.signers = self.signers or local_signers(self.terms.sites)
        self.disks = {name: Disk() for name in (*self.terms.sites, "server")}
        self._sites = {name: self._new(name) for name in self.terms.sites}
        self.server = self.new_server()

    def _new(self, name: str) -> Site:
        return Site(self.terms, name, self.signers[name], self.disks[name].store, self.disks[name].data)

    def new_server(self) -> Server:
        disk = self.disks["server"]
        return Server(self.terms, self.signers[self.terms.sites[0]], disk.store, disk.data)

    def site(self, name: str) -> Site:
        if self.restarts:
            self._sites[name] = self._new(name)
        return self._sites[name]

    def closed(self) -> None:
        if self.restarts:
            self.server = self.new_server()

    def advertise(self, who: Sequence[str]) -> bytes:
        for name in who:
            self.server.add_advert(name, self.site(name).advertise())
        roll = self.server.close_adverts()
        self.closed()
        return roll

    def share(self, who: Sequence[str], roll: bytes) -> None:
        for name in who:
            self.server.add_shares(name, self.site(name).share(roll))
        self.server.close_shares()
        self.closed()

    def mask(self, who: Sequence[str], values: Mapping[str, Parts]) -> Array:
        total = np.zeros(self.terms.encoding.size, self.terms.encoding.dtype)
        for name in who:
            self.site(name).receive(self.server.inbox(name))
            vector = masked(self.site(name), values[name])
            self.server.check_upload(name, vector.size, vector.dtype)
            total += vector
            self.server.accept(name)
        return total

    def survivors(self) -> bytes:
        message = self.server.close_uploads()
        self.closed()
        return message

    def vote(self, who: Sequence[str], survivors: bytes) -> bytes:
        for name in who:
            self.server.add_vote(name, self.site(name).vote(survivors))
        votes = self.server.close_votes()
        self.closed()
        return votes

    def reveal(self, who: Sequence[str], votes: bytes) -> None:
        for name in who:
            self.server.add_reveal(name, self.site(name).reveal(votes))

    def unmask(self, total: Array) -> Array:
        masks = self.server.close_reveals()
        self.closed()
        for start in range(0, total.size, BLOCK):
            masks.apply(start, total[start : start + BLOCK])
        return total

    def run(self, values: Mapping[str, Parts], gone: Mapping[str, Collection[str]] | None = None) -> Array:
        """Run all phases; ``gone`` says who drops out before which of ``PHASES``."""
        left = {}
        there = list(self.terms.sites)
        for phase in PHASES:
            there = [name for name in there if name not in (gone or {}).get(phase, ())]
            left[phase] = there
        self.share(left["share"], self.advertise(left["advertise"]))
        total = self.mask(left["mask"], values)
        self.reveal(left["reveal"], self.vote(left["vote"], self.survivors()))
        return self.unmask(total)


def up_to(federation: Federation, phase: str, values: Mapping[str, Parts]) -> bytes:
    """Run all phases before ``phase``, nobody dropping out, and return what the server says to begin it."""
    who = federation.terms.sites
    roll = federation.advertise(who)
    if phase == "share":
        return roll
    federation.share(who, roll)
    if phase == "mask":
        return b""
    federation.mask(who, values)
    survivors = federation.survivors()
    if phase == "vote":
        return survivors
    return federation.vote(who, survivors)


def constant(terms: Terms, value: float = 0.25) -> dict[str, Parts]:
    """Return values for every site: the same number everywhere."""
    return {
        name: {
            part: {f.name: np.full(f.shape, value) for f in terms.encoding.fields if f.part == part}
            for part in {f.part for f in terms.encoding.fields}
        }
        for name in terms.sites
    }


__all__ = [
    "PHASES",
    "Disk",
    "Federation",
    "LocalSigner",
    "constant",
    "masked",
    "names",
    "small_ring",
    "terms_for",
    "up_to",
]
