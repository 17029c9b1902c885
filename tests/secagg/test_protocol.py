# SPDX-License-Identifier: Apache-2.0
"""Whole sessions: sums, dropouts in every phase, restarts, identities of the roster, lazy values, the wire."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core import wire
from hansa.core.lazy import BLOCK, Array, Leaf
from hansa.core.tree import Parts
from hansa.errors import AccessError, PrivacyError, QuorumError
from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.pki.kit import Kit, verify
from hansa.secagg import protocol as p
from hansa.secagg.keys import Keystream
from hansa.secagg.local import local_signers
from hansa.secagg.ring import SCALARS, WEIGHT, Encoding, Range, Vector, decoded, encoding, summands
from hansa.secagg.server import Server
from hansa.secagg.site import Site
from sums import PHASES, Disk, Federation, constant, masked, names, small_ring, terms_for, up_to


def plain(ring: Encoding, values: Mapping[str, Parts], who: Any) -> Array:
    """Return the sum of encoded vectors, with no mask in sight."""
    total = np.zeros(ring.size, ring.dtype)
    for name in who:
        made, out = Vector(ring, values[name], name, 1, Keystream(b"", "", b"")), np.empty(ring.size, ring.dtype)
        for start in range(0, ring.size, BLOCK):
            made.encode(start, out[start : start + BLOCK])
        total += out
    return total


def random_values(terms: p.Terms, seed: int) -> dict[str, Parts]:
    rng = np.random.default_rng(seed)
    return {
        name: {
            part: {f.name: rng.uniform(f.low, f.high, f.shape) for f in terms.encoding.fields if f.part == part}
            for part in {f.part for f in terms.encoding.fields}
        }
        for name in terms.sites
    }


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_sum_of_the_survivors_is_the_plain_integer_sum(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 9))
    shapes = data.draw(st.lists(st.sampled_from([(), (1,), (4, 3), (0,), (17,)]), min_size=1, max_size=4))
    ranges = {"delta": {f"t{i}": Range(-2, 3, shape=shape) for i, shape in enumerate(shapes)}}
    step = data.draw(st.sampled_from([None, 1e-12]))
    ranges[SCALARS] = {WEIGHT: Range(0, 100), "loss": Range(0, 5, step)}
    terms = terms_for(count, encoding(ranges, count))
    needed = p.graph.shape(count, count, 0.2, 0.1).quorum
    out = data.draw(st.permutations(terms.sites))[: data.draw(st.integers(0, count - needed))]
    gone: dict[str, list[str]] = {}
    for name in out:
        gone.setdefault(data.draw(st.sampled_from(PHASES)), []).append(name)
    values = random_values(terms, data.draw(st.integers(0, 2**32)))
    federation = Federation(terms, restarts=data.draw(st.booleans()))
    total = federation.run(values, gone)
    late = {name for phase in ("vote", "reveal") for name in gone.get(phase, ())}
    survivors = sorted(set(terms.sites) - (set(out) - late))
    assert list(federation.server.survivors) == survivors
    np.testing.assert_array_equal(total, plain(terms.encoding, values, survivors))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("restarts", [False, True])
def test_three_of_ten_sites_drop_out_before_each_phase(phase: str, restarts: bool) -> None:
    terms = terms_for(10)
    values = random_values(terms, 0)
    federation = Federation(terms, restarts)
    gone = terms.sites[2:5]
    total = federation.run(values, {phase: gone})
    there = terms.sites if phase in ("vote", "reveal") else sorted(set(terms.sites) - set(gone))
    np.testing.assert_array_equal(total, plain(terms.encoding, values, there))
    sums = decoded(terms.encoding, total, len(there))["delta"]["w"]
    exact = sum(np.asarray(values[name]["delta"]["w"]) for name in there)
    assert np.abs(sums - exact).max() <= terms.encoding.error("delta", "w", len(there))


@pytest.mark.parametrize("phase", PHASES)
def test_one_dropout_too_many_fails_cleanly_before_each_phase(phase: str) -> None:
    terms = terms_for(10)
    federation = Federation(terms)
    with pytest.raises(
        QuorumError, match=r"job job-1, round 1: .*(needs 7|7 are needed).*Nothing of this attempt is revealed"
    ):
        federation.run(constant(terms), {phase: terms.sites[:4]})
    if phase != "reveal":
        for name in terms.sites:
            assert federation.disks[name].data is None or b"\xa8revealed\x80" in federation.disks[name].data


def test_shares_that_come_late_complete_the_sum() -> None:
    terms = terms_for(10)
    federation, values = Federation(terms), constant(terms)
    who = terms.sites
    federation.share(who, federation.advertise(who))
    total = federation.mask(who, values)
    votes = federation.vote(who, federation.survivors())
    federation.reveal(who[:6], votes)
    before = total.copy()
    with pytest.raises(QuorumError, match="of 'site-000', 6 shares are there, 7 are needed"):
        federation.unmask(total)
    np.testing.assert_array_equal(total, before)
    federation.reveal(who[8:9], votes)
    np.testing.assert_array_equal(federation.unmask(total), plain(terms.encoding, values, who))


def test_a_server_that_restarts_among_uploads_counts_them_again() -> None:
    terms = terms_for(5)
    values, who = constant(terms), terms.sites
    federation = Federation(terms)
    federation.share(who, federation.advertise(who))
    spooled = {}
    for name in who:
        federation.site(name).receive(federation.server.inbox(name))
        spooled[name] = masked(federation.site(name), values[name])
        federation.server.accept(name)
    federation.server = federation.new_server()
    with pytest.raises(QuorumError, match="0 sites survive"):
        federation.server.close_uploads()
    for name in who[:4]:
        federation.server.accept(name)
    total = sum((spooled[name] for name in who[:4]), start=np.zeros(terms.encoding.size, np.uint32))
    federation.reveal(who[:4], federation.vote(who[:4], federation.survivors()))
    np.testing.assert_array_equal(federation.unmask(total), plain(terms.encoding, values, who[:4]))


def test_a_sparse_graph_sums_with_dropouts_at_each_phase() -> None:
    terms = terms_for(70, corrupt=0.1)
    values = random_values(terms, 3)
    federation = Federation(terms)
    gone = {phase: terms.sites[7 * i : 7 * i + 1] for i, phase in enumerate(PHASES)}
    total = federation.run(values, gone)
    there = [name for name in terms.sites if name not in {terms.sites[at] for at in (0, 7, 14)}]
    np.testing.assert_array_equal(total, plain(terms.encoding, values, there))
    shares = p.unpack(federation.site(terms.sites[1]).share(federation.server.close_adverts()), p.Shares)
    assert len(shares.boxes) == p.graph.shape(69, 70, 0.1, 0.1).degree < 68


def test_an_update_with_its_weight_and_metrics_is_summed_in_64_bits() -> None:
    ranges = {
        "delta": {"w": Range(-1, 1, 1e-12, (3,))},
        SCALARS: {WEIGHT: Range(0, 1000), "train_loss": Range(0, 50), "examples": Range(0, 1e6, 1)},
    }
    ring = encoding(ranges, 4)
    assert ring.bits == 64
    terms = terms_for(4, ring)
    values = {
        name: summands({"delta": {"w": np.full(3, 0.1 * i)}}, 10.0 + i, {"train_loss": 2.5, "examples": 7.0})
        for i, name in enumerate(terms.sites)
    }
    sums = decoded(ring, Federation(terms).run(values), 4)
    assert np.abs(sums["delta"]["w"] - 0.6).max() <= ring.error("delta", "w")
    assert float(sums[SCALARS][WEIGHT]) == 46
    assert float(sums[SCALARS]["train_loss"]) == 10
    assert float(sums[SCALARS]["examples"]) == 28


def test_a_model_larger_than_a_block_is_masked_from_lazy_leaves_and_travels_as_a_value(tmp_path: Path) -> None:
    size = 2 * BLOCK + 11
    ring = encoding({"delta": {"a": Range(-1, 1, shape=(size,)), "b": Range(-1, 1, shape=(5,))}}, 3)
    terms = terms_for(3, ring)
    rng = np.random.default_rng(5)
    held = {name: rng.uniform(-0.5, 0.5, size).astype(np.float32) for name in terms.sites}
    values: dict[str, Any] = {
        name: {"delta": {"a": Leaf.of(a) * np.float32(2), "b": np.zeros(5)}} for name, a in held.items()
    }
    federation = Federation(terms)
    federation.share(terms.sites, federation.advertise(terms.sites))
    total = np.zeros(ring.size, ring.dtype)
    for name in terms.sites:
        site = federation.site(name)
        site.receive(federation.server.inbox(name))
        leaf: Any = site.masked(values[name])
        with (tmp_path / name).open("wb") as file:
            wire.write(file, "masked", {"site": name}, {"masked": {"vector": leaf}})
        with (tmp_path / name).open("rb") as file:
            envelope = wire.read_envelope(file)
            spec = envelope.layout["masked"]["vector"]
            federation.server.check_upload(name, spec.size, np.dtype(spec.dtype))
            for chunk in wire.read_chunks(file, envelope):
                total[chunk.start : chunk.start + chunk.values.size] += chunk.values
        federation.server.accept(name)
        np.testing.assert_array_equal(leaf[BLOCK - 3 : BLOCK + 4], np.asarray(leaf)[BLOCK - 3 : BLOCK + 4])
    federation.reveal(terms.sites, federation.vote(terms.sites, federation.survivors()))
    np.testing.assert_array_equal(federation.unmask(total), plain(ring, values, terms.sites))


def test_masking_takes_the_memory_of_a_few_blocks() -> None:
    size = 40 * BLOCK
    terms = terms_for(3, small_ring(3, size))
    federation = Federation(terms)
    federation.share(terms.sites, federation.advertise(terms.sites))
    name = terms.sites[0]
    federation.site(name).receive(federation.server.inbox(name))
    leaf: Any = Leaf.zeros((size,), np.dtype(np.float32))
    tracemalloc.start()
    try:
        vector = federation.site(name).masked({"delta": {"w": leaf}})
        for start in range(0, size, BLOCK):
            assert vector[start : start + BLOCK].size == BLOCK
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * BLOCK * 4  # float64 scratch is two of them


def test_every_phase_gives_the_same_bytes_again_and_after_a_restart() -> None:
    terms = terms_for(5)
    values, who = random_values(terms, 1), terms_for(5).sites
    federation = Federation(terms)

    def again(name: str, call: Any) -> bytes:
        first = call(federation.site(name))
        stored = federation.disks[name].data
        restarted = Site(terms, name, federation.signers[name], federation.disks[name].store, stored)
        assert call(federation.site(name)) == first
        assert call(restarted) == first
        assert federation.disks[name].data == stored
        return bytes(first)

    for name in who:
        federation.server.add_advert(name, again(name, lambda site: site.advertise()))
    roll = federation.server.close_adverts()
    assert federation.new_server().close_adverts() == roll == federation.server.close_adverts()
    for name in who:
        federation.server.add_shares(name, again(name, lambda site: site.share(roll)))
    federation.server.close_shares()
    for name in who:
        inbox = federation.server.inbox(name)
        assert federation.new_server().inbox(name) == inbox

        def upload(site: Site, inbox: bytes = inbox, name: str = name) -> bytes:
            site.receive(inbox)
            return masked(site, values[name]).tobytes()

        again(name, upload)
        federation.server.accept(name)
    survivors = federation.server.close_uploads()
    assert federation.new_server().close_uploads() == survivors
    for name in who:
        federation.server.add_vote(name, again(name, lambda site: site.vote(survivors)))
    votes = federation.server.close_votes()
    assert federation.new_server().close_votes() == votes
    for name in who:
        federation.server.add_reveal(name, again(name, lambda site: site.reveal(votes)))
    zeros = [np.zeros(terms.encoding.size, np.uint32) for _ in range(2)]
    assert not federation.server.is_recovered
    federation.server.close_reveals().apply(0, zeros[0])
    assert federation.new_server().is_recovered
    federation.new_server().close_reveals().apply(0, zeros[1])
    np.testing.assert_array_equal(*zeros)


def test_nothing_leaves_before_it_is_durable() -> None:
    """A store that fails leaves the site where it was, and the call without a message."""
    terms = terms_for(4)
    federation, values = Federation(terms), constant(terms)
    victim = terms.sites[0]
    disk = federation.disks[victim]
    broken = OSError("no space left")

    class FullError(Exception):
        pass

    def fails(data: bytes) -> None:
        raise FullError from broken

    def attempt(call: Any) -> Any:
        site = Site(terms, victim, federation.signers[victim], fails, disk.data)
        before = disk.data
        for _ in range(2):
            with pytest.raises(FullError):
                call(site)
        assert disk.data == before
        return call(federation.site(victim))

    who = terms.sites
    federation.server.add_advert(victim, attempt(lambda site: site.advertise()))
    roll = federation.advertise(who)
    attempt(lambda site: site.share(roll))
    federation.share(who, roll)
    inbox = federation.server.inbox(victim)
    attempt(lambda site: site.receive(inbox))
    attempt(lambda site: site.masked(values[victim]))
    federation.mask(who, values)
    survivors = federation.survivors()
    attempt(lambda site: site.vote(survivors))
    votes = federation.vote(who, survivors)
    attempt(lambda site: site.reveal(votes))


def test_states_larger_than_any_message_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = terms_for(5)
    federation = Federation(terms)
    federation.share(terms.sites, federation.advertise(terms.sites))
    monkeypatch.setattr(p, "MAX_BYTES", 10)
    federation.restarts = True
    assert federation.new_server().close_shares() == terms.sites
    assert federation.site(terms.sites[0])


class KitSigner:
    """A site's kit as a signer: what the site's agent does."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def credential(self) -> bytes:
        return self.kit.certificate_pem()

    def sign(self, data: bytes) -> bytes:
        return self.kit.sign(data)

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        who = self.kit.roster().admit(credential)
        if (who.role, who.name) != (Role.SITE, site):
            raise AccessError(f"the certificate is {who.member}'s")
        verify(data, signature, credential)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    folder = tmp_path_factory.mktemp("lab")
    authority = Authority.create(folder / "authority", "lab")
    kits = {name: authority.issue(folder / name, Role.SITE, name) for name in (*names(4), "stranger")}
    other = Authority.create(folder / "other", "lab")
    kits["foreign"] = other.issue(folder / "foreign", Role.SITE, names(4)[0])
    for name, kit in kits.items():
        if name != "foreign":
            kit.update_roster(authority.roster.data)
    return kits


