# SPDX-License-Identifier: Apache-2.0
"""A session of homomorphic encryption: floats within the stated error, and everything that a key site refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.tree import Parts
from hansa.errors import AccessError, FitError, HansaError, NonFiniteError, PrivacyError, QuorumError, WireError
from hansa.homomorphic import agreement, ckks, protocol
from hansa.homomorphic.protocol import Invitation, Part, Terms
from hansa.homomorphic.server import Server
from hansa.homomorphic.site import Kept, Key, KeySite, Opened, sealed
from hansa.secagg.local import local_signers
from hansa.secagg.ranges import bounds_of
from hansa.secagg.ring import SCALARS, WEIGHT, decoded, summands

SITES = ("a", "b", "c", "d")
SIGNERS = local_signers((*SITES, "e"))
SECTION = HomomorphicEncryptionSection(range=2.0, weight_cap=1024.0, key_site="b", metrics={"loss_sum": 100.0})


def terms(
    size: int = 10, section: HomomorphicEncryptionSection = SECTION, sites: Sequence[str] = SITES, round: int = 2
):
    shapes = {"delta": {"w": (size,)}}
    return agreement.terms(section, bounds_of(section), "job", round, sites, shapes, {"delta": True})


class Disk:
    """What a key site has stored."""

    def __init__(self) -> None:
        self.key: Key | None = None
        self.opened: Opened | None = None

    def site(self, name: str = "b") -> KeySite:
        """Return the site as it is after a restart."""

        def store_key(key: Key) -> None:
            self.key = key

        def store_opened(opened: Opened) -> None:
            self.opened = opened

        return KeySite(name, SIGNERS[name], Kept(self.key, self.opened, store_key, store_opened))


def update(values: np.ndarray, weight: float = 0.5, loss: float = 1.0) -> dict[str, Parts]:
    return summands({"delta": {"w": values}}, weight, {"loss_sum": loss, agreement.COUNT: 1.0})


class Session:
    """A session up to the sum of ciphertexts, which is not opened yet; nobody keeps anything in memory."""

    def __init__(self, agreed: Terms, updates: Mapping[str, dict[str, Parts]], disk: Disk | None = None) -> None:
        self.terms, self.disk = agreed, disk or Disk()
        self.server = Server(agreed, SIGNERS["a"], lambda _: None, None)
        self.invitation = protocol.unpack(
            self.server.invite(protocol.pack(self.disk.site(agreed.key_site).offer(agreed))), Invitation
        )
        self.vectors = {site: np.concatenate(list(sealed(self.invitation, u, site))) for site, u in updates.items()}
        self.total = np.zeros(agreed.num_words, np.uint64)
        for words in self.vectors.values():
            self.server.check(words)
            self.server.add(self.total, words)
        self.server.close(tuple(updates))

    def parts(self, total: np.ndarray | None = None) -> list[Part]:
        letters = self.server.parts(self.total if total is None else total)
        return [protocol.unpack(letter, Part) for _, letter in letters]

    def opened(self) -> dict[str, Parts]:
        values = [self.disk.site(self.terms.key_site).open(part) for part in self.parts()]
        whole = np.concatenate(values)
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
    agreed = agreement.terms(section, bounds_of(section), "job", 2, sites, {"delta": {"w": (size,)}}, {"delta": True})
    weights = rng.uniform(0, heaviest, count)
    updates = [weight * rng.uniform(-largest, largest, size) for weight in weights]
    signers = local_signers(sites)
    disk = Disk()
    key_site = KeySite("s00", signers["s00"], Kept(None, None, lambda key: None, lambda opened: None))
    server = Server(agreed, signers["s01"], lambda _: None, None)
    invitation = protocol.unpack(server.invite(protocol.pack(key_site.offer(agreed))), Invitation)
    total = np.zeros(agreed.num_words, np.uint64)
    for site, weight, values in zip(sites, weights, updates, strict=True):
        parts = summands({"delta": {"w": values}}, weight, {agreement.COUNT: 1.0})
        server.add(total, np.concatenate(list(sealed(invitation, parts, site))))
    server.close(sites)
    whole = np.concatenate(
        [
            server.opened(at, key_site.open(protocol.unpack(letter, Part)).tobytes())
            for at, letter in server.parts(total)
        ]
    )
    found = decoded(agreed.encoding, whole.view(np.uint64), count)
    error = np.abs(np.asarray(found["delta"]["w"]) - np.sum(updates, axis=0)).max()
    bound = agreed.encoding.error("delta", "w")
    slack = 1e-13 * largest * heaviest * count  # of the floats that it is compared with
    assert error <= bound + slack
    if size > 1000:
        assert error > bound / 10
    assert (
        abs(float(np.asarray(found[SCALARS][WEIGHT])) - weights.sum()) <= agreed.encoding.error(SCALARS, WEIGHT) + slack
    )
    assert disk.key is None


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
    with pytest.raises(PrivacyError, match="there is no second one"):
        session.disk.site().offer(terms(section=SECTION.model_copy(update={"minimum": 4})))


def test_a_session_has_one_sum():
    """Two sums of nearly the same sites would differ by one update."""
    session = a_session()
    session.opened()
    (part,) = session.parts(session.total - 0)
    fewer = msgspec.structs.replace(part, survivors=("a", "b", "c"))
    with pytest.raises(PrivacyError, match="the sum of other sites was opened"):
        session.disk.site().open(fewer)
    other = session.total.copy()
    ckks.add(other, session.vectors["a"])
    with pytest.raises(PrivacyError, match="something else was opened"):
        session.disk.site().open(session.parts(other)[0])


@pytest.mark.parametrize(
    ("survivors", "kind", "reason"),
    [
        (("a", "b"), PrivacyError, "fewer than 3 are never shown"),
        ((), PrivacyError, "fewer than 3"),
        (("a", "b", "x"), PrivacyError, "others than the sites asked"),
        (("b", "a", "c"), PrivacyError, "others than the sites asked"),
        (("a", "b", "c"), PrivacyError, "the sum is of 4 vectors, said to be of 3 sites"),
    ],
)
def test_whom_a_sum_is_of_is_checked(survivors, kind, reason):
    session = a_session()
    with pytest.raises(kind, match=reason):
        session.disk.site().open(msgspec.structs.replace(session.parts()[0], survivors=survivors))
    assert session.disk.opened is None, "nothing was shown"


def test_one_sites_ciphertext_is_not_taken_for_the_sum():
    """By a server's mistake: one that lies can add the missing ones to the count (``protocol``: not promised)."""
    session = a_session()
    with pytest.raises(PrivacyError, match="the sum is of 1 vectors, said to be of 4"):
        session.disk.site().open(session.parts(session.vectors["a"])[0])


