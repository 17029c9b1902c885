# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation: how fast masks are made and added, and a whole session; README.md has the figures.

python benchmarks/secagg.py [--sites 100] [--millions 10] [--gone 0.1] [--bits 32]
python benchmarks/secagg.py --certified --sites 1000     the messages of a deployed session, with real certificates

Sites take their turns in one process of one thread; seconds are its processor's. The sum is checked against that of the
integers.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hansa.core.lazy import BLOCK, Leaf
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.pki.provision import provision
from hansa.secagg import graph, protocol
from hansa.secagg.keys import Keystream, Masks
from hansa.secagg.local import local_signers
from hansa.secagg.protocol import Advert, Roll, Terms, Votes
from hansa.secagg.ring import Encoding, Range, Vector, encoding
from hansa.secagg.server import Server
from hansa.secagg.site import Site
from hansa.transport.messages import INLINE_BYTES

PHASES = ("advertise", "share", "receive", "mask", "vote", "reveal")


def rate(work: Callable[[], object], num_bytes: int, seconds: float = 0.6) -> float:
    """Return GB/s: the median of five times."""
    found = []
    for _ in range(5):
        begin, times = time.process_time(), 0
        while time.process_time() - begin < seconds / 5:
            work()
            times += 1
        found.append(times * num_bytes / (time.process_time() - begin) / 1e9)
    return statistics.median(found)


def masks(neighbours: int) -> None:
    """Print the cipher's own rate, and that of making masks and adding them, in turns."""
    zeros, out = bytes(1 << 18), bytearray(1 << 18)
    encryptor = Cipher(algorithms.AES(bytes(16)), modes.CTR(bytes(16))).encryptor()
    for bits in (32, 64):
        ring = np.dtype(f"uint{bits}")
        values = np.zeros(BLOCK, ring)
        made = Masks(ring, [(Keystream(bytes([i]), "m", b""), (-1) ** i) for i in range(neighbours)])
        pairs = [
            (
                rate(lambda: encryptor.update_into(zeros, out), len(zeros)),
                rate(lambda m=made, v=values: m.apply(0, v), neighbours * values.nbytes),  # type: ignore[misc]
            )
            for _ in range(5)
        ]
        cipher, both = (statistics.median(column) for column in zip(*pairs, strict=True))
        share = statistics.median(b / c for c, b in pairs)
        print(f"AES-128-CTR {cipher:.1f} GB/s, masks over {bits} bits made and added {both:.1f} GB/s: {share:.0%}")


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.process_time() - begin


