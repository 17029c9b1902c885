# SPDX-License-Identifier: Apache-2.0
"""A session of homomorphic encryption: floats within the stated error, and what a server that lies is told: noise.

Masks differ each time; the bounds on noise are crossed once in 10^9 tests (``uniform``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.tree import Parts
from hansa.errors import AccessError, FitError, NonFiniteError, PrivacyError, QuorumError, WireError
from hansa.homomorphic import agreement, ckks, protocol
from hansa.homomorphic.protocol import Acceptance, Invitation, Lost, Part, Terms
from hansa.homomorphic.server import Server, attempt_at
from hansa.homomorphic.site import Joined, Kept, Key, KeySite, Opened, joined, sealed, unmasked
from hansa.secagg import keys
from hansa.secagg.local import LocalSigner, local_signers
from hansa.secagg.ranges import bounds_of
from hansa.secagg.ring import SCALARS, WEIGHT, Vector, decoded, summands
from uniform import looks_uniform

SITES = ("a", "b", "c", "d")
SIGNERS = local_signers((*SITES, "e"))
X25519 = keys.public_bytes(keys.private_key(bytes(range(32))))
SECTION = HomomorphicEncryptionSection(range=2.0, weight_cap=1024.0, key_site="b", metrics={"loss_sum": 100.0})


def terms(
    size: int = 10,
    section: HomomorphicEncryptionSection = SECTION,
    sites: Sequence[str] = SITES,
    round: int = 2,
    attempt: int = 1,
):
    shapes = {"delta": {"w": (size,)}}
    return agreement.terms(section, bounds_of(section), "job", round, attempt, sites, shapes, {"delta": True})


@dataclass
class Disk:
    """What a site has stored, and who it is."""

    signers: Mapping[str, LocalSigner] = field(default_factory=lambda: SIGNERS)
    key: Key | None = None
    opened: Opened | None = None
    joined: Joined | None = None

    def site(self, name: str = "b") -> KeySite:
        """Return the key site as it is after a restart."""

        def store_key(key: Key) -> None:
            self.key = key

        def store_opened(opened: Opened) -> None:
            self.opened = opened

        return KeySite(name, self.signers[name], Kept(self.key, self.opened, store_key, store_opened))

    def accept(self, invitation: Invitation, name: str) -> Acceptance:
        self.joined = joined(invitation, name, self.signers[name], self.joined)
        return self.joined.acceptance

    def sealed(self, parts: Parts) -> np.ndarray:
        def store(changed: Joined) -> None:
            self.joined = changed

        assert self.joined is not None
        return np.concatenate(list(sealed(self.joined, parts, store)))


def update(values: np.ndarray, weight: float = 0.5, loss: float = 1.0) -> dict[str, Parts]:
    return summands({"delta": {"w": values}}, weight, {"loss_sum": loss, agreement.COUNT: 1.0})


class Session:
    """A session up to the sum of ciphertexts, which is not opened yet; nobody keeps anything in memory."""

    def __init__(
        self,
        agreed: Terms,
        updates: Mapping[str, dict[str, Parts]],
        disk: Disk | None = None,
        signers: Mapping[str, LocalSigner] = SIGNERS,
    ) -> None:
        self.terms, self.disk = agreed, disk or Disk(signers)
        self.disks = {site: Disk(signers) for site in updates}
        self.server = Server(agreed, next(iter(signers.values())), lambda _: None, None)
        self.invitation = protocol.unpack(
            self.server.invite(protocol.pack(self.disk.site(agreed.key_site).offer(agreed))), Invitation
        )
        for site, its in self.disks.items():
            self.server.accept(site, protocol.pack(its.accept(self.invitation, site)))
        self.vectors = {site: self.disks[site].sealed(parts) for site, parts in updates.items()}
        self.total = self.sum_of(*updates)
        self.server.close(tuple(updates))

    def sum_of(self, *sites: str) -> np.ndarray:
        total = np.zeros(self.terms.num_words, np.uint64)
        for site in sites:
            self.server.check(self.vectors[site])
            self.server.add(total, self.vectors[site])
        return total

    def parts(self, total: np.ndarray | None = None) -> list[Part]:
        letters = self.server.parts(self.total if total is None else total)
        return [protocol.unpack(letter, Part) for _, letter in letters]

    def opened(self) -> dict[str, Parts]:
        key_site, whole = self.disk.site(self.terms.key_site), np.empty(self.terms.encoding.size, np.int64)
        for places, letter in self.server.parts(self.total):
            whole[places] = self.server.opened(places, protocol.pack(key_site.open(protocol.unpack(letter, Part))))
        return decoded(self.terms.encoding, whole.view(np.uint64), len(self.server.survivors))


def a_session(**more: object) -> Session:
    return Session(terms(**more), {site: update(np.linspace(-1, 1, 10)) for site in SITES})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32),
    st.integers(3, 12),
    st.sampled_from([1e-3, 1.0, 16.0]),
    st.sampled_from([1.0, 64.0]),
    st.sampled_from([7, 5000]),
)
def test_the_sum_is_within_the_stated_error_of_the_floats(seed, count, largest, heaviest, size):
    """And a tenth of it is not: the error of rounding is reached to a half at least."""
    section = HomomorphicEncryptionSection(range=largest, weight_cap=1024 * heaviest, step=1e-2)
    rng = np.random.default_rng(seed)
    sites = [f"s{number:02d}" for number in range(count)]
    agreed = agreement.terms(
        section, bounds_of(section), "job", 2, 1, sites, {"delta": {"w": (size,)}}, {"delta": True}
    )
    weights = rng.uniform(0, heaviest, count)
    updates = [weight * rng.uniform(-largest, largest, size) for weight in weights]
    put = {
        site: summands({"delta": {"w": values}}, weight, {agreement.COUNT: 1.0})
        for site, weight, values in zip(sites, weights, updates, strict=True)
    }
    found = Session(agreed, put, signers=local_signers(sites)).opened()
    error = np.abs(np.asarray(found["delta"]["w"]) - np.sum(updates, axis=0)).max()
    bound = agreed.encoding.error("delta", "w")
    slack = 1e-13 * largest * heaviest * count  # of the floats that it is compared with
    assert error <= bound + slack
    if size > 1000:
        assert error > bound / 10
    assert (
        abs(float(np.asarray(found[SCALARS][WEIGHT])) - weights.sum()) <= agreed.encoding.error(SCALARS, WEIGHT) + slack
    )


def test_restarts_in_between_and_a_question_asked_twice_change_nothing():
    session = a_session()
    first = session.disk.site().offer(session.terms)
    assert first == session.invitation.offer
    once, again = session.opened(), session.opened()
    assert np.array_equal(np.asarray(once["delta"]["w"]), np.asarray(again["delta"]["w"]))
    assert float(np.asarray(once[SCALARS][agreement.COUNT])) == 4.0


def test_a_sum_of_many_parts_is_opened_part_by_part():
    size = (protocol.PART + 1) * ckks.SLOTS
    values = np.random.default_rng(1).uniform(-1, 1, size)
    session = Session(terms(size), {site: update(values) for site in SITES})
    parts = session.parts()
    assert [part.first for part in parts] == [0, protocol.PART]
    with pytest.raises(PrivacyError, match="comes first"):
        session.disk.site().open(parts[1])
    assert session.disk.opened is None
    found = np.asarray(session.opened()["delta"]["w"])
    assert np.abs(found - 4 * values).max() <= session.terms.encoding.error("delta", "w")


def test_nothing_is_opened_after_the_end():
    session = a_session()
    session.opened()
    session.disk.site().finish(protocol.unpack(session.server.finish(), protocol.Finish))
    assert session.disk.key is not None
    assert session.disk.key.secret is None
    with pytest.raises(PrivacyError, match="is over"):
        session.opened()
    for later in (terms(section=SECTION.model_copy(update={"minimum": 4})), terms(attempt=2)):
        with pytest.raises(PrivacyError, match="there is no second one"):
            session.disk.site().offer(later)


def test_a_session_has_one_sum():
    """Two sums of nearly the same sites would differ by one update."""
    session = a_session()
    session.opened()
    (part,) = session.parts()
    fewer = msgspec.structs.replace(part, survivors=part.survivors[:3])
    with pytest.raises(PrivacyError, match="the sum of other sites was asked for"):
        session.disk.site().open(fewer)
    with pytest.raises(PrivacyError, match="something else was asked for"):
        session.disk.site().open(session.parts(session.sum_of(*SITES, "a"))[0])


def test_a_refused_sum_was_the_only_try():
    """Or whether it is refused would be a question to ask many times, and its answers would tell a sum bit by bit."""
    session = a_session()
    lie, truth = session.parts(session.sum_of("a"))[0], session.parts()[0]
    for part, reason in ((lie, "no sum of the 4 sites"), (truth, "something else"), (lie, "no sum of the 4 sites")):
        with pytest.raises(PrivacyError, match=reason):
            session.disk.site().open(part)
    with pytest.raises(PrivacyError, match="sum of other sites"):
        session.disk.site().open(msgspec.structs.replace(truth, survivors=truth.survivors[:3]))
    with pytest.raises(PrivacyError, match="there is no second one"):
        session.disk.site().offer(terms(attempt=2))


def test_whom_a_sum_is_of_is_checked():
    session = a_session()
    (part,) = session.parts()
    a, b, c, d = part.survivors
    strangers = msgspec.structs.replace(d, site="e")
    strangers = msgspec.structs.replace(strangers, signature=SIGNERS["e"].sign(strangers.content()))
    for survivors, kind, reason in (
        ((a, b), PrivacyError, "fewer than 3 are never shown"),
        ((), PrivacyError, "fewer than 3"),
        ((b, a, c), WireError, "not in order"),
        ((a, b, b), WireError, "one is there twice"),
        ((a, b, strangers), PrivacyError, "others than the sites asked"),
        ((a, b, msgspec.structs.replace(c, site="d")), AccessError, "not signed by the site"),
        ((a, b, msgspec.structs.replace(c, mask=d.mask)), AccessError, "not signed by the site"),
        ((a, b, msgspec.structs.replace(c, offer=bytes(32))), WireError, "another session or offer"),
    ):
        with pytest.raises(kind, match=reason):
            session.disk.site().open(msgspec.structs.replace(part, survivors=survivors))
    assert session.disk.opened is None, "nothing was decrypted"


LIES = {
    "one site's alone": (("a",), SITES),
    "one site's, as often as sites are named": (("a",) * 4, SITES),
    "one counted twice": ((*SITES, "a"), SITES),
    "one left out": (SITES[:3], SITES),
    "one more than is named": (SITES, SITES[:3]),
    "another in one's place": (("a", "b", "c"), ("a", "b", "d")),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_sum_of_the_sites_named_is_noise(lie):
    """What a server that lies is told, if it were told at all, cannot be told from uniform integers."""
    summed, named = LIES[lie]
    values = np.random.default_rng(1).normal(0, 0.05, 40_000).clip(-1, 1)
    session = Session(terms(values.size), {site: update(values) for site in SITES})
    survivors = [one for one in session.parts()[0].survivors if one.site in named]
    words = session.sum_of(*summed).reshape(-1, ckks.WORDS)
    assert session.disk.key is not None
    assert looks_uniform(unmasked(session.disk.key, survivors, 0, words), ckks.BITS)
    part = msgspec.structs.replace(session.parts(words.reshape(-1))[0], survivors=tuple(survivors))
    with pytest.raises(PrivacyError, match="is no sum of the"):
        session.disk.site().open(part)


def test_the_tests_of_noise_tell_a_sum_an_unmasked_value_and_a_reused_mask():
    values = np.random.default_rng(1).normal(0, 0.05, 40_000).clip(-1, 1)
    session = Session(terms(values.size), {site: update(values) for site in SITES})
    key, (part,) = session.disk.key, session.parts()
    assert key is not None
    assert not looks_uniform(unmasked(key, part.survivors, 0, session.total.reshape(-1, ckks.WORDS)), ckks.BITS)
    once = np.empty(session.terms.encoding.size, np.uint64)
    Vector(session.terms.encoding, update(values), "a", 2).encode(0, once)
    assert not looks_uniform(ckks.reduced(once), ckks.BITS), "as it would be without a mask"
    alone = session.sum_of("a").reshape(-1, ckks.WORDS)
    masked = unmasked(key, [], 0, alone)
    assert looks_uniform(masked, ckks.BITS), "even to whoever has the key of CKKS"
    own = unmasked(key, [one for one in part.survivors if one.site == "a"], 0, alone)
    assert np.array_equal(own, ckks.reduced(once))
    assert not looks_uniform(ckks.reduced(masked - (masked - own)), ckks.BITS), "one mask twice"


def test_masks_are_other_ones_at_each_attempt_and_site():
    values = np.zeros(40_000)
    disk, seen = Disk(), []
    for attempt in (1, 2):
        session = Session(terms(values.size, attempt=attempt), {site: update(values) for site in SITES}, disk)
        assert disk.key is not None
        seen += [unmasked(disk.key, [], 0, session.sum_of(site).reshape(-1, ckks.WORDS)) for site in ("a", "b")]
    for place, one in enumerate(seen):
        assert looks_uniform(one, ckks.BITS)
        assert all(looks_uniform(ckks.reduced(one - other), ckks.BITS) for other in seen[:place])


def test_a_mask_hides_one_vector():
    """Another one is told before anything leaves; the same is encrypted anew."""
    session = a_session()
    disk = session.disks["a"]
    again = disk.sealed(update(np.linspace(-1, 1, 10)))
    assert not np.array_equal(again, session.vectors["a"])
    with pytest.raises(PrivacyError, match="other values than those that were masked before"):
        disk.sealed(update(np.linspace(-1, 0.9, 10)))
    first = disk.accept(session.invitation, "a")
    assert session.disks["a"].accept(session.invitation, "a") == first


def test_a_key_site_that_has_lost_its_folder_says_so_and_others_keys_are_made():
    """The server notes it, and its next attempt is another one, also after a restart."""
    stored: list[bytes] = []
    lost = a_session()
    (places, letter), *_ = lost.server.parts(lost.total)
    fresh = Disk()
    said = fresh.site().open(protocol.unpack(letter, Part))
    assert said == Lost(lost.terms.digest())
    lost.server._store = stored.append
    assert attempt_at(2, stored[-1] if stored else None) == 1
    with pytest.raises(QuorumError, match=r"b has lost the keys of this round's sum(.|\n)*Resume"):
        lost.server.opened(places, protocol.pack(said))
    assert (attempt_at(2, stored[-1]), attempt_at(3, stored[-1])) == (2, 1)
    session = Session(terms(attempt=2), {site: update(np.linspace(-1, 1, 10)) for site in SITES}, fresh)
    assert float(np.asarray(session.opened()[SCALARS][agreement.COUNT])) == 4.0
    with pytest.raises(PrivacyError, match="a later session has begun"):
        lost.disks["a"].accept(session.invitation, "a") and lost.disks["a"].accept(lost.invitation, "a")


@pytest.mark.parametrize("change", ["a word less", "a later part", "too large"])
def test_what_is_no_part_of_the_sum_is_refused(change):
    session = a_session()
    (part,) = session.parts()
    changed = {
        "a word less": {"words": part.words[:-8]},
        "a later part": {"first": 32},
        "too large": {"words": b"\xff" * len(part.words)},
    }[change]
    with pytest.raises(WireError):
        session.disk.site().open(msgspec.structs.replace(part, **changed))
    assert session.disk.opened is None, "nothing was decrypted"


def test_what_holds_no_integers_is_refused():
    session = a_session()
    words = ((session.total.astype(object) * 3 + 5) % ckks.PRIMES[0]).astype(np.uint64)[::-1].copy()
    with pytest.raises(WireError, match="no sum of encrypted integers"):
        session.disk.site().open(session.parts(words)[0])


def test_values_that_sites_can_not_have_are_told():
    """A site that does not keep to its range is noticed where the sum is beyond what all can have."""
    session = Session(terms(), {site: update(np.linspace(-1, 1, 10)) for site in SITES})
    values = np.zeros(session.terms.encoding.size, np.int64)
    values[-1] = 1 << 38
    ckks.add(session.total, ckks.Encryptor(session.invitation.offer.public).encrypt(values))
    with pytest.raises(WireError, match="sum of 'w' of 'delta' is more than 4 sites can put in"):
        session.opened()


def test_a_key_of_another_is_refused():
    agreed = terms()
    _, public = ckks.new_keys()

    def offered(signer: str, **changes: bytes) -> bytes:
        offer = protocol.Offer(agreed.digest(), public, X25519, b"")
        offer = msgspec.structs.replace(offer, signature=SIGNERS[signer].sign(offer.content()))
        return protocol.pack(msgspec.structs.replace(offer, **changes))

    server = Server(agreed, SIGNERS["a"], lambda _: None, None)
    server.invite(offered("b"))
    with pytest.raises(AccessError, match="was not signed by 'b'"):
        server.invite(offered("c"))
    with pytest.raises(AccessError, match="was not signed by 'b'"):
        server.invite(offered("b", public=public[:-8] + bytes(8)))
    with pytest.raises(AccessError, match="was not signed by 'b'"):
        server.invite(offered("b", mask=bytes(31) + b"\x01"))
    with pytest.raises(WireError, match="another session"):
        server.invite(offered("b", session=bytes(32)))
    with pytest.raises(PrivacyError, match="'b' is to have the key"):
        Disk().site("c").offer(agreed)


def test_an_older_session_does_not_come_back():
    disk = Disk()
    disk.site().offer(terms(round=4))
    with pytest.raises(PrivacyError, match="a later session has begun"):
        disk.site().offer(terms(round=2))


@pytest.mark.parametrize(
    ("values", "weight", "kind"),
    [
        (np.full(10, np.nan), 0.5, NonFiniteError),
        (np.full(10, 2.1), 0.5, PrivacyError),
        (np.full(10, 1.0), 1.5, PrivacyError),
        (np.full(9, 1.0), 0.5, WireError),
    ],
)
def test_what_is_outside_its_range_is_not_encrypted(values, weight, kind):
    disk = Disk()
    disk.accept(Invitation(terms(), disk.site().offer(terms())), "a")
    with pytest.raises(kind):
        disk.sealed(update(values, weight))


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"sites": ("a", "b")}, PrivacyError, "2 sites are asked"),
        ({"sites": ("b", "a", "c")}, PrivacyError, "not in order"),
        ({"minimum": 2}, PrivacyError, "below 3"),
        ({"sites": tuple(f"{n:03d}" for n in range(65))}, PrivacyError, "more than 64"),
    ],
)
def test_terms_that_protect_nobody_are_none(changes, kind, reason):
    values = {name: getattr(terms(), name) for name in terms().__struct_fields__}
    with pytest.raises(kind, match=reason):
        Terms(**{**values, **changes})


def test_a_step_too_fine_and_an_update_too_large_are_refused_with_what_would_do():
    with pytest.raises(PrivacyError, match="Allow a coarser step or a smaller range"):
        terms(section=SECTION.model_copy(update={"step": 1e-12}))
    small = SECTION.model_copy(update={"max_bytes": 1_000_000})
    assert terms(20_000, small).num_ciphertexts == 5
    with pytest.raises(
        FitError, match=r"is 3,276,800 bytes encrypted, .* about 0.068 s to encrypt.*max_bytes is 1,000,000"
    ):
        terms(100_000, small)


def test_too_few_sites_are_never_closed():
    server = Server(terms(), SIGNERS["a"], lambda _: None, None)
    with pytest.raises(QuorumError, match="2 of 4 sites sent ciphertexts"):
        server.close(("a", "b"))


def test_a_server_goes_on_with_what_it_had_stored_and_not_with_another_sessions():
    stored: list[bytes] = []
    session = a_session()
    session.server._store = stored.append
    session.server.finish()
    again = Server(session.terms, SIGNERS["a"], stored.append, stored[-1])
    assert (tuple(again.survivors), again.is_opened) == (SITES, True)
    other = Server(terms(round=4), SIGNERS["a"], stored.append, stored[-1])
    assert (tuple(other.survivors), other.is_opened) == ((), False)


def test_an_acceptance_that_is_not_the_sites_is_not_taken():
    session = a_session()
    disk = Disk()
    theirs = disk.accept(session.invitation, "a")
    for site, changes, kind in (
        ("b", {}, WireError),
        ("a", {"mask": X25519}, AccessError),
        ("a", {"offer": bytes(32)}, WireError),
        ("a", {"session": bytes(32)}, WireError),
    ):
        with pytest.raises(kind):
            session.server.accept(site, protocol.pack(msgspec.structs.replace(theirs, **changes)))
    low = msgspec.structs.replace(theirs, mask=bytes(32))
    low = msgspec.structs.replace(low, signature=SIGNERS["a"].sign(low.content()))
    with pytest.raises(WireError, match="low order"):
        session.server.accept("a", protocol.pack(low))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_are_taken_for_a_message_by_mistake(data, place):
    letter = protocol.pack(terms())
    for kind in (Terms, Invitation, Part, protocol.Offer, Acceptance, protocol.Integers, Lost, protocol.Finish):
        for changed in (data, letter[:place] + data + letter[place + len(data) :]):
            try:
                protocol.unpack(changed, kind)
            except (WireError, PrivacyError):
                continue
            assert kind is Terms