def test_identities_of_the_roster_carry_a_session(kits: dict[str, Kit]) -> None:
    terms = terms_for(4)
    federation = Federation(terms, signers={name: KitSigner(kits[name]) for name in terms.sites})
    values = random_values(terms, 2)
    total = federation.run(values, {"mask": terms.sites[3:]})
    np.testing.assert_array_equal(total, plain(terms.encoding, values, terms.sites[:3]))


@pytest.mark.parametrize("impostor", ["stranger", "foreign"])
def test_the_server_can_not_pass_another_for_a_site(kits: dict[str, Kit], impostor: str) -> None:
    """It has a certificate of its own, or one of another authority with the right name, and makes up the site."""
    terms = terms_for(4)
    federation = Federation(terms, signers={name: KitSigner(kits[name]) for name in terms.sites})
    adverts = {
        name: p.unpack(federation.site(name).advertise(), p.Advert) for name in terms.sites if name != "site-000"
    }
    invented = Site(terms, "site-000", KitSigner(kits[impostor]), Disk().store)
    adverts["site-000"] = p.unpack(invented.advertise(), p.Advert)
    roll = p.Roll(terms.digest(), tuple(adverts[name] for name in terms.sites))
    with pytest.raises(AccessError, match=r"site site-000, round 1: The keys were not signed by the site"):
        federation.site("site-001").share(p.pack(roll))
    with pytest.raises(AccessError, match="site-000"):
        federation.server.add_advert("site-000", invented.advertise())


