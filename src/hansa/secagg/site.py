# SPDX-License-Identifier: Apache-2.0
"""A site's side of secure aggregation; ``protocol`` has the order of calls and the table of cases.

All keys and coefficients of an attempt are derived from one random root in the state, so every phase gives the same
bytes again; signatures, which differ each time, are kept. With :meth:`Site.finish` the root is forgotten: what is left
says only what was revealed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from typing import Literal

import blake3
import msgspec
import numpy as np

from hansa.core.lazy import BLOCK, Array, Leaf, Memo
from hansa.core.tree import Parts
from hansa.errors import HansaError, SiteError, WireError
from hansa.secagg import keys, shamir
from hansa.secagg import protocol as p
from hansa.secagg.ring import Vector

Kind = Literal["key", "seed"]


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="secagg-site"):
    """What is durable of an attempt, by phase; None for what has not been.

    Attributes:
        root: what all secrets are derived from; empty once the attempt is over.
        held: dealer -> its shares of mask key and seed.
        values: the digest of what was masked.
        revealed: peer -> the kind of share that was given away.
    """

    format: int
    terms: p.Terms
    site: p.Name
    root: bytes
    advert: p.Advert | None = None
    roll: p.Roll | None = None
    dealers: p.Names | None = None
    held: dict[str, tuple[bytes, bytes]] = {}
    values: bytes | None = None
    survivors: p.Names | None = None
    vote: bytes | None = None
    revealed: dict[str, Kind] = {}


class Site:
    """One site in one session; not for two threads at once.

    Args:
        terms: what the job says; never what only the server says.
        name: this site's.
        signer: its identity, and how it checks others.
        store: makes the state durable; see ``protocol``.
        stored: what was stored last for this job, of this session or one before.

    Raises:
        PrivacyError: the stored state is of a later session, or of an attempt whose shares were revealed already.
        ChecksumError, VersionError, WireError: the stored state can't be read, or is another job's or site's.
    """

    def __init__(
        self, terms: p.Terms, name: str, signer: p.Signer, store: p.Store, stored: bytes | None = None
    ) -> None:
        if name not in terms.sites:
            raise terms.refusal("the site was not asked", name)
        self._terms, self._name, self._signer, self._store = terms, name, signer, store
        self._session: p.Session | None = None
        last = None if stored is None else self._read(stored)
        if last is not None and last.terms == terms:
            self._state = last
        else:
            if last is not None:
                self._succeed(last)
            self._state = _State(p.FORMAT, terms, name, secrets.token_bytes(keys.KEY_BYTES))
        if self._state.roll is not None:
            self._session = p.Session.known(terms, self._state.roll)

    def _of(self, roll: p.Roll) -> p.Session:
        try:
            return p.Session.of(self._terms, roll, self._signer)
        except HansaError as error:
            error.site = error.site or self._name
            raise

    def _read(self, stored: bytes) -> _State:
        last = p.unpack_state(stored, _State)
        if (last.terms.job, last.site) != (self._terms.job, self._name):
            raise self._malformed(f"the state stored here is of site {last.site!r} in job {last.terms.job!r}")
        return last

    def _succeed(self, last: _State) -> None:
        here, there = self._terms, last.terms
        if (there.round, there.attempt) >= (here.round, here.attempt):
            raise self._refusal(
                f"this site is at attempt {there.attempt} of round {there.round}, with other terms or later; attempt "
                f"{here.attempt} of round {here.round} does not come after it"
            )
        if there.round == here.round and last.revealed:
            raise self._refusal(
                f"this site revealed shares in attempt {there.attempt}, so its values may be in a sum already, and two "
                "sums of nearly the same sites differ by one site's values. Go on with the next round"
            )

    def _refusal(self, why: str) -> Exception:
        return self._terms.refusal(why, self._name)

    def _malformed(self, why: str) -> Exception:
        return self._terms.malformed(why, self._name)

    def _require(self, there: int, needed: int, what: str) -> None:
        if there < needed:
            raise self._refusal(f"{there} sites {what}, {needed} are needed")

    def _listed(self, names: Collection[str], among: Collection[str], what: str) -> None:
        """Check that a list of sites is in order, without doubles, and part of another."""
        if list(names) != sorted(set(names)):
            raise self._malformed(f"the {what} are not in order, or one is there twice")
        strangers = set(names) - set(among)
        if strangers:
            raise self._malformed(f"among the {what} is {min(strangers)!r}, who can't be")

    def _keep(self, **changes: object) -> None:
        """Make a change durable; only then does it count."""
        state: _State = msgspec.structs.replace(self._state, **changes)
        self._store(p.pack_state(state))
        self._state = state

    def _secret(self, purpose: str) -> bytes:
        if not self._state.root:
            raise self._refusal("this attempt is over, and its keys are gone")
        return keys.derive(self._state.root, purpose, self._terms.digest())

    def _key(self, purpose: str) -> keys.PrivateKey:
        return keys.private_key(self._secret(purpose))

    def _joined(self) -> p.Session:
        if self._session is None:
            raise self._refusal("the roll of this session has not come yet")
        return self._session

    def advertise(self) -> bytes:
        """Return the Advert."""
        if self._state.advert is None:
            unsigned = p.Advert(
                self._terms.digest(),
                self._name,
                keys.public_bytes(self._key("channel key")),
                keys.public_bytes(self._key("mask key")),
                p.commitment(self._terms, self._name, self._secret("seed")),
                self._signer.credential(),
            )
            signature = self._signer.sign(unsigned.content())
            self._keep(advert=msgspec.structs.replace(unsigned, signature=signature))
        assert self._state.advert is not None
        return p.pack(self._state.advert)

    def share(self, roll: bytes) -> bytes:
        """Return the Shares for a Roll.

        Raises:
            WireError, AccessError, PrivacyError: the roll is malformed, has an advert that was not signed by its site,
                lacks this site's own, is too short, or is another one than before.
        """
        self._secret("seed")
        message = p.receive(self._terms, roll, p.Roll, self._name)
        session = self._of(message)
        mine = session.adverts.get(self._name)
        if mine is None or self._state.advert is None or mine.content() != self._state.advert.content():
            raise self._refusal("the roll does not have this site's own keys")
        if self._session is not None and self._session.digest != session.digest:
            raise self._refusal("this is another roll than the first one of this attempt")
        if self._session is None:
            self._keep(roll=message)
            self._session = session
        dealt = self._dealt(session)
        channel = self._key("channel key")
        boxes = {
            holder: keys.seal(session.box_key(channel, holder, self._name, holder), key + seed)
            for holder, (key, seed) in dealt.items()
            if holder != self._name
        }
        digests = {holder: p.share_digest(key) + p.share_digest(seed) for holder, (key, seed) in dealt.items()}
        return p.pack(p.Shares(self._terms.digest(), self._name, boxes, digests))

    def _dealt(self, session: p.Session) -> dict[str, tuple[bytes, bytes]]:
        """Return each holder's shares of this site's mask key and seed."""
        holders = session.holders(self._name)
        split = [
            shamir.split(
                self._secret(what),
                session.shape.threshold,
                len(holders),
                keys.derive(self._secret(f"coefficients of the {what}"), "shamir", session.digest),
            )
            for what in ("mask key", "seed")
        ]
        return dict(zip(holders, zip(*split, strict=True), strict=True))

    def receive(self, inbox: bytes) -> None:
        """Take the shares that others dealt.

        Raises:
            WireError: a box is missing, surplus, altered, or holds no shares; the message names its dealer.
            PrivacyError: too few dealt, or others than those that were said to before.
        """
        session = self._joined()
        message = p.receive(self._terms, inbox, p.Inbox, self._name)
        if self._state.dealers is not None:
            if message.dealers != self._state.dealers:
                raise self._refusal("this is another list of dealers than the first one of this attempt")
            return
        self._listed(message.dealers, session.adverts, "dealers")
        if self._name not in message.dealers:
            raise self._left_out("dealt shares")
        self._require(len(message.dealers), session.shape.quorum, "dealt shares")
        expected = set(session.neighbours(self._name)) & set(message.dealers)
        for odd in sorted(expected ^ message.boxes.keys()):
            raise self._malformed(f"the box of {odd!r} is {'missing' if odd in expected else 'not for this site'}")
        self._require(len(expected) + 1, session.shape.threshold, "that hold shares of this one dealt any")
        channel = self._key("channel key")
        held = {dealer: self._unbox(session, channel, dealer, box) for dealer, box in message.boxes.items()}
        held[self._name] = self._dealt(session)[self._name]
        self._keep(dealers=message.dealers, held=held)

    def _unbox(self, session: p.Session, channel: keys.PrivateKey, dealer: str, box: bytes) -> tuple[bytes, bytes]:
        key = session.box_key(channel, dealer, dealer, self._name)
        try:
            content = keys.unseal(key, box)
        except WireError as error:
            raise self._malformed(f"the shares that {dealer!r} dealt can't be used: {error.message}") from error
        shares = content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]
        for wrong in filter(None, map(shamir.problem, shares)):
            raise self._malformed(f"the shares that {dealer!r} dealt can't be used: {wrong}")
        return shares

    def _left_out(self, what: str) -> SiteError:
        return SiteError(
            f"Secure aggregation goes on without this site: it is not among those that {what}. Nothing of it is in the "
            "sum; wait for the next round.",
            job=self._terms.job,
            site=self._name,
            round=self._terms.round,
        )

    def masked(self, parts: Parts) -> Leaf:
        """Return the masked vector, ``terms.encoding.size`` elements that are made when they are read.

        The values are read once before the first byte leaves, to check and to fix them, and once for each reading.

        Args:
            parts: what is summed (:func:`~.ring.summands`); leaves may be lazy.

        Raises:
            NonFiniteError, PrivacyError: a value is not finite or outside its range, or the values are others than
                those masked before; the latter also while the leaf is read.
            WireError: the parts are not those that the ring is for.
        """
        session, terms = self._joined(), self._terms
        if self._state.dealers is None:
            raise self._refusal("nobody's shares have come yet, so there is nobody to mask with")
        rounding = keys.Keystream(self._secret("rounding"), "stochastic rounding", terms.digest())
        vector = Vector(terms.encoding, parts, self._name, terms.round, rounding)
        digests = _digests(vector)
        values = hashlib.sha256(b"".join(digests)).digest()
        if self._state.values is None:
            self._keep(values=values)
        if self._state.values != values:
            raise self._refusal(
                "these are other values than those that were masked before; two vectors under one mask would show how "
                "they differ. Send the first ones again, or wait for the next round"
            )
        masks = self._masks(session)

        def block(start: int) -> Array:
            out = np.empty(min(BLOCK, terms.encoding.size - start), terms.encoding.dtype)
            vector.encode(start, out)
            if _digest(out) != digests[start // BLOCK]:
                raise self._refusal("the values changed while they were sent")
            masks.apply(start, out)
            return out

        def read(start: int, stop: int, memo: Memo) -> Array:
            first = start - start % BLOCK
            found = [block(at) for at in range(first, stop, BLOCK)] or [np.empty(0, terms.encoding.dtype)]
            values = found[0] if len(found) == 1 else np.concatenate(found)
            return values[start - first : stop - first]

        return Leaf((terms.encoding.size,), terms.encoding.dtype, read)

    def _masks(self, session: p.Session) -> keys.Masks:
        private = self._key("mask key")
        peers = sorted(self._state.held.keys() - {self._name})
        pairs = [session.pair_mask(private, self._name, peer) for peer in peers]
        return keys.Masks(
            self._terms.encoding.dtype, [(session.self_mask(self._secret("seed"), self._name), 1), *pairs]
        )

    def vote(self, survivors: bytes) -> bytes:
        """Return the Vote for the Survivors.

        Raises:
            PrivacyError: they are too few, others than before, or this site has not masked anything.
            SiteError: this site is not among them.
            WireError: they are malformed.
        """
        session = self._joined()
        self._secret("seed")
        message = p.receive(self._terms, survivors, p.Survivors, self._name)
        if self._state.dealers is None or self._state.values is None:
            raise self._refusal("a survivor set came before this site had masked anything")
        if self._state.survivors is not None and message.sites != self._state.survivors:
            raise self._refusal("this is another survivor set than the first one of this attempt")
        if self._state.vote is None:
            self._listed(message.sites, self._state.dealers, "survivors")
            if self._name not in message.sites:
                raise self._left_out("are summed")
            self._require(len(message.sites), session.shape.quorum, "survive")
            signature = self._signer.sign(session.ballot(self._state.dealers, message.sites))
            self._keep(survivors=message.sites, vote=signature)
        assert self._state.vote is not None
        return p.pack(p.Vote(self._terms.digest(), self._name, self._state.vote))

    def reveal(self, votes: bytes) -> bytes:
        """Return the Reveal for the Votes.

        Raises:
            AccessError: a vote was not signed by the site that it names, or is for another survivor set.
            PrivacyError: they are too few, or the other kind of share was revealed already.
            WireError: they are malformed.
        """
        session, state = self._joined(), self._state
        self._secret("seed")
        message = p.receive(self._terms, votes, p.Votes, self._name)
        if state.survivors is None or state.dealers is None:
            raise self._refusal("shares are asked for before this site has voted on a survivor set")
        self._listed(sorted(message.signatures), state.survivors, "voters")
        self._require(len(message.signatures), session.shape.quorum, "signed the survivor set")
        ballot = session.ballot(state.dealers, state.survivors)
        for voter, signature in message.signatures.items():
            p.check_vote(session, self._signer, voter, ballot, signature)
        kinds: dict[str, Kind] = {peer: "seed" if peer in set(state.survivors) else "key" for peer in state.held}
        for peer, kind in kinds.items():
            if state.revealed.get(peer, kind) != kind:
                raise self._refusal(
                    f"the {kind} share of {peer!r} is asked for, and its {state.revealed[peer]} share was revealed; "
                    "who has both can read what that site sent"
                )
        if kinds != state.revealed:
            self._keep(revealed=kinds)
        shares = {peer: self._state.held[peer][0 if kind == "key" else 1] for peer, kind in sorted(kinds.items())}
        return p.pack(p.Reveal(self._terms.digest(), self._name, shares))

    def finish(self) -> None:
        """Forget all secrets of this attempt: the server has the sum, or the attempt was given up.

        Not before that: a server that restarts asks for the shares again, and they are gone.
        """
        if self._state.root:
            self._keep(root=b"", held={}, values=None)


def _digests(vector: Vector) -> list[bytes]:
    size, buffer = vector.encoding.size, np.empty(BLOCK, vector.encoding.dtype)
    found = []
    for start in range(0, size, BLOCK):
        block = buffer[: min(BLOCK, size - start)]
        vector.encode(start, block)
        found.append(_digest(block))
    return found


def _digest(block: Array) -> bytes:
    """Return a block's digest: BLAKE3, as SHA-256 takes longer than the masks of four neighbours."""
    return blake3.blake3(block.data.cast("B")).digest()
