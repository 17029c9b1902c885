# SPDX-License-Identifier: Apache-2.0
"""The server's side of secure aggregation; ``protocol`` has the order of calls and the table of cases.

Each phase is open until it is closed, and closed for good: what is closed is durable before it is told to anybody, and
closing again gives the same. What came to an open phase is in memory only. Messages are checked when they come, so one
that is refused is refused by name and spoils nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from hansa.errors import PrivacyError, QuorumError, SiteError, WireError
from hansa.secagg import keys, shamir
from hansa.secagg import protocol as p


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="secagg-server"):
    """What is durable, by phase; None for what has not been closed."""

    format: int
    terms: p.Terms
    roll: p.Roll | None = None
    shares: dict[str, p.Shares] | None = None
    survivors: p.Names | None = None
    votes: p.Votes | None = None
    reveals: dict[str, p.Reveal] | None = None


S = TypeVar("S", p.Advert, p.Shares, p.Vote, p.Reveal)


class Server:
    """The server in one session; not for two threads at once.

    Args:
        terms: what the job says.
        checker: whose signatures count.
        store: makes the state durable; see ``protocol``. It holds no secret of a site before shares are revealed.
        stored: what was stored last for this session.

    Raises:
        ChecksumError, VersionError, WireError: the stored state can't be read, or is another session's.
    """

    def __init__(self, terms: p.Terms, checker: p.Checker, store: p.Store, stored: bytes | None = None) -> None:
        self._terms, self._checker, self._store = terms, checker, store
        self._state = _State(p.FORMAT, terms) if stored is None else self._read(stored)
        self._adverts: dict[str, p.Advert] = {}
        self._shares: dict[str, p.Shares] = {}
        self._accepted: set[str] = set()
        self._votes: dict[str, p.Vote] = {}
        self._reveals: dict[str, p.Reveal] = {}
        self._session: p.Session | None = None
        if self._state.roll is not None:
            self._session = p.Session.known(terms, self._state.roll)

    def _read(self, stored: bytes) -> _State:
        state = p.unpack_state(stored, _State)
        if state.terms != self._terms:
            raise self._terms.malformed("the server's stored state is another session's")
        return state

    def _keep(self, **changes: object) -> None:
        state: _State = msgspec.structs.replace(self._state, **changes)
        self._store(p.pack_state(state))
        self._state = state

    def _refused(self, site: str, why: str) -> SiteError:
        return SiteError(f"Secure aggregation: {why}.", job=self._terms.job, site=site, round=self._terms.round)

    def _too_few(self, why: str) -> QuorumError:
        return QuorumError(
            f"Secure aggregation: {why}. Nothing of this attempt is revealed; go on with another.",
            job=self._terms.job,
            round=self._terms.round,
        )

    def _open(self, before: Any, what: str) -> p.Session:
        if self._session is None or before is None:
            raise self._terms.malformed(f"{what} before the phase before it was closed")
        return self._session

    def _take(self, held: dict[str, S], closed: Mapping[str, S] | None, site: str, message: S) -> bool:
        """Say whether a message is news: neither there already, nor another one, nor late."""
        what = type(message).__name__
        known = (held if closed is None else closed).get(site)
        if known is not None and known != message:
            raise self._refused(site, f"this is another {what} than the first one; the first one counts")
        if known is None and closed is not None:
            raise self._refused(site, f"this {what} is late: the phase is closed")
        return known is None

    # advertise

    def add_advert(self, site: str, data: bytes) -> None:
        """Take a site's Advert.

        Raises:
            WireError, AccessError, PrivacyError, SiteError: it is malformed, not signed by that site, or late.
        """
        message = p.receive(self._terms, data, p.Advert, site)
        roll = self._state.roll
        closed = None if roll is None else {advert.site: advert for advert in roll.adverts}
        if self._take(self._adverts, closed, site, message):
            p.check_advert(self._terms, message, self._checker)
            if not (keys.is_sound(message.channel) and keys.is_sound(message.mask)):
                raise self._terms.malformed("a public key is of low order: anybody could agree with it", site)
            taken = {key for advert in self._adverts.values() for key in (advert.channel, advert.mask)}
            if len(taken | {message.channel, message.mask}) < len(taken) + 2:
                raise self._refused(site, "it advertised a public key that is there already")
            self._adverts[site] = message

    def close_adverts(self) -> bytes:
        """Return the Roll.

        Raises:
            QuorumError: too few sites advertised; more may come.
        """
        if self._state.roll is None:
            roll = p.Roll(self._terms.digest(), tuple(self._adverts[site] for site in sorted(self._adverts)))
            try:
                session = p.Session.of(self._terms, roll, self._checker)
            except PrivacyError as error:
                raise self._too_few(error.message.rstrip(".")) from error
            self._keep(roll=roll)
            self._session = session
        assert self._state.roll is not None
        return p.pack(self._state.roll)

    # share

    def add_shares(self, site: str, data: bytes) -> None:
        """Take a site's Shares.

        Raises:
            WireError, SiteError: they are malformed, not for its holders, of a site that is not on the roll, or late.
        """
        session = self._open(self._state.roll, "shares came")
        message = p.receive(self._terms, data, p.Shares, site)
        if site not in session.adverts:
            raise self._refused(site, "it deals shares and is not on the roll")
        if not self._take(self._shares, self._state.shares, site, message):
            return
        holders = set(session.holders(site))
        if message.digests.keys() != holders or message.boxes.keys() != holders - {site}:
            raise self._terms.malformed("it dealt shares to others than the holders of its own", site)
        self._shares[site] = message

    def close_shares(self) -> tuple[str, ...]:
        """Close the phase, and return who dealt; :meth:`inbox` has what each is sent.

        Raises:
            QuorumError: too few sites dealt shares; more may come.
        """
        session = self._open(self._state.roll, "shares are to be closed")
        if self._state.shares is None:
            self._require(session, self._shares, self._shares, "dealt shares")
            self._keep(shares=dict(self._shares))
        return self._dealers

    @property
    def _dealers(self) -> tuple[str, ...]:
        return tuple(sorted(self._state.shares or ()))

    def _require(self, session: p.Session, there: Collection[str], whose: Iterable[str], what: str) -> None:
        """Check that enough sites are there: altogether, and among the holders of each of ``whose``."""
        if len(there) < session.shape.quorum:
            raise self._too_few(f"{len(there)} sites {what}, {session.shape.quorum} are needed")
        for site in whose:
            left = sum(holder in there for holder in session.holders(site))
            if left < session.shape.threshold:
                raise self._too_few(
                    f"of those that hold shares of {site!r}, {left} {what}, {session.shape.threshold} are needed"
                )

    def inbox(self, site: str) -> bytes:
        """Return the Inbox of a site.

        Raises:
            SiteError: it did not deal shares in time.
        """
        session = self._open(self._state.shares, "an inbox is asked for")
        shares = self._state.shares or {}
        if site not in shares:
            raise self._refused(site, "it did not deal shares in time and is out of this attempt")
        boxes = {peer: shares[peer].boxes[site] for peer in session.neighbours(site) if peer in shares}
        return p.pack(p.Inbox(self._terms.digest(), self._dealers, boxes))

    # mask

    def check_upload(self, site: str, size: int, dtype: np.dtype[Any]) -> None:
        """Check a masked vector before it is read.

        Raises:
            SiteError: the site can't send one: it dealt no shares, or is late.
            WireError: the vector has another length or ring.
        """
        self._open(self._state.shares, "a masked vector came")
        if site not in self._dealers:
            raise self._refused(site, "it sent a masked vector and had not dealt shares")
        if self._state.survivors is not None:
            raise self._refused(site, "this masked vector is late: the survivor set is fixed, and does not change")
        if site in self._accepted:
            raise self._refused(site, "its masked vector is in the sum already")
        wanted = self._terms.encoding
        if size != wanted.size or dtype != wanted.dtype:
            raise self._terms.malformed(
                f"its masked vector is {dtype}[{size}] instead of {wanted.dtype}[{wanted.size}]", site
            )

    def accept(self, site: str) -> None:
        """Count a site as a survivor; its whole vector is durable, or in a durable sum.

        Raises:
            SiteError: as :meth:`check_upload`.
        """
        self.check_upload(site, self._terms.encoding.size, self._terms.encoding.dtype)
        self._accepted.add(site)

    def close_uploads(self) -> bytes:
        """Fix the survivor set and return the Survivors.

        Raises:
            QuorumError: too few sites are in the sum; more may come.
        """
        session = self._open(self._state.shares, "uploads are to be closed")
        if self._state.survivors is None:
            self._require(session, self._accepted, self._dealers, "survive")
            self._keep(survivors=tuple(sorted(self._accepted)))
        return p.pack(p.Survivors(self._terms.digest(), self.survivors))

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites in the sum; empty until that is fixed."""
        return self._state.survivors or ()

    @property
    def is_recovered(self) -> bool:
        """Whether shares are closed, so that :meth:`close_reveals` needs no site any more."""
        return self._state.reveals is not None

    # unmask

    def add_vote(self, site: str, data: bytes) -> None:
        """Take a survivor's Vote; once a quorum's are closed, no more are needed.

        Raises:
            WireError, AccessError, SiteError: it is malformed, of no survivor, not signed by it, or another one.
        """
        session = self._open(self._state.survivors, "a vote came")
        message = p.receive(self._terms, data, p.Vote, site)
        if site not in self.survivors:
            raise self._refused(site, "it votes and is no survivor")
        if self._state.votes is None and self._take(self._votes, None, site, message):
            p.check_vote(session, self._checker, site, session.ballot(self._dealers, self.survivors), message.signature)
            self._votes[site] = message

    def close_votes(self) -> bytes:
        """Return the Votes.

        Raises:
            QuorumError: too few survivors voted; more may come.
        """
        session = self._open(self._state.survivors, "votes are to be closed")
        if self._state.votes is None:
            self._require(session, self._votes, (), "voted")
            signatures = {site: self._votes[site].signature for site in sorted(self._votes)}
            self._keep(votes=p.Votes(self._terms.digest(), signatures))
        assert self._state.votes is not None
        return p.pack(self._state.votes)

    def add_reveal(self, site: str, data: bytes) -> None:
        """Take a survivor's Reveal.

        Raises:
            WireError, SiteError: it or one of its shares is malformed, of no survivor, or late. A share that is not as
                it was dealt is left out later: the holder may have altered it, or the dealer lied.
        """
        session = self._open(self._state.votes, "shares were revealed")
        message = p.receive(self._terms, data, p.Reveal, site)
        if site not in self.survivors:
            raise self._refused(site, "it reveals shares and is no survivor")
        if not self._take(self._reveals, self._state.reveals, site, message):
            return
        expected = set(session.holders(site)) & set(self._dealers)
        if message.shares.keys() != expected:
            raise self._terms.malformed("it revealed shares of other sites than those that it holds for", site)
        for dealer, share in message.shares.items():
            wrong = shamir.problem(share)
            if wrong:
                raise self._terms.malformed(f"its share of {dealer!r} can't be used: {wrong}", site)
        self._reveals[site] = message

    def _is_dealt(self, dealer: str, holder: str, share: bytes) -> bool:
        dealt = (self._state.shares or {})[dealer].digests[holder]
        return p.share_digest(share) == (dealt[32:] if dealer in self.survivors else dealt[:32])

    def close_reveals(self) -> keys.Masks:
        """Return what is to be added to the sum, a block at a time, to leave the sum of the survivors' values.

        Raises:
            QuorumError: there are too few shares of a site; more may come. The sum stays masked.
            WireError: the shares that a site dealt do not give its secret.
        """
        session = self._open(self._state.votes, "shares are to be closed")
        reveals = self._reveals if self._state.reveals is None else self._state.reveals
        found = {dealer: self._recovered(session, dealer, reveals) for dealer in self._dealers}
        if self._state.reveals is None:
            self._keep(reveals=dict(reveals))
        return self._removal(session, found)

    def _recovered(self, session: p.Session, dealer: str, reveals: Mapping[str, p.Reveal]) -> bytes:
        """Return a survivor's seed, or the mask key of one that dropped out."""
        there = {
            number: (holder, reveals[holder].shares[dealer])
            for number, holder in enumerate(session.holders(dealer), 1)
            if holder in reveals
        }
        shares = {n: share for n, (holder, share) in there.items() if self._is_dealt(dealer, holder, share)}
        try:
            secret = shamir.combine(shares, session.shape.threshold)
        except QuorumError as error:
            odd = [holder for number, (holder, _) in there.items() if number not in shares]
            blame = f"; those that {', '.join(map(repr, odd))} revealed are not as {dealer!r} dealt them" if odd else ""
            raise self._too_few(f"of {dealer!r}, {error.message[:-1]}{blame}") from error
        except WireError as error:
            raise self._terms.malformed(f"the shares that it dealt are worthless: {error.message}", dealer) from error
        advert = session.adverts[dealer]
        if dealer in self.survivors:
            sound = p.commitment(self._terms, dealer, secret) == advert.commitment
        else:
            sound = keys.public_bytes(keys.private_key(secret)) == advert.mask
        if not sound:
            raise self._terms.malformed("the shares that it dealt do not give the secret that it committed to", dealer)
        return secret

    def _removal(self, session: p.Session, secrets: Mapping[str, bytes]) -> keys.Masks:
        survivors = set(self.survivors)
        own = [(session.self_mask(secrets[site], site), -1) for site in self.survivors]
        # What a survivor added for a pair is the opposite of what the other would have, so the other's is added here.
        gone = {site: keys.private_key(secrets[site]) for site in self._dealers if site not in survivors}
        pairs = [
            session.pair_mask(private, site, peer)
            for site, private in gone.items()
            for peer in session.neighbours(site)
            if peer in survivors
        ]
        return keys.Masks(self._terms.encoding.dtype, [*own, *pairs])