def test_a_new_attempt_has_other_keys_and_an_attempt_that_revealed_has_no_successor() -> None:
    first, second = terms_for(4), terms_for(4, attempt=2)
    signers = local_signers(first.sites)
    federation = Federation(first, signers=signers)
    votes = up_to(federation, "reveal", constant(first))
    again = Federation(second, signers=signers, disks={})
    fresh = {}
    for name in first.sites:
        fresh[name] = Site(second, name, signers[name], again.disks[name].store, federation.disks[name].data)
    adverts = [p.unpack(site.advertise(), p.Advert) for site in (federation.site("site-000"), fresh["site-000"])]
    assert not {adverts[0].channel, adverts[0].mask} & {adverts[1].channel, adverts[1].mask}
    assert adverts[0].commitment != adverts[1].commitment
    federation.reveal(first.sites[:1], votes)
    with pytest.raises(PrivacyError, match=r"site site-000, round 1: .*revealed shares in attempt 1.*next round"):
        Site(second, "site-000", signers["site-000"], Disk().store, federation.disks["site-000"].data)
    following = terms_for(4, round=2)
    Site(following, "site-000", signers["site-000"], Disk().store, federation.disks["site-000"].data).advertise()


@pytest.mark.parametrize("old", [{"round": 1, "attempt": 9}, {"round": 2, "attempt": 1}, {"round": 2, "attempt": 2}])
def test_an_older_attempt_or_other_terms_for_the_same_one_are_refused(old: dict[str, int]) -> None:
    now = terms_for(4, round=2, attempt=2)
    signers = local_signers(now.sites)
    disk = Disk()
    Site(now, "site-000", signers["site-000"], disk.store).advertise()
    before = terms_for(4, small_ring(4, size=6), **old)
    with pytest.raises(PrivacyError, match="does not come after it"):
        Site(before, "site-000", signers["site-000"], Disk().store, disk.data)


