# SPDX-License-Identifier: Apache-2.0
"""Homomorphic encryption: what it costs to mask and encrypt, add, and open a million numbers; figures in README.md.

python benchmarks/homomorphic.py [--sites 5] [--millions 1]

Sites take their turns in one process of one thread; seconds are its processor's. The sum is checked against that of the
integers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hansa.core.config import HomomorphicEncryptionSection
from hansa.homomorphic import agreement, protocol
from hansa.homomorphic.protocol import Invitation, Part
from hansa.homomorphic.server import Server
from hansa.homomorphic.site import Kept, KeySite, joined, sealed
from hansa.secagg.local import local_signers
from hansa.secagg.ranges import bounds_of
from hansa.secagg.ring import decoded, summands

spent: dict[str, float] = {}


@contextmanager
def counted(what: str) -> Iterator[None]:
    """Add the processor's seconds inside to those of ``what``."""
    begun = time.process_time()
    yield
    spent[what] = spent.get(what, 0.0) + time.process_time() - begun


def anonymous() -> float:
    """Return the process's memory that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--millions", type=float, default=1.0)
    arguments = parser.parse_args()
    size, sites = int(arguments.millions * 1e6), [f"s{number:03d}" for number in range(arguments.sites)]
    section = HomomorphicEncryptionSection(range=1.0, weight_cap=1024.0, max_bytes=1 << 40)
    shapes = {"delta": {"w": (size,)}}
    terms = agreement.terms(section, bounds_of(section), "job", 2, 1, sites, shapes, {"delta": True})
    signers = local_signers(sites)
    values = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    key_site = KeySite(sites[0], signers[sites[0]], Kept(None, None, lambda key: None, lambda opened: None))
    with counted("key pair"):
        offer = key_site.offer(terms)
    server = Server(terms, signers[sites[1]], lambda state: None, None)
    invitation = protocol.unpack(server.invite(protocol.pack(offer)), Invitation)
    before = peak = anonymous()
    with tempfile.TemporaryDirectory() as folder:
        total = np.memmap(Path(folder) / "sum", np.uint64, "w+", shape=(terms.num_words,))
        for site in sites:
            accepted = joined(invitation, site, signers[site], None)
            server.accept(site, protocol.pack(accepted.acceptance))
            parts = summands({"delta": {"w": values}}, 0.5, {agreement.COUNT: 1.0})
            ciphertexts = sealed(accepted, parts, lambda changed: None)
            place = 0
            while True:
                with counted("encrypt"):
                    words = next(ciphertexts, None)
                if words is None:
                    break
                with counted("add"):
                    server.check(words)
                    server.add(total[place : place + words.size], words)
                place += words.size
            peak = max(peak, anonymous())
        server.close(sites)
        whole = np.memmap(Path(folder) / "opened", np.int64, "w+", shape=(terms.encoding.size,))
        for places, letter in server.parts(total):
            with counted("open"):
                answer = protocol.pack(key_site.open(protocol.unpack(letter, Part)))
            whole[places] = server.opened(places, answer)
            peak = max(peak, anonymous())
    found = np.asarray(decoded(terms.encoding, whole.view(np.uint64), len(sites))["delta"]["w"])
    error, bound = np.abs(found - len(sites) * values.astype(np.float64)).max(), terms.encoding.error("delta", "w")
    assert error <= bound, (error, bound)
    cost = agreement.cost(terms.encoding.size)
    print(f"{len(sites)} sites, {size:,} numbers; seconds of the processor for a million numbers")
    print(f"key pair                 {spent['key pair']:.3f} s for a session")
    print(f"encrypt, a site          {spent['encrypt'] / len(sites) / size * 1e6:.3f}")
    print(f"check and add, a site    {spent['add'] / len(sites) / size * 1e6:.3f}")
    print(f"open the sum             {spent['open'] / size * 1e6:.3f}")
    print(f"bytes a number           {cost.num_bytes / size:.2f}, {cost.num_bytes / values.nbytes:.2f} times float32")
    print(f"error of the sum         {error:.3g}, at most {bound:.3g}")
    print(f"anonymous memory         {peak - before:.0f} MiB at its peak, beyond the values")


if __name__ == "__main__":
    main()
