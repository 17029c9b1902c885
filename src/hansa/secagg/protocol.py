# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation (Bonawitz et al. 2017, eprint 2017/281, against a malicious server; graph of SecAgg+, 2020/704).

    site                                            server
    ────                                            ──────
    advertise()          ──Advert──────────────>    add_advert
    share(roll)          <─Roll─────────────────    close_adverts      who takes part, their keys, hence the graph
                         ──Shares──────────────>    add_shares
    receive(inbox)       <─Inbox────────────────    close_shares       who dealt shares, hence the masks
    masked(parts)        ══vector over the ring═>   check_upload, accept
    vote(survivors)      <─Survivors────────────    close_uploads      who is in the sum: fixed, for good
                         ──Vote────────────────>    add_vote
    reveal(votes)        <─Votes────────────────    close_votes        a quorum has signed that set
                         ──Reveal──────────────>    add_reveal
    finish()                                        close_reveals      the masks to take off the sum

What travels is x + PRG(b) ± PRG(s_ij) ..., b being the site's own seed and s_ij what it agreed on with neighbour j.
Pair masks cancel in the sum. Of a site in it, its holders reveal shares of b; of one that dropped out after it dealt
shares, those of its mask key; never both.

**What the integrator does.** It makes the same :class:`Terms` for all (from the job, not from what the server says),
gives each side a ``store`` and what was stored last, and carries bytes over channels that tell who sent them. Both call
``store(state)`` themselves, before the message that depends on it is returned; it must return once the bytes are
durable, in place of the old ones. A site has one session of a job at a time and keeps one state a job, for as long as
the job runs; it holds secrets, so keep it like a private key. Whom to ask is not for the server alone to say, or it may
ask those that work with it: the share of corrupt sites is one of the sites asked.

| before this leaves | this is durable |
|---|---|
| Advert | the secret that all keys of the attempt are derived from, and the advert itself |
| Shares | the roll that they are for |
| the first masked byte | who dealt shares, the shares held, and a digest of the values that are masked |
| Vote | the survivor set, and the signature |
| Reveal | which kind of share was revealed for each peer |
| Roll, Inbox, Survivors, Votes | at the server: the list that was closed |
| the unmasked sum | at the server: the shares revealed |

At the server, what came since the last close is only in memory. After a restart sites send it again, as the same bytes;
masked vectors are spooled by the integrator, who adds them to the sum (``np.add``, in any order), calls ``accept`` for
each that is whole, and after a restart does both again.

**What holds**, for every site that keeps to the protocol, if fewer sites than the terms allow for work with the server:

- the server learns the sum over one set of at least ``quorum`` sites, and nothing else of any of them;
- it can't add sites or change keys: adverts are signed by the identities that the roster lists, and bind the session;
- it can't choose the graph (``graph``), show two survivor sets, or get both secrets of one site;
- no mask covers two vectors: keys belong to one (job, round, attempt) and roll, and a second vector is refused;
- a round whose shares were revealed has no further attempt, as two sums of nearly the same sites differ by one update.

| case | result |
|---|---|
| a phase again with the same input, before or after a restart | the same bytes |
| another roll, list of dealers, or survivor set than before | PrivacyError; the attempt goes on only with the first |
| other values than those masked before, also between the two readings | PrivacyError |
| an advert not signed by its site, of one not asked, or other keys than this site sent | AccessError, PrivacyError |
| a seed asked for where the mask key was revealed, or the other way round | PrivacyError, for ever |
| fewer than quorum, threshold, or three sites, in any phase | PrivacyError at a site, QuorumError at the server |
| a box or share that is malformed or of the wrong length | WireError naming both sites |
| a share that is not as it was dealt | the server does without it, and names both if it has too few |
| a message that is late, of a stranger, a second one that differs, of another session | SiteError, WireError |
| a masked vector of the wrong length or ring | WireError |
| an older round or attempt than the state's | PrivacyError |
| a site that is left out of the survivors | SiteError: its values are not in the sum; nothing of it is revealed |
| too few shares of one site | QuorumError; the sum stays masked, and no part of it is shown |
| a state that is damaged, or of another format | ChecksumError, VersionError |

**Not promised.** A site that takes part can spoil a sum (not learn from it); which one did is told where it can be. The
server sees who takes part and who drops out. A sum can say much about one of few, or about one that it differs from
another round's sum by: differential privacy is for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Protocol, TypeVar

import msgspec

