# SPDX-License-Identifier: Apache-2.0
"""A server that lies, sites that deal rubbish, and everything out of turn."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from hansa.errors import (
    AccessError,
    ChecksumError,
    HansaError,
    NonFiniteError,
    PrivacyError,
    QuorumError,
    SiteError,
    WireError,
)
from hansa.secagg import protocol as p
from hansa.secagg import site as sites
from hansa.secagg.shamir import PRIME, SHARE_BYTES
from hansa.secagg.site import Site
from sums import Disk, Federation, constant, masked, terms_for, up_to


def changed(data: bytes, kind: type[Any], **fields: object) -> bytes:
    return p.pack(msgspec.structs.replace(p.unpack(data, kind), **fields))


@pytest.fixture
def lab() -> Federation:
    return Federation(terms_for(5))


WHO = terms_for(5).sites
ME, PEER = WHO[0], WHO[1]


# the roll


def test_a_swapped_key_is_refused_by_the_site_and_by_the_server(lab: Federation) -> None:
    roll = p.unpack(up_to(lab, "share", {}), p.Roll)
    for key in ("channel", "mask", "commitment"):
        forged = msgspec.structs.replace(roll.adverts[1], **{key: bytes([9]) * 32})
        lie = msgspec.structs.replace(roll, adverts=(roll.adverts[0], forged, *roll.adverts[2:]))
        with pytest.raises(AccessError, match=f"site {PEER}, round 1: The keys were not signed by the site"):
            lab.site(ME).share(p.pack(lie))
        with pytest.raises(AccessError, match=f"site {PEER}, round 1"):
            Federation(lab.terms, signers=lab.signers).server.add_advert(PEER, p.pack(forged))


def test_own_keys_must_be_on_the_roll_as_they_were_sent(lab: Federation) -> None:
    """The server replays an advert that this site signed before it lost its disk, or leaves it out."""
    roll = p.unpack(up_to(lab, "share", {}), p.Roll)
    fresh = Site(lab.terms, ME, lab.signers[ME], Disk().store)
    fresh.advertise()
    for adverts in (roll.adverts, roll.adverts[1:]):
        with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*does not have this site's own keys"):
            fresh.share(changed(p.pack(roll), p.Roll, adverts=adverts))


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ((0, 1, 2, 3, 3), "there twice"),
        ((1, 0, 2, 3, 4), "not in order"),
        ((0, 1, 2), "secure sum needs 4"),
        ((), "secure sum needs 4"),
    ],
)
def test_a_roll_that_is_no_roll_is_refused(lab: Federation, order: tuple[int, ...], says: str) -> None:
    roll = up_to(lab, "share", {})
    adverts = p.unpack(roll, p.Roll).adverts
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*{says}"):
        lab.site(ME).share(changed(roll, p.Roll, adverts=tuple(adverts[at] for at in order)))


def test_a_site_that_copies_anothers_keys_is_refused(lab: Federation) -> None:
    adverts = {name: p.unpack(lab.site(name).advertise(), p.Advert) for name in WHO}
    copy = msgspec.structs.replace(adverts[PEER], mask=adverts[ME].mask)
    copy = msgspec.structs.replace(copy, signature=lab.signers[PEER].sign(copy.content()))
    lab.server.add_advert(ME, p.pack(adverts[ME]))
    with pytest.raises(SiteError, match=f"site {PEER}, round 1: .*public key that is there already"):
        lab.server.add_advert(PEER, p.pack(copy))
    roll = p.Roll(lab.terms.digest(), tuple({**adverts, PEER: copy}[name] for name in WHO))
    with pytest.raises(PrivacyError, match="two public keys of the roll are the same"):
        lab.site(ME).share(p.pack(roll))


def test_keys_of_an_earlier_session_are_refused_also_under_another_name(lab: Federation) -> None:
    """The server replays them in a new attempt: as they were, or said to be of this one."""
    earlier = Federation(terms_for(5, attempt=2), signers=lab.signers).site(PEER).advertise()
    roll = p.unpack(up_to(lab, "share", {}), p.Roll)
    for advert, error, says in (
        (p.unpack(earlier, p.Advert), WireError, "an advert is of another session"),
        (p.unpack(changed(earlier, p.Advert, session=lab.terms.digest()), p.Advert), AccessError, "were not signed"),
    ):
        replayed = msgspec.structs.replace(roll, adverts=(roll.adverts[0], advert, *roll.adverts[2:]))
        with pytest.raises(error, match=f"site {PEER}, round 1: .*{says}"):
            lab.site(ME).share(p.pack(replayed))


@pytest.mark.parametrize("key", ["channel", "mask"])
def test_a_key_of_low_order_is_refused_by_the_server_and_by_those_who_would_agree(lab: Federation, key: str) -> None:
    roll = p.unpack(up_to(lab, "share", {}), p.Roll)
    advert = msgspec.structs.replace(roll.adverts[1], **{key: bytes(32)})
    advert = msgspec.structs.replace(advert, signature=lab.signers[PEER].sign(advert.content()))
    with pytest.raises(WireError, match=f"site {PEER}, round 1: .*low order"):
        Federation(lab.terms, signers=lab.signers).server.add_advert(PEER, p.pack(advert))
    message = changed(p.pack(roll), p.Roll, adverts=(roll.adverts[0], advert, *roll.adverts[2:]))
    site: Any = lab.site(ME)

    def agree() -> None:
        site.share(message)
        site._session.pair_mask(site._key("mask key"), ME, PEER)

    with pytest.raises(WireError, match=f"site {PEER}, round 1: .*low order"):
        agree()


def test_a_site_that_was_not_asked_is_refused(lab: Federation) -> None:
    wider = Federation(terms_for(6))
    stranger = wider.site(wider.terms.sites[5])
    advert = changed(stranger.advertise(), p.Advert, session=lab.terms.digest())
    with pytest.raises(PrivacyError, match=r"site site-005, round 1: .*was not asked"):
        lab.server.add_advert("site-005", advert)


def test_a_second_roll_is_refused_also_after_a_restart(lab: Federation) -> None:
    roll = up_to(lab, "share", {})
    shorter = changed(roll, p.Roll, adverts=p.unpack(roll, p.Roll).adverts[:4])
    lab.site(ME).share(roll)
    lab.restarts = True
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*another roll than the first one"):
        lab.site(ME).share(shorter)


# the shares


def inboxes(lab: Federation) -> bytes:
    lab.share(WHO, lab.advertise(WHO))
    return lab.server.inbox(ME)


@pytest.mark.parametrize("change", ["flip", "short", "long", "empty", "misdirected", "reflected"])
def test_boxes_that_do_not_open_are_refused_by_name(lab: Federation, change: str) -> None:
    inbox = inboxes(lab)
    boxes = dict(p.unpack(inbox, p.Inbox).boxes)
    box = boxes[PEER]
    boxes[PEER] = {
        "flip": box[:-1] + bytes([box[-1] ^ 1]),
        "short": box[:-1],
        "long": box + b"\0",
        "empty": b"",
        "misdirected": p.unpack(lab.server.inbox(WHO[2]), p.Inbox).boxes[PEER],
        "reflected": p.unpack(lab.server.inbox(PEER), p.Inbox).boxes[ME],
    }[change]
    with pytest.raises(WireError, match=f"site {ME}, round 1: .*the shares that '{PEER}' dealt can't be used"):
        lab.site(ME).receive(changed(inbox, p.Inbox, boxes=boxes))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes instead of 33"),
        (bytes(SHARE_BYTES), "it has 0 bytes instead of 33"),
        (bytes(2 * SHARE_BYTES + 1), "it has 34 bytes instead of 33"),
        (bytes(SHARE_BYTES) + PRIME.to_bytes(SHARE_BYTES), "its number is outside the field"),
    ],
)
def test_boxes_that_hold_no_shares_are_refused_by_name(lab: Federation, content: bytes, says: str) -> None:
    inbox = inboxes(lab)
    dealer: Any = lab.site(PEER)
    key = dealer._session.box_key(dealer._key("channel key"), ME, PEER, ME)
    boxes = {**p.unpack(inbox, p.Inbox).boxes, PEER: sites.keys.seal(key, content)}
    with pytest.raises(WireError, match=f"site {ME}.*the shares that '{PEER}' dealt can't be used: {says}"):
        lab.site(ME).receive(changed(inbox, p.Inbox, boxes=boxes))


def test_an_inbox_that_leaves_peers_out_is_refused(lab: Federation) -> None:
    """Fewer masks would mean that those the server works with make up more of them."""
    inbox = inboxes(lab)
    boxes = p.unpack(inbox, p.Inbox).boxes
    without = {name: box for name, box in boxes.items() if name != PEER}
    site = lab.site(ME)
    with pytest.raises(WireError, match=f"the box of '{PEER}' is missing"):
        site.receive(changed(inbox, p.Inbox, boxes=without))
    with pytest.raises(WireError, match="the box of 'stranger' is not for this site"):
        site.receive(changed(inbox, p.Inbox, boxes={**boxes, "stranger": b""}))
    with pytest.raises(PrivacyError, match="3 sites dealt shares, 4 are needed"):
        site.receive(changed(inbox, p.Inbox, boxes={n: boxes[n] for n in WHO[1:3]}, dealers=WHO[:3]))
    with pytest.raises(SiteError, match="goes on without this site: it is not among those that dealt shares"):
        site.receive(changed(inbox, p.Inbox, boxes=boxes, dealers=WHO[1:]))
    with pytest.raises(WireError, match="the dealers are not in order"):
        site.receive(changed(inbox, p.Inbox, dealers=WHO[::-1]))
    with pytest.raises(WireError, match="among the dealers is 'x', who can't be"):
        site.receive(changed(inbox, p.Inbox, dealers=(*WHO, "x")))
    site.receive(inbox)
    with pytest.raises(PrivacyError, match="another list of dealers than the first one"):
        site.receive(changed(inbox, p.Inbox, dealers=WHO[:4], boxes={n: boxes[n] for n in WHO[1:4]}))


def test_a_site_of_a_sparse_graph_needs_the_holders_of_its_own_shares() -> None:
    """A quorum dealt shares, but none of this site's neighbours: its masks would be its own seed's alone."""
    lab = Federation(terms_for(70, corrupt=0.1))
    everyone = lab.terms.sites
    roll = lab.advertise(everyone)
    site: Any = lab.site(ME)
    site.share(roll)
    near = set(site._session.neighbours(ME))
    there = [name for name in everyone if name not in near]
    assert len(there) >= site._session.shape.quorum
    inbox = p.pack(p.Inbox(lab.terms.digest(), tuple(there), {}))
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*1 sites that hold shares of this one dealt any"):
        site.receive(inbox)
    needed = site._session.shape.threshold
    with pytest.raises(
        QuorumError, match=rf"round 1: .*of those that hold shares of '{ME}', 1 dealt shares, {needed} are"
    ):
        lab.share(there, roll)


def test_shares_for_others_than_the_holders_are_refused(lab: Federation) -> None:
    roll = up_to(lab, "share", {})
    shares = lab.site(PEER).share(roll)
    held = p.unpack(shares, p.Shares)
    for change in (
        {"boxes": {**held.boxes, "x": b""}},
        {"boxes": {**held.boxes, PEER: b""}},
        {"boxes": {}},
        {"digests": {**held.digests, "x": bytes(64)}},
        {"digests": {}},
    ):
        with pytest.raises(WireError, match=f"site {PEER}, round 1: .*others than the holders"):
            lab.server.add_shares(PEER, changed(shares, p.Shares, **change))


# masking


def test_other_values_under_the_same_masks_are_refused(lab: Federation) -> None:
    values = constant(lab.terms)
    lab.share(WHO, lab.advertise(WHO))
    lab.restarts = True
    lab.site(ME).receive(lab.server.inbox(ME))
    first = masked(lab.site(ME), values[ME])
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*other values than those that were masked before"):
        lab.site(ME).masked(constant(lab.terms, 0.26)[ME])
    np.testing.assert_array_equal(masked(lab.site(ME), values[ME]), first)


def test_values_that_change_while_they_are_read_are_not_sent(lab: Federation) -> None:
    lab.share(WHO, lab.advertise(WHO))
    lab.site(ME).receive(lab.server.inbox(ME))
    w = np.full(5, 0.25)
    leaf = lab.site(ME).masked({"delta": {"w": w}})
    w[2] = 0.5
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*changed while they were sent"):
        np.asarray(leaf)


@pytest.mark.parametrize(
    ("value", "error"),
    [(np.nan, NonFiniteError), (np.inf, NonFiniteError), (1.01, PrivacyError), (-1.01, PrivacyError)],
)
def test_values_that_the_ring_does_not_hold_leave_no_trace(
    lab: Federation, value: float, error: type[HansaError]
) -> None:
    lab.share(WHO, lab.advertise(WHO))
    lab.site(ME).receive(lab.server.inbox(ME))
    before = lab.disks[ME].data
    with pytest.raises(error, match=f"site {ME}, round 1: 'w' of 'delta'"):
        lab.site(ME).masked(constant(lab.terms, value)[ME])
    assert lab.disks[ME].data == before
    masked(lab.site(ME), constant(lab.terms)[ME])


@pytest.mark.parametrize(("size", "dtype"), [(4, np.uint32), (6, np.uint32), (5, np.uint64), (5, np.float32)])
def test_vectors_of_another_length_or_ring_are_refused(lab: Federation, size: int, dtype: Any) -> None:
    lab.share(WHO, lab.advertise(WHO))
    with pytest.raises(WireError, match=rf"site {ME}, round 1: .*{np.dtype(dtype)}\[{size}\] instead of uint32\[5\]"):
        lab.server.check_upload(ME, size, np.dtype(dtype))


def test_late_double_and_strange_vectors_are_refused(lab: Federation) -> None:
    lab.share(WHO[:4], lab.advertise(WHO))
    values = constant(lab.terms)
    with pytest.raises(SiteError, match=f"site {WHO[4]}, round 1: .*had not dealt shares"):
        lab.server.accept(WHO[4])
    with pytest.raises(SiteError, match=f"site {WHO[4]}, round 1: .*did not deal shares in time"):
        lab.server.inbox(WHO[4])
    lab.mask(WHO[:3], values)
    with pytest.raises(QuorumError, match="3 sites survive, 4 are needed"):
        lab.server.close_uploads()
    with pytest.raises(SiteError, match=f"site {ME}, round 1: .*in the sum already"):
        lab.server.accept(ME)


def test_a_masked_vector_after_the_survivor_set_is_late_for_good() -> None:
    lab = Federation(terms_for(10))
    lab.share(lab.terms.sites, lab.advertise(lab.terms.sites))
    lab.mask(lab.terms.sites[:7], constant(lab.terms))
    first = lab.server.close_uploads()
    lab.restarts = True
    lab.closed()
    with pytest.raises(
        SiteError, match=r"site site-008, round 1: .*late: the survivor set is fixed, and does not change"
    ):
        lab.server.check_upload("site-008", 5, np.dtype(np.uint32))
    assert lab.server.close_uploads() == first


# unmasking


def test_a_second_survivor_set_is_refused_also_after_a_restart() -> None:
    lab = Federation(terms_for(10))
    survivors = up_to(lab, "vote", constant(lab.terms))
    lab.site(ME).vote(survivors)
    fewer = changed(survivors, p.Survivors, sites=lab.terms.sites[:9])
    for restarts in (False, True):
        lab.restarts = restarts
        with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*another survivor set than the first one"):
            lab.site(ME).vote(fewer)


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        (WHO[:3], PrivacyError, "3 sites survive, 4 are needed"),
        (WHO[:2], PrivacyError, "2 sites survive, 4 are needed"),
        ((ME,), PrivacyError, "1 sites survive, 4 are needed"),
        (WHO[1:], SiteError, "not among those that are summed"),
        ((*WHO, "x"), WireError, "among the survivors is 'x', who can't be"),
        ((ME, *WHO), WireError, "there twice"),
    ],
)
def test_survivor_sets_that_are_too_small_or_not_of_dealers(
    lab: Federation, chosen: tuple[str, ...], error: type[HansaError], says: str
) -> None:
    survivors = up_to(lab, "vote", constant(lab.terms))
    with pytest.raises(error, match=f"site {ME}, round 1: .*{says}"):
        lab.site(ME).vote(changed(survivors, p.Survivors, sites=chosen))


def test_three_of_three_or_none() -> None:
    lab = Federation(terms_for(3))
    survivors = up_to(lab, "vote", constant(lab.terms))
    with pytest.raises(PrivacyError, match="2 sites survive, 3 are needed"):
        lab.site(ME).vote(changed(survivors, p.Survivors, sites=WHO[:2]))


def test_no_vote_and_no_share_before_the_site_masked_anything(lab: Federation) -> None:
    lab.share(WHO, lab.advertise(WHO))
    lab.site(ME).receive(lab.server.inbox(ME))
    survivors = p.pack(p.Survivors(lab.terms.digest(), WHO))
    with pytest.raises(PrivacyError, match="before this site had masked anything"):
        lab.site(ME).vote(survivors)
    with pytest.raises(PrivacyError, match="before this site has voted"):
        lab.site(ME).reveal(p.pack(p.Votes(lab.terms.digest(), {})))


def test_votes_must_be_a_quorums_for_the_very_set_that_this_site_signed(lab: Federation) -> None:
    votes = up_to(lab, "reveal", constant(lab.terms))
    signatures = p.unpack(votes, p.Votes).signatures
    site = lab.site(ME)
    with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*3 sites signed the survivor set, 4 are needed"):
        site.reveal(changed(votes, p.Votes, signatures={name: signatures[name] for name in WHO[:3]}))
    with pytest.raises(AccessError, match=f"site {PEER}, round 1: The vote is not this site's for this survivor set"):
        site.reveal(changed(votes, p.Votes, signatures={**signatures, PEER: signatures[ME]}))
    session: Any = site
    ballot = session._session.ballot(WHO, WHO[:4])
    other = {**signatures, PEER: lab.signers[PEER].sign(ballot)}
    with pytest.raises(AccessError, match=f"site {PEER}, round 1: The vote is not this site's for this survivor set"):
        site.reveal(changed(votes, p.Votes, signatures=other))
    with pytest.raises(WireError, match="among the voters is 'x', who can't be"):
        site.reveal(changed(votes, p.Votes, signatures={**signatures, "x": b""}))
    lab.reveal(WHO, votes)


def test_a_server_that_tells_two_halves_two_survivor_sets_gets_no_share_of_either() -> None:
    """Even if as many sites as the terms allow for, two of ten, sign both sets."""
    lab = Federation(terms_for(10))
    everyone = lab.terms.sites
    up_to(lab, "vote", constant(lab.terms))
    friends = everyone[8:]
    for half, told in ((everyone[:4], (*everyone[:7], *friends)), (everyone[4:8], everyone)):
        message = p.pack(p.Survivors(lab.terms.digest(), told))
        first: Any = lab.site(half[0])
        ballot = first._session.ballot(everyone, told)
        signatures = {name: p.unpack(lab.site(name).vote(message), p.Vote).signature for name in half}
        signatures |= {name: lab.signers[name].sign(ballot) for name in friends}
        votes = p.pack(p.Votes(lab.terms.digest(), signatures))
        for name in half:
            with pytest.raises(PrivacyError, match=f"site {name}, round 1: .*6 sites signed the survivor set, 7 are"):
                lab.site(name).reveal(votes)
            assert b"\xa8revealed\x80" in (lab.disks[name].data or b"")


def test_a_vote_that_is_not_the_sites_is_refused_by_the_server(lab: Federation) -> None:
    survivors = up_to(lab, "vote", constant(lab.terms))
    vote = lab.site(ME).vote(survivors)
    with pytest.raises(AccessError, match=f"site {PEER}, round 1"):
        lab.server.add_vote(PEER, changed(vote, p.Vote, site=PEER))
    with pytest.raises(WireError, match=f"site {PEER}, round 1: .*in the name of '{ME}'"):
        lab.server.add_vote(PEER, vote)


def test_the_other_kind_of_share_is_refused_for_ever() -> None:
    """Not even a state in which the survivor set was changed by hand gets a site to reveal both kinds."""
    lab = Federation(terms_for(10))
    gone = lab.terms.sites[9]
    who = lab.terms.sites[:9]
    lab.share(lab.terms.sites, lab.advertise(lab.terms.sites))
    lab.mask(who, constant(lab.terms))
    votes = lab.vote(who, lab.survivors())
    first = p.unpack(lab.site(ME).reveal(votes), p.Reveal)
    data = lab.disks[ME].data
    assert data is not None
    state = p.unpack_state(data, sites._State)
    assert state.revealed == {**dict.fromkeys(who, "seed"), gone: "key"}
    assert first.shares[gone] == state.held[gone][0]
    assert first.shares[PEER] == state.held[PEER][1]
    assert not {first.shares[gone]} & {state.held[gone][1]}

    lab.disks[ME].data = p.pack_state(msgspec.structs.replace(state, survivors=lab.terms.sites))
    lab.restarts = True
    session: Any = lab.site(ME)
    ballot = session._session.ballot(lab.terms.sites, lab.terms.sites)
    signed = {name: lab.signers[name].sign(ballot) for name in lab.terms.sites}
    with pytest.raises(
        PrivacyError,
        match=f"site {ME}, round 1: .*the seed share of '{gone}' is asked for, and its key share was revealed",
    ):
        lab.site(ME).reveal(changed(votes, p.Votes, signatures=signed))


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (b"", "it has 0 bytes instead of 33"),
        (bytes(64), "it has 64 bytes instead of 33"),
        (PRIME.to_bytes(33), "its number is outside the field"),
    ],
)
def test_bad_shares_are_refused_by_holder_and_dealer(lab: Federation, share: bytes, says: str) -> None:
    votes = up_to(lab, "reveal", constant(lab.terms))
    reveal = lab.site(ME).reveal(votes)
    shares = p.unpack(reveal, p.Reveal).shares
    with pytest.raises(WireError, match=f"site {ME}, round 1: .*its share of '{PEER}' can't be used: {says}"):
        lab.server.add_reveal(ME, changed(reveal, p.Reveal, shares={**shares, PEER: share}))
    for wrong in ({}, {**shares, "x": bytes(33)}):
        with pytest.raises(WireError, match=f"site {ME}, round 1: .*shares of other sites"):
            lab.server.add_reveal(ME, changed(reveal, p.Reveal, shares=wrong))
    lab.server.add_reveal(ME, reveal)
    lab.reveal(WHO, votes)
    lab.server.close_reveals()


@pytest.mark.parametrize("spoiled", [1, 2])
def test_shares_that_are_not_as_dealt_are_left_out_and_named(lab: Federation, spoiled: int) -> None:
    """One reveals the other kind, which is no use; four of five are enough, three are not."""
    votes = up_to(lab, "reveal", constant(lab.terms))
    for number, name in enumerate(WHO):
        reveal = lab.site(name).reveal(votes)
        data = lab.disks[name].data
        assert data is not None
        if number in range(1, 1 + spoiled):
            key_share = p.unpack_state(data, sites._State).held[ME][0]
            reveal = changed(reveal, p.Reveal, shares={**p.unpack(reveal, p.Reveal).shares, ME: key_share})
        lab.server.add_reveal(name, reveal)
    if spoiled == 1:
        assert len(lab.server.close_reveals()) == 5
    else:
        with pytest.raises(
            QuorumError,
            match=rf"round 1: .*of '{ME}', 3 shares are there, 4 are needed; those that '{PEER}', '{WHO[2]}' revealed "
            rf"are not as '{ME}' dealt them\. Nothing",
        ):
            lab.server.close_reveals()


@pytest.mark.parametrize("what", ["seed", "mask key"])
def test_a_dealer_whose_shares_are_worthless_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deals shares of something else than it committed to; what it spoils stays masked."""
    lab = Federation(terms_for(10))
    liar: Any = lab.site(PEER)
    honest = liar._secret
    roll = lab.advertise(lab.terms.sites)
    monkeypatch.setattr(liar, "_secret", lambda purpose: bytes([7]) * 32 if purpose == what else honest(purpose))
    lab.share(lab.terms.sites, roll)
    monkeypatch.undo()
    gone = {PEER} if what == "mask key" else set()
    who = [name for name in lab.terms.sites if name not in gone]
    total = lab.mask(who, constant(lab.terms))
    before = total.copy()
    lab.reveal(who, lab.vote(who, lab.survivors()))
    with pytest.raises(WireError, match=f"site {PEER}, round 1: .*do not give the secret that it committed to"):
        lab.unmask(total)
    np.testing.assert_array_equal(total, before)


