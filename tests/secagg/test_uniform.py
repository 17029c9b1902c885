# SPDX-License-Identifier: Apache-2.0
"""What the server sees of one site can't be told from uniform noise, by tests that do tell what was masked badly.

Masks differ each time; the bounds (``uniform``) are crossed once in 10^9 tests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hansa.core.lazy import Array
from hansa.secagg.keys import Keystream
from hansa.secagg.local import local_signers
from hansa.secagg.ring import Encoding, Vector
from sums import Disk, Federation, masked, small_ring, terms_for
from uniform import looks_uniform

SIZE = 60_000


def values(seed: int) -> dict[str, dict[str, Array]]:
    return {"delta": {"w": np.random.default_rng(seed).normal(0, 0.05, SIZE).clip(-1, 1)}}


def encoded(ring: Encoding, seed: int) -> Array:
    out = np.empty(ring.size, ring.dtype)
    Vector(ring, values(seed), "a", 1, Keystream(b"", "", b"")).encode(0, out)
    return out


def upload(round: int, seed: int, signers: Any = None, bits: int = 32) -> tuple[Federation, Array]:
    ring = small_ring(3, SIZE)
    if bits == 64:
        ring = Encoding(64, 3, False, ring.fields)
    lab = Federation(terms_for(3, ring, round=round), signers=signers or {})
    lab.share(lab.terms.sites, lab.advertise(lab.terms.sites))
    site = lab.site("site-001")
    site.receive(lab.server.inbox("site-001"))
    return lab, masked(site, values(seed))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_masked_vector_is_noise(bits: int) -> None:
    lab, seen = upload(1, 0, bits=bits)
    assert looks_uniform(seen)
    assert not looks_uniform(encoded(lab.terms.encoding, 0))
    assert abs(np.corrcoef(seen.view(f"int{bits}"), values(0)["delta"]["w"])[0, 1]) < 6 / math.sqrt(SIZE)


def test_the_same_values_in_two_rounds_share_no_mask() -> None:
    signers = local_signers(terms_for(3).sites)
    (lab, one), (_, two) = (upload(round, 0, signers) for round in (1, 2))
    assert looks_uniform(one - two)
    reused = one + encoded(lab.terms.encoding, 1) - encoded(lab.terms.encoding, 0)  # what a reused mask would have sent
    assert looks_uniform(reused)
    assert not looks_uniform(one - reused)


def test_a_vector_stays_noise_when_all_but_its_own_mask_are_taken_off_and_the_other_way_round() -> None:
    """Double masking: a late vector is hidden by the own mask, a survivor's by what it shares with honest peers."""
    lab, seen = upload(1, 0)
    site: Any = lab.site("site-001")
    session = site._session
    own = session.self_mask(site._secret("seed"), "site-001")
    pairs = [session.pair_mask(site._key("mask key"), "site-001", peer) for peer in ("site-000", "site-002")]
    plain = encoded(lab.terms.encoding, 0)

    def without(*terms: tuple[Keystream, int]) -> Array:
        out = seen.copy()
        masks = type(site._masks(session))(out.dtype, [(stream, -sign) for stream, sign in terms])
        masks.apply(0, out)
        return out

    assert looks_uniform(without(*pairs))
    assert looks_uniform(without((own, 1), pairs[0]))
    assert looks_uniform(without((own, 1), pairs[1]))
    np.testing.assert_array_equal(without((own, 1), *pairs), plain)


def test_a_stored_state_shows_nothing_that_was_masked() -> None:
    lab, _ = upload(1, 0)
    disk = lab.disks["site-001"]
    assert isinstance(disk, Disk)
    assert disk.data is not None
    assert encoded(lab.terms.encoding, 0)[:4].tobytes() not in disk.data


@pytest.mark.parametrize("bad", ["constant", "small", "odd", "correlated"])
def test_the_tests_themselves_tell_bad_noise(bad: str) -> None:
    rng = np.random.default_rng(0)
    good = rng.integers(0, 2**32, SIZE, np.uint32)
    assert looks_uniform(good)
    found = {
        "constant": np.full(SIZE, 7, np.uint32),
        "small": rng.integers(0, 2**31, SIZE, np.uint32),
        "odd": good | np.uint32(1),
        "correlated": (good.astype(np.uint64) * 9 // 10).astype(np.uint32),
    }[bad]
    assert not looks_uniform(found)
