# SPDX-License-Identifier: Apache-2.0
"""The sites' side of homomorphic encryption: what is encrypted, and the one site that decrypts sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from hansa.core.lazy import Array
from hansa.core.tree import Parts
from hansa.errors import PrivacyError
from hansa.homomorphic import agreement, ckks
from hansa.homomorphic.protocol import PART, Finish, Invitation, Offer, Part, Terms
from hansa.secagg.protocol import Names, Signer
from hansa.secagg.ring import SCALARS, Vector


def sealed(invitation: Invitation, parts: Parts, site: str) -> Iterator[Array]:
    """Yield the ciphertexts (``ckks.WORDS``, uint64) of a site's vector, one after the other.

    Args:
        invitation: as it was accepted.
        parts: what is summed (:func:`hansa.secagg.ring.summands`); leaves may be lazy.
        site: whose.

    Raises:
        NonFiniteError, PrivacyError: a value is NaN, infinite or outside its bounds.
        WireError: the parts are not those of the terms.
    """
    terms = invitation.terms
    vector = Vector(terms.encoding, parts, site, terms.round, None)
    encryptor = ckks.Encryptor(invitation.offer.public)
    values = np.empty(ckks.SLOTS, terms.encoding.dtype)
    for start in range(0, terms.encoding.size, ckks.SLOTS):
        block = values[: min(ckks.SLOTS, terms.encoding.size - start)]
        vector.encode(start, block)
        yield encryptor.encrypt(block.view(terms.encoding.signed))


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session's key pair, as it is kept.

    Attributes:
        secret: None once the session is over.
    """

    terms: Terms
    offer: Offer
    secret: bytes | None
    format: int = 1


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a sum was opened: whose it is, and the digests of its parts by the first ciphertext of each."""

    session: bytes
    survivors: Names
    digests: dict[int, bytes]
    format: int = 1


@dataclass(frozen=True)
class Kept:
    """What a key site has stored, each with what makes new bytes durable in its place."""

    key: Key | None
    opened: Opened | None
    store_key: Callable[[Key], None]
    store_opened: Callable[[Opened], None]


class KeySite:
    """The site that has the secret key, in one session after the other.

    Args:
        name: the site's.
        signer: its identity.
        kept: what it has stored.
    """

    def __init__(self, name: str, signer: Signer, kept: Kept) -> None:
        self._name = name
        self._signer = signer
        self._kept = kept
        self._key = kept.key
        self._opened = kept.opened

    def offer(self, terms: Terms) -> Offer:
        """Return the public key for a session, the same whenever it is asked for.

        Raises:
            PrivacyError: this site is not the key's owner, or the session is older than the last.
        """
        if terms.key_site != self._name:
            raise terms.refusal(f"{terms.key_site!r} is to have the key, not this site", self._name)
        if self._key is not None:
            if terms.round < self._key.terms.round:
                raise terms.refusal("a later session has begun", self._name)
            if terms == self._key.terms:
                return self._key.offer
            if terms.round == self._key.terms.round and self._begun(self._key):
                raise terms.refusal("the sum of this session was opened, and there is no second one", self._name)
        secret, public = ckks.new_keys()
        unsigned = Offer(terms.digest(), public, self._signer.credential())
        offer = msgspec.structs.replace(unsigned, signature=self._signer.sign(unsigned.content()))
        self._keep_key(Key(terms, offer, secret))
        return offer

    def _begun(self, key: Key) -> bool:
        return key.secret is None or (self._opened is not None and self._opened.session == key.offer.session)

    def open(self, part: Part) -> Array:
        """Return the integers (int64) in a part of the sum; the first part comes first.

        Raises:
            PrivacyError: it is not a sum that this session may show.
            WireError: it is malformed, or no sum of these sites' vectors.
        """
        key = self._of(part.session)
        terms = key.terms
        if key.secret is None:
            raise terms.refusal("the session is over, and its key is deleted", self._name)
        if list(part.survivors) != sorted(set(part.survivors) & set(terms.sites)):
            raise terms.refusal("the sum is said to be of others than the sites asked", self._name)
        if len(part.survivors) < terms.minimum:
            raise terms.refusal(
                f"the sum is of {len(part.survivors)} sites, and fewer than {terms.minimum} are never shown", self._name
            )
        opened = self._opened
        if opened is None or opened.session != part.session:
            opened = Opened(part.session, part.survivors, {})
        if opened.survivors != part.survivors:
            raise terms.refusal("the sum of other sites was opened in this session", self._name)
        if part.first and 0 not in opened.digests:
            raise terms.refusal(
                "the first part of the sum, which tells how many sites are in it, comes first", self._name
            )
        count = min(PART, terms.num_ciphertexts - part.first)
        if part.first % PART or count <= 0 or len(part.words) != count * ckks.WORDS * 8:
            raise terms.malformed("this is no part of the sum", self._name)
        digest = hashlib.sha256(part.words).digest()
        if opened.digests.get(part.first, digest) != digest:
            raise terms.refusal("something else was opened as this part of the sum", self._name)
        values = self._decrypted(terms, part)
        if part.first not in opened.digests:
            opened = msgspec.structs.replace(opened, digests={**opened.digests, part.first: digest})
            self._kept.store_opened(opened)
            self._opened = opened
        return values

    @cached_property
    def _decryptor(self) -> ckks.Decryptor:
        assert self._key is not None, "the session was looked up"
        assert self._key.secret is not None, "it is not over"
        return ckks.Decryptor(self._key.secret)

    def _decrypted(self, terms: Terms, part: Part) -> Array:
        words = np.frombuffer(part.words, np.uint64).reshape(-1, ckks.WORDS)
        values = np.concatenate([self._decryptor.decrypt(row) for row in words])
        start, sites = part.first * ckks.SLOTS, len(part.survivors)
        values = values[: terms.encoding.size - start]
        place = 0
        for field in terms.encoding.fields:
            mine = values[max(0, place - start) : max(0, place + field.size - start)]
            place += field.size
            if mine.size == 0:
                continue
            if (field.part, field.name) == (SCALARS, agreement.COUNT):
                found = math.ldexp(int(mine[0]), -field.exponent)
                if found != sites:
                    raise terms.refusal(f"the sum is of {found:g} vectors, said to be of {sites} sites", self._name)
            elif int(np.abs(mine).max()) > sites * field.most:
                raise terms.malformed(
                    f"the sum of {field.name!r} of {field.part!r} is more than {sites} sites can put in", self._name
                )
        return values

    def finish(self, message: Finish) -> None:
        """Delete the secret key: the sum is where it belongs."""
        key = self._of(message.session)
        if key.secret is not None:
            self._keep_key(msgspec.structs.replace(key, secret=None))

    def _of(self, session: bytes) -> Key:
        if self._key is None or self._key.offer.session != session:
            raise PrivacyError(
                "Homomorphic encryption is refused: this site has no key of that session.", site=self._name
            )
        return self._key

    def _keep_key(self, key: Key) -> None:
        self._kept.store_key(key)
        self._key = key