from hansa.errors import AccessError, ChecksumError, HansaError, PrivacyError, VersionError, WireError
from hansa.secagg import graph, keys
from hansa.secagg.ring import Encoding

FORMAT = 1
MAX_BYTES = 64 << 20
"""No message is larger; that of 10,000 sites is not."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Count = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=1 << 20)]
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(max_length=256)]
Credential = Annotated[bytes, msgspec.Meta(max_length=1 << 16)]
Box = Annotated[bytes, msgspec.Meta(max_length=256)]
Digests = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

Store = Callable[[bytes], None]
"""Makes bytes durable in place of those before, and then returns."""


class Checker(Protocol):
    """Tells whose signature something bears: the roster."""

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        """Check that ``site``, as the roster lists it, made ``signature``; AccessError if not."""
        ...


class Signer(Checker, Protocol):
    """A site's identity: its kit."""

    def credential(self) -> bytes:
        """Return what proves who holds the key, such as a certificate."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Return this site's signature of ``data``."""
        ...


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True, tag="secagg-terms"):
    """What all agree on before a session begins; every key and signature is bound to it.

    Attributes:
        job: the job's id.
        round, attempt: from 1. What is tried again is another attempt, with other keys.
        sites: those asked, sorted.
        encoding: the ring, and what is summed.
        minimum: the fewest sites that may be summed, at least three.
        corrupt: the share of the sites asked that may work with the server.
        dropout: the share that may drop out; it counts for sparse graphs only.

    Raises:
        PrivacyError: terms that protect nobody.
    """

    job: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    round: Count
    attempt: Count
    sites: Names
    encoding: Encoding
    minimum: Count = graph.LEAST
    corrupt: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.2
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.1

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(set(self.sites)):
            raise self.refusal("the sites are not in order, or one is there twice")
        if self.minimum < graph.LEAST:
            raise self.refusal(f"a minimum of {self.minimum} sites is below {graph.LEAST}")
        if not (0 <= self.corrupt < 0.5 and 0 <= self.dropout < 0.5):
            raise self.refusal("the shares of corrupt and of dropped sites must be at least 0 and below a half")
        if self.encoding.sites < len(self.sites):
            raise self.refusal(f"the ring is for {self.encoding.sites} sites, and {len(self.sites)} are asked")
        graph.shape(len(self.sites), len(self.sites), self.corrupt, self.dropout, self.minimum)

    def refusal(self, why: str, site: str | None = None) -> PrivacyError:
        """Return the error for what these terms do not allow."""
        return PrivacyError(f"Secure aggregation is refused: {why}.", job=self.job, site=site, round=self.round)

    def malformed(self, why: str, site: str | None = None) -> WireError:
        """Return the error for what somebody sent."""
        return WireError(f"Secure aggregation: {why}.", job=self.job, site=site, round=self.round)

    def digest(self) -> bytes:
        """Return the hash that names this session."""
        return _digest(self)


@lru_cache(maxsize=64)
def _digest(terms: Terms) -> bytes:
    return hashlib.sha256(b"hansa secagg terms v1\0" + msgspec.msgpack.encode(terms)).digest()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels; ``session`` is the digest of the terms."""

    session: Hash


class Advert(Message, frozen=True, tag="secagg-advert"):
    """A site's public keys for one session.

    Attributes:
        site: whose.
        channel, mask: X25519 keys, for the boxes that shares travel in and for pair masks.
        commitment: the hash of the self-mask seed.
        credential: what proves who signed.
        signature: of all the others.
    """

    site: Name
    channel: Hash
    mask: Hash
    commitment: Hash
    credential: Credential
    signature: Signature = b""

    def content(self) -> bytes:
        """Return what is signed."""
        return b"hansa secagg advert v1\0" + msgspec.msgpack.encode(
            (self.session, self.site, self.channel, self.mask, self.commitment)
        )


class Roll(Message, frozen=True, tag="secagg-roll"):
    """The sites that take part, by name."""

    adverts: tuple[Advert, ...]


class Shares(Message, frozen=True, tag="secagg-shares"):
    """What a site deals.

    Attributes:
        site: the dealer.
        boxes: neighbour -> its shares of mask key and seed, sealed for it.
        digests: holder -> the hashes of both, by which the server knows them again. Shares can't be guessed.
    """

    site: Name
    boxes: dict[Name, Box]
    digests: dict[Name, Digests]


class Inbox(Message, frozen=True, tag="secagg-inbox"):
    """What was dealt to one site: who dealt at all, and the boxes of its neighbours among them."""

    dealers: Names
    boxes: dict[Name, Box]


class Survivors(Message, frozen=True, tag="secagg-survivors"):
    """The sites whose vectors are in the sum."""

    sites: Names


class Vote(Message, frozen=True, tag="secagg-vote"):
    """A survivor's signature of the survivor set."""

    site: Name
    signature: Signature