def test_a_finished_attempt_has_no_secret_left() -> None:
    terms = terms_for(3)
    federation = Federation(terms)
    values = constant(terms)
    votes = up_to(federation, "reveal", values)
    federation.reveal(terms.sites, votes)
    site, disk = federation.site("site-000"), federation.disks["site-000"]
    assert disk.data is not None
    root = p.msgspec.msgpack.decode(disk.data[32:])["root"]
    assert len(root) == 32
    site.finish()
    site.finish()
    assert root not in disk.data
    for call in (
        lambda: site.share(federation.server.close_adverts()),
        lambda: site.masked(values["site-000"]),
        lambda: site.vote(federation.server.close_uploads()),
        lambda: site.reveal(votes),
    ):
        with pytest.raises(PrivacyError, match="this attempt is over, and its keys are gone"):
            call()
    with pytest.raises(PrivacyError, match="revealed shares in attempt 1"):
        Site(terms_for(3, attempt=2), "site-000", federation.signers["site-000"], disk.store, disk.data)


def test_server_and_sites_take_only_terms_that_protect() -> None:
    ring = small_ring(5)
    for change, says in (
        ({"minimum": 2}, "a minimum of 2 sites is below 3"),
        ({"corrupt": 0.5}, "below a half"),
        ({"sites": names(2)}, "needs 3"),
        ({"sites": names(6)}, "the ring is for 5 sites, and 6 are asked"),
        ({"sites": ("b", "a", "c")}, "not in order"),
        ({"sites": ("a", "a", "b")}, "there twice"),
        ({"minimum": 6}, "Of 5 sites 5 take part; a secure sum needs 6"),
    ):
        with pytest.raises(PrivacyError, match=says):
            p.Terms(**{"job": "j", "round": 1, "attempt": 1, "sites": names(5), "encoding": ring, **change})
    terms = terms_for(5, ring)
    with pytest.raises(PrivacyError, match=r"site stranger, round 1: .*was not asked"):
        Site(terms, "stranger", local_signers(terms.sites)["site-000"], Disk().store)
    assert isinstance(Server(terms, local_signers(terms.sites)["site-000"], Disk().store), Server)
