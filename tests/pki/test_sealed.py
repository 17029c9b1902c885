# SPDX-License-Identifier: Apache-2.0
"""Sealed messages: what one site seals another opens, and nothing else is opened."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from hansa.core import tree as trees
from hansa.core import wire
from hansa.core.values import Update
from hansa.errors import AccessError, HansaError, WireError
from hansa.pki import sealed
from hansa.pki.authority import Authority
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.pki.provision import provision
from hansa.pki.sealed import Place

PLACE = Place("a" * 64, "job", 3)
SEGMENT = trees.BLOCK - 16
MARK = b"the quick brown fox of a model that nobody else may see"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return provision(tmp_path_factory.mktemp("fed") / "fed", "lab", "127.0.0.1:8470", ["a", "b", "c"], ["ana"])


@pytest.fixture(scope="module")
def who(made) -> dict[str, Identities]:
    return {site: Identities(Kit(folder)) for site, folder in made.sites.items()}


class Sealed:
    """A message from a to b in a file, with b's key."""

    def __init__(self, folder: Path, who, contents: bytes) -> None:
        self.who, self.contents = who, contents
        self.key = sealed.new_key()
        self.address = sealed.address(self.key, PLACE, "b", who["b"])
        self.path, self.out = folder / "sealed.hansa", folder / "opened.hansa"
        (folder / "contents").write_bytes(contents)
        to = sealed.read_address(self.address, PLACE, "b", who["a"])
        sealed.seal(folder / "contents", self.path, to, "a", ("c", "a"), who["a"])

    def open(self, key=None, place=PLACE, sender="a", recipient="b") -> bytes:
        key = key or self.key
        self.trail = sealed.unseal(self.path, self.out, key, place, sender, recipient, self.who[recipient])
        return self.out.read_bytes()

    def rewrite(self, change) -> None:
        """Write the file anew with other parts, all of Hansa's own checksums right again."""
        with self.path.open("rb") as file:
            update = wire.read_update(file)
        parts = {part: {name: np.array(leaf) for name, leaf in tree.items()} for part, tree in update.parts.items()}
        change(parts)
        wire.spool(Update("a", PLACE.round, 0, parts, 1.0, {}), self.path)

    def refused(self, kind: type[HansaError], words: str, **how) -> None:
        with pytest.raises(kind, match=words):
            self.open(**how)
        assert not list(self.out.parent.glob("opened*")), "nothing of it is left"


@pytest.fixture
def message(tmp_path, who):
    return Sealed(tmp_path, who, MARK * 20_000)


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT])
def test_what_was_sealed_is_opened(tmp_path, who, size):
    contents = np.random.default_rng(size).bytes(size)
    message = Sealed(tmp_path, who, contents)
    assert message.open() == contents
    assert message.trail == ("c", "a")


def test_its_file_is_that_of_an_update_and_shows_nothing(message):
    data = message.path.read_bytes()
    assert not [at for at in range(0, len(MARK) - 8, 8) if MARK[at : at + 8] in data]
    assert (wire.Spooled(message.path).header.site, wire.Spooled(message.path).header.round) == ("a", 3)
    assert wire.cuts(message.path)[-1] == len(data)


def test_two_seals_of_the_same_share_no_segment(tmp_path, who, message):
    other = tmp_path / "other"
    sealed.seal(
        tmp_path / "contents", other, sealed.read_address(message.address, PLACE, "b", who["a"]), "a", ("a",), who["a"]
    )
    bodies = [dict(wire.Spooled(path).parts["message"])["message"] for path in (message.path, other)]
    assert (bodies[0] == bodies[1]).mean() < 0.01


@pytest.mark.parametrize("place", [Place("b" * 64, "job", 3), Place("a" * 64, "base", 3), Place("a" * 64, "job", 4)])
def test_a_message_of_another_job_course_or_round_is_refused(message, place):
    message.refused(AccessError, "from 'a' to 'b', for round 3 of 'job'; due is", place=place)


def test_a_message_to_another_or_from_another_is_refused(message):
    message.refused(AccessError, "due is one from 'a' to 'c'", recipient="c")
    message.refused(AccessError, "due is one from 'c' to 'b'", sender="c")


def test_a_message_to_an_earlier_key_is_refused(message):
    message.refused(AccessError, "an earlier key", key=sealed.new_key())


def flip(part, at):
    def change(parts):
        parts[part][part][at] ^= 1

    return change


def swap(parts):
    body = parts["message"]["message"]
    first = body[: trees.BLOCK].copy()
    body[: trees.BLOCK] = body[trees.BLOCK : 2 * trees.BLOCK]
    body[trees.BLOCK : 2 * trees.BLOCK] = first


def repeat(parts):
    body = parts["message"]["message"]
    body[trees.BLOCK : 2 * trees.BLOCK] = body[: trees.BLOCK]