def session(count: int, size: int, gone: int, bits: int) -> None:
    """Run one session; ``gone`` sites drop out after they have dealt shares."""
    names = tuple(f"site-{number:05d}" for number in range(count))
    ring = encoding({"delta": {"w": Range(-1, 1, shape=(size,))}}, count)
    ring = Encoding(64 if bits == 64 else 32, count, False, ring.fields)
    terms = Terms("benchmark", 1, 1, names, ring)
    signers = local_signers(names)
    stored: dict[str, int] = {}

    def store(name: str) -> Callable[[bytes], None]:
        return lambda data: stored.update({name: len(data)})

    base = np.random.default_rng(0).random(size, np.float32)
    clock, memory = Clock(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sites = {name: Site(terms, name, signers[name], store(name)) for name in names}
    server = Server(terms, signers[names[0]], store("server"))
    sent: dict[str, int] = {}

    def turn(phase: str, name: str, work: Callable[[], bytes]) -> bytes:
        with clock(phase):
            message = work()
        sent[phase] = max(sent.get(phase, 0), len(message))
        return message

    for name in names:
        advert = turn("advertise", name, sites[name].advertise)
        with clock("server"):
            server.add_advert(name, advert)
    with clock("server"):
        roll = server.close_adverts()
    for name in names:
        shares = turn("share", name, lambda name=name: sites[name].share(roll))  # type: ignore[misc]
        with clock("server"):
            server.add_shares(name, shares)
    with clock("server"):
        server.close_shares()
    total, plain = np.zeros(size, ring.dtype), np.zeros(size, ring.dtype)
    for number, name in enumerate(names):
        with clock("server"):
            inbox = server.inbox(name)
        with clock("receive"):
            sites[name].receive(inbox)
        if number >= count - gone:
            continue
        factor = np.float32((number + 1) / count)
        parts = {"delta": {"w": Leaf.of(base) * factor}}
        with clock("mask"):
            upload = sites[name].masked(parts)  # type: ignore[arg-type]
        encoded = Vector(ring, parts, name, 1, Keystream(b"", "", b""))  # type: ignore[arg-type]
        block = np.empty(BLOCK, ring.dtype)
        for start in range(0, size, BLOCK):
            with clock("mask"):
                masked = upload[start : start + BLOCK]
            with clock("server's adding"):
                np.add(total[start : start + BLOCK], masked, out=total[start : start + BLOCK])
            encoded.encode(start, block[: masked.size])
            plain[start : start + BLOCK] += block[: masked.size]
        server.accept(name)
    with clock("server"):
        survivors = server.close_uploads()
    for name in server.survivors:
        vote = turn("vote", name, lambda name=name: sites[name].vote(survivors))  # type: ignore[misc]
        with clock("server"):
            server.add_vote(name, vote)
    with clock("server"):
        votes = server.close_votes()
    for name in server.survivors:
        reveal = turn("reveal", name, lambda name=name: sites[name].reveal(votes))  # type: ignore[misc]
        with clock("server"):
            server.add_reveal(name, reveal)
    with clock("server's recovery"):
        off = server.close_reveals()
    with clock("server's unmasking"):
        for start in range(0, size, BLOCK):
            off.apply(start, total[start : start + BLOCK])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    np.testing.assert_array_equal(total, plain)
    each = {phase: clock.spent[phase] / (count if phase in PHASES[:3] else count - gone) for phase in PHASES}
    print(f"{count} sites, {size:,} parameters, {gone} dropped out, {bits} bits; the sum is that of the integers")
    print(f"a site: {sum(each.values()):.2f} s:", ", ".join(f"{phase} {spent:.3f}" for phase, spent in each.items()))
    others = {what: spent for what, spent in clock.spent.items() if what not in PHASES}
    print(f"server: {sum(others.values()):.2f} s:", ", ".join(f"{what} {spent:.2f}" for what, spent in others.items()))
    print(f"masks taken off: {len(off)}; roll {len(roll) / 1e3:.0f} kB; a site sends, bytes: {sent}")
    print(
        f"largest state: site {max(v for k, v in stored.items() if k != 'server'):,} B, server {stored['server']:,} B"
    )
    print(f"peak memory beyond the values: {peak / 1024:.0f} MiB; of it two sums, {2 * total.nbytes >> 20} MiB")


def certified(count: int) -> None:
    """Print how large a deployed session's messages are, and how long one site takes over them."""
    names = tuple(f"site-{number:05d}" for number in range(count))
    terms = Terms("benchmark", 1, 1, names, encoding({"delta": {"w": Range(-1, 1, shape=(10,))}}, count))
    with tempfile.TemporaryDirectory() as folder:
        made = provision(Path(folder) / "fed", "benchmark", "127.0.0.1:1", names, ["lead"])
        kits = {name: Identities(Kit(made.sites[name])) for name in names}
        sites = {name: Site(terms, name, kits[name], lambda data: None) for name in names}
        adverts = tuple(protocol.unpack(sites[name].advertise(), Advert) for name in names)
        roll = protocol.pack(Roll(terms.digest(), adverts))
        begin = time.process_time()
        shares = sites[names[0]].share(roll)
        spent = time.process_time() - begin
        signatures = {name: kits[name].sign(b"") for name in names}
    votes = protocol.pack(Votes(terms.digest(), signatures))
    degree = graph.shape(count, count, terms.corrupt, terms.dropout).degree
    lengths = {"terms": protocol.pack(terms), "an advert": protocol.pack(adverts[0]), "the roll": roll}
    lengths |= {"shares": shares, "votes": votes}
    told = ", ".join(f"{what} {len(data):,}" for what, data in lengths.items())
    print(f"{count} sites with certificates, {degree} neighbours each; bytes: {told} (inline: up to {INLINE_BYTES:,})")
    print(f"one site checks the roll and deals its shares in {spent:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--millions", type=float, default=10)
    parser.add_argument("--gone", type=float, default=0.1)
    parser.add_argument("--bits", type=int, choices=(32, 64), default=32)
    parser.add_argument("--neighbours", type=int, default=42)
    parser.add_argument("--certified", action="store_true")
    given = parser.parse_args()
    if given.certified:
        certified(given.sites)
        return
    masks(given.neighbours)
    session(given.sites, int(given.millions * 1e6), int(given.gone * given.sites), given.bits)


if __name__ == "__main__":
    main()