# out of turn, of another session, damaged


def test_messages_of_another_session_are_refused_in_every_phase(lab: Federation) -> None:
    other = Federation(terms_for(5, attempt=2))
    votes = up_to(lab, "reveal", constant(lab.terms))
    for call, message in (
        (lab.server.add_advert, other.site(ME).advertise()),
        (lab.server.add_shares, p.pack(p.Shares(other.terms.digest(), ME, {}, {}))),
        (lab.server.add_vote, p.pack(p.Vote(other.terms.digest(), ME, b""))),
        (lab.server.add_reveal, p.pack(p.Reveal(other.terms.digest(), ME, {}))),
    ):
        with pytest.raises(WireError, match=f"site {ME}, round 1: .*of another session came; here it is attempt 1"):
            call(ME, message)
    with pytest.raises(WireError, match=f"site {ME}, round 1: .*of another session"):
        lab.site(ME).reveal(changed(votes, p.Votes, session=bytes(32)))


def test_a_message_of_another_kind_is_refused_with_its_site(lab: Federation) -> None:
    with pytest.raises(WireError, match=f"job job-1, site {ME}, round 1: Secure aggregation: this is no Advert"):
        lab.server.add_advert(ME, p.pack(p.Votes(lab.terms.digest(), {})))


def test_what_comes_before_its_phase_is_refused(lab: Federation) -> None:
    for call in (
        lambda: lab.server.add_shares(ME, b""),
        lambda: lab.server.close_shares(),
        lambda: lab.server.inbox(ME),
        lambda: lab.server.accept(ME),
        lambda: lab.server.close_uploads(),
        lambda: lab.server.add_vote(ME, b""),
        lambda: lab.server.close_votes(),
        lambda: lab.server.add_reveal(ME, b""),
        lambda: lab.server.close_reveals(),
    ):
        with pytest.raises(WireError, match="before the phase before it was closed"):
            call()
    site = lab.site(ME)
    inbox = p.pack(p.Inbox(lab.terms.digest(), WHO, {}))
    for early in (
        lambda: site.receive(inbox),
        lambda: site.masked({}),
        lambda: site.vote(b""),
        lambda: site.reveal(b""),
    ):
        with pytest.raises(PrivacyError, match=f"site {ME}, round 1: .*the roll of this session has not come yet"):
            early()
    site.advertise()
    site.share(lab.advertise(WHO))
    with pytest.raises(PrivacyError, match="nobody to mask with"):
        site.masked({})


