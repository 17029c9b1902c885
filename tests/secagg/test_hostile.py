# SPDX-License-Identifier: Apache-2.0
"""Whatever the bytes, a decoder gives a message or a HansaError, and a refused message leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.errors import HansaError, WireError
from hansa.secagg import protocol as p
from hansa.secagg.server import Server
from hansa.secagg.site import Site
from sums import Disk, Federation, constant, terms_for

KINDS = (p.Advert, p.Roll, p.Shares, p.Inbox, p.Survivors, p.Vote, p.Votes, p.Reveal, p.Terms)


def session() -> tuple[Federation, dict[str, tuple[Callable[[bytes], Any], bytes]]]:
    """Return a session that has run, and for each message who takes it and its true bytes."""
    lab = Federation(terms_for(4))
    who, me = lab.terms.sites, lab.terms.sites[0]
    site, server = lab.site(me), lab.server
    roll = lab.advertise(who)
    lab.share(who, roll)
    inbox = server.inbox(me)
    lab.mask(who, constant(lab.terms))
    survivors = lab.survivors()
    votes = lab.vote(who, survivors)
    lab.reveal(who, votes)
    return lab, {
        "advert": (lambda data: server.add_advert(me, data), site.advertise()),
        "roll": (site.share, roll),
        "shares": (lambda data: server.add_shares(me, data), site.share(roll)),
        "inbox": (site.receive, inbox),
        "survivors": (site.vote, survivors),
        "vote": (lambda data: server.add_vote(me, data), site.vote(survivors)),
        "votes": (site.reveal, votes),
        "reveal": (lambda data: server.add_reveal(me, data), site.reveal(votes)),
        "site's state": (
            lambda data: Site(lab.terms, me, lab.signers[me], Disk().store, data),
            lab.disks[me].data or b"",
        ),
        "server's state": (
            lambda data: Server(lab.terms, lab.signers[me], Disk().store, data),
            lab.disks["server"].data or b"",
        ),
    }


LAB, DOORS = session()
STATES = {name: disk.data for name, disk in LAB.disks.items()}


def taken(door: Callable[[bytes], Any], data: bytes) -> None:
    try:
        door(data)
    except HansaError as error:
        assert error.message  # noqa: PT017 - most are refused, some changes don't matter
    assert {name: disk.data for name, disk in LAB.disks.items()} == STATES


@pytest.mark.parametrize("name", DOORS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_messages_and_states(name: str, data: st.DataObject) -> None:
    door, true = DOORS[name]
    raw = bytearray(true)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["byte", "cut", "double", "insert"]))
        if how == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 40))]
        elif how == "double":
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 200))]
        else:
            raw[at:at] = data.draw(st.binary(max_size=9))
        if not raw:
            break
    taken(door, bytes(raw))


@pytest.mark.parametrize("name", DOORS)
@given(data=st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_bytes_from_anywhere(name: str, data: bytes) -> None:
    taken(DOORS[name][0], data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", [name for name in DOORS if not name.endswith("state")])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_fields_of_other_types_and_values(name: str, data: st.DataObject) -> None:
    door, true = DOORS[name]
    fields = msgspec.msgpack.decode(true)
    field = data.draw(st.sampled_from(sorted(fields)))
    if data.draw(st.booleans()):
        del fields[field]
    else:
        fields[field] = data.draw(JSON)
    taken(door, msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_long_or_too_deep_is_not_read(kind: type[Any]) -> None:
    with pytest.raises(WireError, match="more than 67,108,864 are not read"):
        p.unpack(bytes(p.MAX_BYTES + 1), kind)
    for bad in (b"\x81" * 100_000, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(WireError, match=f"this is no {kind.__name__}"):
            p.unpack(bad, kind)


def test_terms_travel() -> None:
    assert p.unpack(p.pack(LAB.terms), p.Terms) == LAB.terms
    assert p.unpack(p.pack(LAB.terms), p.Terms).digest() == LAB.terms.digest()
