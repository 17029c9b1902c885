# SPDX-License-Identifier: Apache-2.0
"""The server's side of homomorphic encryption: it adds ciphertexts, and has no key. It needs NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from hansa.core.lazy import Array
from hansa.errors import QuorumError
from hansa.homomorphic import ckks
from hansa.homomorphic.protocol import (
    PART,
    Acceptance,
    Finish,
    Integers,
    Invitation,
    Lost,
    Offer,
    Part,
    Terms,
    check_acceptance,
    check_offer,
    pack,
    unpack,
)
from hansa.secagg.protocol import Checker, Store, pack_state, unpack_state


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives a crash of the server.

    Attributes:
        terms: the session's.
        invitation: what sites are sent, once the keys are there.
        survivors: the acceptances of those in the sum, once that is fixed.
        opened: whether the opened sum is durable too.
        lost: whether the key site has lost the keys, so that nobody can open the sum.
    """

    terms: Terms
    invitation: bytes = b""
    survivors: tuple[Acceptance, ...] = ()
    opened: bool = False
    lost: bool = False
    format: int = 1


def attempt_at(number: int, state: bytes | None) -> int:
    """Return which attempt at a session is next, by what was stored last: the same one, unless its keys were lost."""
    held = None if state is None else unpack_state(state, State)
    return 1 if held is None or held.terms.round != number else held.terms.attempt + held.lost


class Server:
    """One session.

    Args:
        terms: what the job says.
        checker: tells the sites' signatures.
        store: makes a state durable.
        state: what was stored last; that of another session is not used.
    """

    def __init__(self, terms: Terms, checker: Checker, store: Store, state: bytes | None) -> None:
        held = None if state is None else unpack_state(state, State)
        self.terms = terms
        self._checker = checker
        self._store = store
        self._state = held if held is not None and held.terms == terms else State(terms)
        self._accepted: dict[str, Acceptance] = {}

    @property
    def survivors(self) -> Sequence[str]:
        """Who is in the sum; nobody until that is fixed."""
        return [acceptance.site for acceptance in self._state.survivors]

    @property
    def is_opened(self) -> bool:
        """Whether the opened sum was said to be durable."""
        return self._state.opened

    def invite(self, answer: bytes) -> bytes:
        """Take the key site's Offer, and return what the sites are sent.

        Raises:
            WireError, AccessError: it is not the key site's own, for this session.
        """
        offer = unpack(answer, Offer)
        check_offer(self.terms, offer, self._checker)
        invitation = pack(Invitation(self.terms, offer))
        if invitation != self._state.invitation:
            self._keep(invitation=invitation)
        return invitation

    def accept(self, site: str, answer: bytes) -> None:
        """Take a site's Acceptance of the invitation.

        Raises:
            WireError, AccessError: it is not the site's own, for this session.
        """
        acceptance = unpack(answer, Acceptance)
        if acceptance.site != site:
            raise self.terms.malformed(f"an acceptance in the name of {acceptance.site!r}", site)
        offer = unpack(self._state.invitation, Invitation).offer
        check_acceptance(self.terms, offer, acceptance, self._checker)
        self._accepted[site] = acceptance

    def check(self, words: Array) -> None:
        """Raise WireError unless a site's ``words`` are those of ciphertexts."""
        ckks.check(words)

    def add(self, total: Array, words: Array) -> None:
        """Add a site's ``words``, which were checked, to those in ``total``."""
        ckks.add(total, words)

    def close(self, summed: Sequence[str]) -> None:
        """Fix, for good, who is in the sum, which is durable; all have accepted.

        Raises:
            QuorumError: they are too few.
        """
        if len(summed) < self.terms.minimum:
            raise QuorumError(
                f"{len(summed)} of {len(self.terms.sites)} sites sent ciphertexts, and fewer than "
                f"{self.terms.minimum} are never summed.",
                job=self.terms.job,
                round=self.terms.round,
            )
        self._keep(survivors=tuple(self._accepted[site] for site in sorted(summed)))

    def parts(self, total: Array) -> Iterator[tuple[slice, bytes]]:
        """Yield, for each part of the sum, the places of its integers and the message that has it opened."""
        for first in range(0, self.terms.num_ciphertexts, PART):
            words = total[first * ckks.WORDS : (first + PART) * ckks.WORDS]
            start = first * ckks.SLOTS
            places = slice(start, min(start + PART * ckks.SLOTS, self.terms.encoding.size))
            named = () if first else self._state.survivors
            yield places, pack(Part(self.terms.digest(), named, first, words.tobytes()))

    def opened(self, places: slice, answer: bytes) -> Array:
        """Return the integers (int64) of an opened part.

        Raises:
            QuorumError: the key site has lost the keys. That is noted, and the next attempt has others.
            WireError: it is no answer, or its integers are too few or too many.
        """
        said = unpack(answer, Integers | Lost)  # type: ignore[arg-type]  # a union is no type to mypy
        if said.session != self.terms.digest():
            raise self.terms.malformed("the opened sum is of another session", self.terms.key_site)
        if isinstance(said, Lost):
            self._keep(lost=True)
            raise QuorumError(
                f"{self.terms.key_site} has lost the keys of this round's sum, so nobody can open it. Resume: all "
                "sites are asked again, with other keys."
            )
        if len(said.values) != 8 * (places.stop - places.start):
            raise self.terms.malformed("the opened sum has another length", self.terms.key_site)
        return np.frombuffer(said.values, np.int64)

    def finish(self) -> bytes:
        """Note that the opened sum is durable, and return the message that has the keys deleted."""
        if not self._state.opened:
            self._keep(opened=True)
        return pack(Finish(self.terms.digest()))

    def _keep(self, **changes: object) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._store(pack_state(self._state))