def test_messages_that_are_late_or_differ_from_the_first(lab: Federation) -> None:
    adverts = {name: lab.site(name).advertise() for name in WHO}
    lab.server.add_advert(ME, adverts[ME])
    lab.server.add_advert(ME, adverts[ME])
    other = Site(lab.terms, ME, lab.signers[ME], Disk().store).advertise()
    with pytest.raises(SiteError, match=f"site {ME}, round 1: .*another Advert than the first one"):
        lab.server.add_advert(ME, other)
    lab.advertise(WHO[:4])
    with pytest.raises(SiteError, match=f"site {WHO[4]}, round 1: .*this Advert is late"):
        lab.server.add_advert(WHO[4], adverts[WHO[4]])
    lab.server.add_advert(ME, adverts[ME])


def test_a_state_of_another_job_or_format_or_damaged_is_refused(lab: Federation) -> None:
    lab.advertise(WHO)
    data = lab.disks[ME].data
    server = lab.disks["server"].data
    assert data is not None
    assert server is not None
    with pytest.raises(WireError, match=f"the state stored here is of site '{ME}' in job 'job-1'"):
        Site(lab.terms, PEER, lab.signers[PEER], Disk().store, data)
    state = p.unpack_state(data, sites._State)
    with pytest.raises(HansaError, match="of format 9; this release reads 1"):
        Site(lab.terms, ME, lab.signers[ME], Disk().store, p.pack_state(msgspec.structs.replace(state, format=9)))
    for bad in (b"", data[:-1], data + b"\0", data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        with pytest.raises(ChecksumError, match="damaged"):
            Site(lab.terms, ME, lab.signers[ME], Disk().store, bad)
    with pytest.raises(WireError, match="this is no _State"):
        Site(lab.terms, ME, lab.signers[ME], Disk().store, server)
    lab.terms = terms_for(5, attempt=2)
    with pytest.raises(WireError, match="the server's stored state is another session's"):
        lab.new_server()