def cut(parts):
    parts["message"]["message"] = parts["message"]["message"][: -trees.BLOCK]


def lengthen(parts):
    body = parts["message"]["message"]
    parts["message"]["message"] = np.concatenate([body, body[: trees.BLOCK]])


@pytest.mark.parametrize(
    "change", [flip("message", 0), flip("message", -1), flip("message", trees.BLOCK), swap, repeat, cut, lengthen]
)
def test_an_altered_body_is_refused(message, change):
    message.rewrite(change)
    message.refused(WireError, "altered on its way")


def test_every_byte_of_the_head_counts(tmp_path, who):
    message = Sealed(tmp_path, who, MARK)
    with message.path.open("rb") as file:
        size = wire.read_update(file).parts["head"]["head"].size
    for at in range(size):
        message.rewrite(flip("head", at))
        with pytest.raises((AccessError, WireError)):
            message.open()
        message.rewrite(flip("head", at))
    assert message.open() == message.contents


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"head": {"head": np.zeros(9, np.uint8)}},
        {"head": {"head": np.zeros(9, np.uint8)}, "message": {"message": np.zeros(99, np.float32)}},
        {"head": {"head": np.zeros(0, np.uint8)}, "message": {"message": np.zeros(99, np.uint8)}},
        {"head": {"head": np.zeros(sealed.MAX_BYTES + 1, np.uint8)}, "message": {"message": np.zeros(99, np.uint8)}},
        {"head": {"head": np.zeros(9, np.uint8)}, "message": {"message": np.zeros(99, np.uint8)}},
        {"delta": {"w": np.zeros(9, np.float32)}},
    ],
)
def test_what_is_no_message_is_refused(message, parts):
    wire.spool(Update("a", 3, 0, parts, 1.0, {}), message.path)
    message.refused(WireError, "no sealed message|no head of")


def head_of(message) -> sealed.Head:
    with message.path.open("rb") as file:
        return msgspec.msgpack.decode(wire.read_update(file).parts["head"]["head"].tobytes(), type=sealed.Head)


def test_a_site_can_not_pass_anothers_message_off_as_its_own(message, who):
    """Not even with a head that it has signed itself: the sender is in what the content key was wrapped for."""
    head = msgspec.structs.replace(head_of(message), sender="c", credential=who["c"].credential())
    signed = msgspec.msgpack.encode(sealed._signed(head, who["c"]))

    def change(parts):
        parts["head"]["head"] = np.frombuffer(signed, np.uint8)

    message.rewrite(change)
    message.refused(WireError, "altered on its way", sender="c")


def test_a_head_that_another_site_signed_is_refused(message, who):
    head = sealed._signed(msgspec.structs.replace(head_of(message), credential=who["c"].credential()), who["c"])

    def change(parts):
        parts["head"]["head"] = np.frombuffer(msgspec.msgpack.encode(head), np.uint8)

    message.rewrite(change)
    message.refused(AccessError, "that of site/c, not of site/a")


def test_an_address_is_its_sites_own(message, who):
    forged = sealed._signed(sealed.Address(PLACE, "b", bytes(31) + b"\x09", who["c"].credential()), who["c"])
    with pytest.raises(AccessError, match="not of site/b"):
        sealed.read_address(msgspec.msgpack.encode(forged), PLACE, "b", who["a"])
    for place, site in ((Place("b" * 64, "job", 3), "b"), (Place("a" * 64, "job", 2), "b"), (PLACE, "c")):
        with pytest.raises(AccessError, match="Nothing was sealed"):
            sealed.read_address(message.address, place, site, who["a"])
    for at in range(len(message.address)):
        altered = bytearray(message.address)
        altered[at] ^= 1
        with pytest.raises((AccessError, WireError)):
            sealed.read_address(bytes(altered), PLACE, "b", who["a"])


def test_a_key_of_low_order_is_refused(tmp_path, message, who):
    weak = sealed._signed(sealed.Address(PLACE, "b", bytes(32), who["b"].credential()), who["b"])
    to = sealed.read_address(msgspec.msgpack.encode(weak), PLACE, "b", who["a"])
    with pytest.raises(WireError, match="can't be sealed with"):
        sealed.seal(tmp_path / "contents", tmp_path / "out", to, "a", ("a",), who["a"])


def test_a_revoked_sender_is_refused(tmp_path):
    made = provision(tmp_path / "fed", "lab", "127.0.0.1:8470", ["a", "b"], ["ana"])
    who = {site: Identities(Kit(folder)) for site, folder in made.sites.items()}
    message = Sealed(tmp_path, who, MARK)
    authority = Authority(made.authority)
    authority.revoke("site/a", "lost")
    Kit(made.sites["b"]).update_roster(authority.roster.data)
    message.refused(AccessError, "was revoked")