class Votes(Message, frozen=True, tag="secagg-votes"):
    """Those signatures, by site."""

    signatures: dict[Name, Signature]


class Reveal(Message, frozen=True, tag="secagg-reveal"):
    """A survivor's shares: of the seed of each survivor that it holds for, of the mask key of each that dropped out."""

    site: Name
    shares: dict[Name, Annotated[bytes, msgspec.Meta(max_length=64)]]


M = TypeVar("M")


def pack(value: msgspec.Struct) -> bytes:
    """Return the bytes of a message or state."""
    return msgspec.msgpack.encode(value)


def pack_state(state: msgspec.Struct) -> bytes:
    """Return the bytes of a state, with a digest by which damage is found."""
    body = pack(state)
    return hashlib.sha256(body).digest() + body


def unpack_state(data: bytes, kind: type[M]) -> M:
    """Read a state. Whoever stored it had checked what is in it, so only damage is looked for; any size is read.

    Raises:
        ChecksumError: it is damaged; WireError: it is none of this kind; VersionError: it is of another format.
    """
    body = data[32:]
    if hashlib.sha256(body).digest() != data[:32]:
        raise ChecksumError(
            "A stored state of secure aggregation is damaged. Delete it once this round is over, not before: it said "
            "what had been revealed."
        )
    found = _decoded(body, _Format).format
    if found != FORMAT:
        raise VersionError(f"This state of secure aggregation is of format {found}; this release reads {FORMAT}.")
    return _decoded(body, kind)


class _Format(msgspec.Struct):
    format: int