@pytest.mark.parametrize("change", ["a word less", "a later part", "another session", "too large", "not even"])
def test_what_is_no_part_of_the_sum_is_refused(change):
    session = a_session()
    (part,) = session.parts()
    words = np.frombuffer(part.words, np.uint64)
    changed = {
        "a word less": {"words": part.words[:-8]},
        "a later part": {"first": 32},
        "another session": {"session": bytes(32)},
        "too large": {"words": b"\xff" * len(part.words)},
        "not even": {"words": ((words.astype(object) * 3 + 5) % ckks.PRIMES[0]).astype(np.uint64)[::-1].tobytes()},
    }[change]
    with pytest.raises(HansaError):
        session.disk.site().open(msgspec.structs.replace(part, **changed))
    assert session.disk.opened is None, "nothing was shown"


def test_values_that_sites_can_not_have_are_told():
    """A site that does not keep to its range is noticed where the sum is beyond what all can have."""
    session = Session(terms(), {site: update(np.linspace(-1, 1, 10)) for site in SITES})
    values = np.zeros(session.terms.encoding.size, np.int64)
    values[-1] = 1 << 38
    ckks.add(session.total, ckks.Encryptor(session.invitation.offer.public).encrypt(values))
    with pytest.raises(WireError, match="sum of 'w' of 'delta' is more than 4 sites can put in"):
        session.opened()
    assert session.disk.opened is None, "nothing was shown"


def test_a_key_of_another_is_refused():
    agreed = terms()
    _, public = ckks.new_keys()

    def offered(signer: str, **changes: bytes) -> bytes:
        offer = protocol.Offer(agreed.digest(), public, b"")
        offer = msgspec.structs.replace(offer, signature=SIGNERS[signer].sign(offer.content()))
        return protocol.pack(msgspec.structs.replace(offer, **changes))

    server = Server(agreed, SIGNERS["a"], lambda _: None, None)
    server.invite(offered("b"))
    with pytest.raises(AccessError, match="was not signed by 'b'"):
        server.invite(offered("c"))
    with pytest.raises(AccessError, match="was not signed by 'b'"):
        server.invite(offered("b", public=public[:-8] + bytes(8)))
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
    invitation = Invitation(terms(), disk.site().offer(terms()))
    with pytest.raises(kind):
        list(sealed(invitation, update(values, weight), "a"))


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"sites": ("a", "b")}, PrivacyError, "2 sites are asked"),
        ({"sites": ("b", "a", "c")}, PrivacyError, "not in order"),
        ({"minimum": 2}, PrivacyError, "below 3"),
        ({"sites": tuple(f"{n:03d}" for n in range(257))}, PrivacyError, "more than 256"),
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
    agreed = terms()
    server = Server(agreed, SIGNERS["a"], stored.append, None)
    letter = server.invite(protocol.pack(Disk().site().offer(agreed)))
    server.close(SITES[:3])
    server.finish()
    again = Server(agreed, SIGNERS["a"], stored.append, stored[-1])
    assert (again.survivors, again.is_opened) == (SITES[:3], True)
    other = Server(terms(round=4), SIGNERS["a"], stored.append, stored[-1])
    assert (other.survivors, other.is_opened) == ((), False)
    assert protocol.unpack(letter, Invitation).terms == agreed


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_are_taken_for_a_message_by_mistake(data, place):
    letter = protocol.pack(terms())
    for kind in (Terms, Invitation, Part, protocol.Offer, protocol.Finish):
        for changed in (data, letter[:place] + data + letter[place + len(data) :]):
            try:
                protocol.unpack(changed, kind)
            except (WireError, PrivacyError):
                continue
            assert kind is Terms