def unpack(data: bytes, kind: type[M]) -> M:
    """Read a message.

    Raises:
        WireError: the bytes are none of this kind, or more than ``MAX_BYTES``.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"Secure aggregation: a message of {len(data):,} bytes; more than {MAX_BYTES:,} are not read.")
    return _decoded(data, kind)


def _decoded(data: bytes, kind: type[M]) -> M:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"Secure aggregation: this is no {kind.__name__}: {str(error)[:200]}.") from None


def receive(terms: Terms, data: bytes, kind: type[M], sender: str | None = None) -> M:
    """Read a message of this session; ``sender`` is who the channel says sent it.

    Raises:
        WireError: it is none, of another session, or in another's name.
    """
    try:
        message = unpack(data, kind)
    except HansaError as error:
        error.site, error.round, error.job = sender, terms.round, terms.job
        raise
    assert isinstance(message, Message), "only messages travel"
    if message.session != terms.digest():
        raise terms.malformed(
            f"a {kind.__name__} of another session came; here it is attempt {terms.attempt}", site=sender
        )
    named = getattr(message, "site", sender)
    if named != sender:
        raise terms.malformed(f"a {kind.__name__} in the name of {named!r}", site=sender)
    return message


@dataclass(frozen=True)
class Session:
    """What follows from the terms and the roll, the same for all.

    Attributes:
        terms: what was agreed on.
        adverts: site -> its public keys, in the order of names.
    """

    terms: Terms
    adverts: Mapping[str, Advert]

    @classmethod
    def of(cls, terms: Terms, roll: Roll, checker: Checker) -> Session:
        """Check a roll and return its session.

        Raises:
            AccessError: an advert was not signed by the site that it names.
            PrivacyError: a site was not asked, is there twice, or shares a key with another; or they are too few.
            WireError: an advert is of another session.
        """
        names = [advert.site for advert in roll.adverts]
        if names != sorted(set(names)):
            raise terms.refusal("the roll is not in order, or a site is there twice")
        for advert in roll.adverts:
            check_advert(terms, advert, checker)
        public = [key for advert in roll.adverts for key in (advert.channel, advert.mask)]
        if len(set(public)) < len(public):
            raise terms.refusal("two public keys of the roll are the same")
        session = cls.known(terms, roll)
        assert session.shape.quorum <= len(names), "a shape is refused to fewer"
        return session

    @classmethod
    def known(cls, terms: Terms, roll: Roll) -> Session:
        """Return the session of a roll that was checked before it was stored."""
        return cls(terms, {advert.site: advert for advert in roll.adverts})

    @cached_property
    def digest(self) -> bytes:
        """The hash of the terms and of all public keys: the context of keys, and what the graph follows from."""
        content = b"".join(hashlib.sha256(advert.content()).digest() for advert in self.adverts.values())
        return hashlib.sha256(b"hansa secagg roll v1\0" + self.terms.digest() + content).digest()

    @cached_property
    def shape(self) -> graph.Shape:
        """The graph's numbers; PrivacyError if so few take part that none protect them."""
        terms = self.terms
        try:
            return graph.shape(len(self.adverts), len(terms.sites), terms.corrupt, terms.dropout, terms.minimum)
        except PrivacyError as error:
            error.round, error.job = terms.round, terms.job
            raise

    @cached_property
    def _graph(self) -> graph.Graph:
        return graph.Graph(list(self.adverts), self.digest, self.shape.degree)

    def neighbours(self, site: str) -> tuple[str, ...]:
        """Return whom a site shares masks with, sorted."""
        return self._graph.neighbours(site)

    def holders(self, site: str) -> tuple[str, ...]:
        """Return who holds shares of a site's secrets, in the order of the shares' numbers."""
        return tuple(sorted((site, *self.neighbours(site))))

    def pair_mask(self, private: keys.PrivateKey, mine: str, peer: str) -> tuple[keys.Keystream, int]:
        """Return the mask of two sites, and the sign with which ``mine`` adds it; ``private`` is mine's mask key."""
        context = self.digest + msgspec.msgpack.encode(sorted((mine, peer)))
        secret = self._agreed(private, peer, self.adverts[peer].mask, "pair mask", context)
        return keys.Keystream(secret, "pair stream", context), 1 if mine < peer else -1

    def self_mask(self, seed: bytes, site: str) -> keys.Keystream:
        """Return a site's own mask."""
        return keys.Keystream(seed, "self mask", self.digest + site.encode())

    def box_key(self, private: keys.PrivateKey, peer: str, sender: str, receiver: str) -> bytes:
        """Return the key of the box from ``sender`` to ``receiver``, one of whom holds ``private``."""
        context = self.digest + msgspec.msgpack.encode((sender, receiver))
        return self._agreed(private, peer, self.adverts[peer].channel, "box", context)

    def _agreed(self, private: keys.PrivateKey, peer: str, public: bytes, purpose: str, context: bytes) -> bytes:
        try:
            return keys.agree(private, public, purpose, context)
        except WireError as error:
            raise self.terms.malformed("its public key is of low order: anybody could agree with it", peer) from error

    def ballot(self, dealers: Sequence[str], survivors: Sequence[str]) -> bytes:
        """Return what survivors sign."""
        lists = msgspec.msgpack.encode((list(dealers), list(survivors)))
        return b"hansa secagg survivors v1\0" + self.digest + hashlib.sha256(lists).digest()


def check_advert(terms: Terms, advert: Advert, checker: Checker) -> None:
    """Check one advert: the session, that its site was asked, and the signature.

    Raises:
        PrivacyError, WireError, AccessError: as of :meth:`Session.of`.
    """
    if advert.session != terms.digest():
        raise terms.malformed("an advert is of another session", advert.site)
    if advert.site not in terms.sites:
        raise terms.refusal("the site was not asked", advert.site)
    try:
        checker.check(advert.site, advert.credential, advert.content(), advert.signature)
    except AccessError as error:
        raise AccessError(
            f"The keys were not signed by the site that they are said to be of: {error.message}",
            job=terms.job,
            site=advert.site,
            round=terms.round,
        ) from error


def check_vote(session: Session, checker: Checker, voter: str, ballot: bytes, signature: bytes) -> None:
    """Check a survivor's signature.

    Raises:
        AccessError: it is not that site's, or is for another survivor set.
    """
    try:
        checker.check(voter, session.adverts[voter].credential, ballot, signature)
    except AccessError as error:
        raise AccessError(
            f"The vote is not this site's for this survivor set: {error.message}",
            job=session.terms.job,
            site=voter,
            round=session.terms.round,
        ) from error


def commitment(terms: Terms, site: str, seed: bytes) -> bytes:
    """Return the hash by which a seed is known again."""
    return hashlib.sha256(b"hansa secagg seed v1\0" + terms.digest() + site.encode() + b"\0" + seed).digest()


def share_digest(share: bytes) -> bytes:
    """Return the hash by which a share is known again."""
    return hashlib.sha256(b"hansa secagg share v1\0" + share).digest()
