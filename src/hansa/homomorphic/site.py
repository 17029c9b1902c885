# SPDX-License-Identifier: Apache-2.0
"""The sites' side of homomorphic encryption: what is masked and encrypted, and the one site that decrypts sums."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from hansa.core.lazy import Array
from hansa.core.tree import Parts
from hansa.homomorphic import agreement, ckks
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
    mask,
)
from hansa.secagg import keys
from hansa.secagg.protocol import Signer
from hansa.secagg.ring import SCALARS, Vector


class Joined(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site's part in a session, as it is kept.

    Attributes:
        invitation: what it was asked to encrypt with.
        acceptance: what it answered.
        mask: the private key of its mask.
        values: the digest of what was masked, once it was.
    """

    invitation: Invitation
    acceptance: Acceptance
    mask: bytes
    values: bytes | None = None
    format: int = 1


def joined(invitation: Invitation, site: str, signer: Signer, before: Joined | None) -> Joined:
    """Accept an invitation, for the caller to make durable; the same one again is accepted with the same key.

    Args:
        invitation: its terms are the job's.
        site: who accepts.
        signer: its identity.
        before: what it joined last.

    Raises:
        PrivacyError: the site was not asked, or the session is older than the last.
        WireError, AccessError: the keys are not the key site's own, for this session.
    """
    terms = invitation.terms
    check_offer(terms, invitation.offer, signer)
    if site not in terms.sites:
        raise terms.refusal("this site was not asked", site)
    if before is not None and before.invitation == invitation:
        return before
    if before is not None and before.invitation.terms.order > terms.order:
        raise terms.refusal("a later session has begun", site)
    private = secrets.token_bytes(keys.KEY_BYTES)
    public = keys.public_bytes(keys.private_key(private))
    unsigned = Acceptance(terms.digest(), site, invitation.offer.digest(), public, signer.credential())
    acceptance = msgspec.structs.replace(unsigned, signature=signer.sign(unsigned.content()))
    return Joined(invitation, acceptance, private)


def sealed(joined: Joined, parts: Parts, store: Callable[[Joined], None]) -> Iterator[Array]:
    """Yield the ciphertexts (``ckks.WORDS``, uint64) of a site's masked vector, one after the other.

    None of them may leave before the last was taken: only then it is known that the mask hides no other values.

    Args:
        joined: as it is kept.
        parts: what is summed (:func:`hansa.secagg.ring.summands`); leaves may be lazy.
        store: makes it durable.

    Raises:
        NonFiniteError, PrivacyError: a value is NaN, infinite or outside its bounds, or another than was masked before.
        WireError: the parts are not those of the terms.
    """
    terms, acceptance = joined.invitation.terms, joined.acceptance
    vector = Vector(terms.encoding, parts, acceptance.site, terms.round, None)
    encryptor = ckks.Encryptor(joined.invitation.offer.public)
    stream = mask(keys.private_key(joined.mask), joined.invitation.offer.mask, acceptance)
    masks = keys.Masks(terms.encoding.dtype, [(stream, 1)])
    values = np.empty(ckks.SLOTS, terms.encoding.dtype)
    digest = hashlib.sha256()
    for start in range(0, terms.encoding.size, ckks.SLOTS):
        block = values[: min(ckks.SLOTS, terms.encoding.size - start)]
        vector.encode(start, block)
        digest.update(block.data)
        masks.apply(start, block)
        yield encryptor.encrypt(ckks.reduced(block))
    if joined.values is None:
        store(msgspec.structs.replace(joined, values=digest.digest()))
    elif joined.values != digest.digest():
        raise terms.refusal(
            "these are other values than those that were masked before, and two vectors under one mask would show how "
            "they differ. Send the first ones again, or wait for the next round",
            acceptance.site,
        )


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session's secret keys, as they are kept.

    Attributes:
        secret: that of :mod:`.ckks`; None once the session is over.
        mask: the private key that masks are agreed on with; likewise.
    """

    terms: Terms
    offer: Offer
    secret: bytes | None
    mask: bytes | None
    format: int = 1


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a sum was asked for: whose it is, and the digests of its parts by the first ciphertext of each."""

    session: bytes
    survivors: tuple[Acceptance, ...]
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
    """The site that has the secret keys, in one session after the other.

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
        """Return the public keys for a session, the same whenever it is asked for.

        Raises:
            PrivacyError: this site is not the key's owner, the session is older than the last, or the round has had its
                sum.
        """
        if terms.key_site != self._name:
            raise terms.refusal(f"{terms.key_site!r} is to have the key, not this site", self._name)
        if self._key is not None:
            if terms == self._key.terms:
                return self._key.offer
            if terms.order < self._key.terms.order:
                raise terms.refusal("a later session has begun", self._name)
            if terms.round == self._key.terms.round and self._begun(self._key):
                raise terms.refusal("the sum of this session was asked for, and there is no second one", self._name)
        secret, public = ckks.new_keys()
        private = secrets.token_bytes(keys.KEY_BYTES)
        masking = keys.public_bytes(keys.private_key(private))
        unsigned = Offer(terms.digest(), public, masking, self._signer.credential())
        offer = msgspec.structs.replace(unsigned, signature=self._signer.sign(unsigned.content()))
        self._keep_key(Key(terms, offer, secret, private))
        return offer

    def _begun(self, key: Key) -> bool:
        return key.secret is None or self._of(key) is not None

    def _of(self, key: Key) -> Opened | None:
        opened = self._opened
        return opened if opened is not None and opened.session == key.offer.session else None

    def open(self, part: Part) -> Integers | Lost:
        """Return the integers in a part of the sum; the first part comes first.

        Who is in the sum and what is opened is fixed before it is decrypted, so a refusal is no question to ask twice.

        Raises:
            PrivacyError: it is not a sum that this session may show.
            AccessError: an acceptance is not the site's that it names.
            WireError: it is malformed, or no sum of these sites' vectors.
        """
        key = self._key
        if key is None or key.offer.session != part.session:
            return Lost(part.session)
        terms = key.terms
        if key.secret is None:
            raise terms.refusal("the session is over, and its keys are deleted", self._name)
        count = min(PART, terms.num_ciphertexts - part.first)
        if part.first % PART or count <= 0 or len(part.words) != count * ckks.WORDS * 8:
            raise terms.malformed("this is no part of the sum", self._name)
        words = np.frombuffer(part.words, np.uint64).reshape(-1, ckks.WORDS)
        ckks.check(words)
        opened = self._named(key, part)
        digest = hashlib.sha256(part.words).digest()
        if opened.digests.get(part.first, digest) != digest:
            raise terms.refusal("something else was asked for as this part of the sum", self._name)
        if part.first not in opened.digests:
            opened = msgspec.structs.replace(opened, digests={**opened.digests, part.first: digest})
            self._kept.store_opened(opened)
            self._opened = opened
        values = unmasked(key, opened.survivors, part.first, words)
        self._check(terms, values, part.first, len(opened.survivors))
        return Integers(part.session, values.tobytes())

    def _named(self, key: Key, part: Part) -> Opened:
        """Return what was asked for so far, with whose sum it is, which the first part says."""
        terms, opened = key.terms, self._of(key)
        if part.first:
            if opened is None:
                raise terms.refusal("the first part of the sum, which names whose it is, comes first", self._name)
            return opened
        names = [acceptance.site for acceptance in part.survivors]
        if names != sorted(set(names)):
            raise terms.malformed("the sites in the sum are not in order, or one is there twice", self._name)
        if len(names) < terms.minimum:
            raise terms.refusal(
                f"the sum is of {len(names)} sites, and fewer than {terms.minimum} are never shown", self._name
            )
        for acceptance in part.survivors:
            check_acceptance(terms, key.offer, acceptance, self._signer)
        if opened is not None and [one.content() for one in opened.survivors] != [
            one.content() for one in part.survivors
        ]:
            raise terms.refusal("the sum of other sites was asked for in this session", self._name)
        return opened or Opened(part.session, part.survivors, {})

    def _check(self, terms: Terms, values: Array, first: int, sites: int) -> None:
        """Check that a part of the sum is what so many sites can have added up to."""
        start, place = first * ckks.SLOTS, 0
        for field in terms.encoding.fields:
            mine = values[max(0, place - start) : max(0, place + field.size - start)]
            place += field.size
            if mine.size == 0:
                continue
            if (field.part, field.name) == (SCALARS, agreement.COUNT):
                if math.ldexp(int(mine[0]), -field.exponent) != sites:
                    raise terms.refusal(f"what is to be opened is no sum of the {sites} sites named", self._name)
            elif int(np.abs(mine).max()) > sites * field.most:
                raise terms.malformed(
                    f"the sum of {field.name!r} of {field.part!r} is more than {sites} sites can put in", self._name
                )

    def finish(self, message: Finish) -> None:
        """Delete the secret keys: the sum is where it belongs. Those of another session stay."""
        key = self._key
        if key is not None and key.offer.session == message.session and key.secret is not None:
            self._keep_key(msgspec.structs.replace(key, secret=None, mask=None))

    def _keep_key(self, key: Key) -> None:
        self._kept.store_key(key)
        self._key = key


def unmasked(key: Key, survivors: Iterable[Acceptance], first: int, words: Array) -> Array:
    """Return what ciphertexts of a sum decrypt to, less the masks of its sites: integers (int64) in [-2^39, 2^39).

    Args:
        key: the session's, which is not over.
        survivors: the acceptances of those in the sum.
        first: which of the sum's ciphertexts they begin with.
        words: the ciphertexts (a number of them, ``ckks.WORDS``; uint64).

    Raises:
        WireError: they hold no integers.
    """
    assert key.secret is not None, "the session is not over"
    assert key.mask is not None, "nor are its masks"
    decryptor, private = ckks.Decryptor(key.secret), keys.private_key(key.mask)
    start = first * ckks.SLOTS
    values = np.concatenate([decryptor.decrypt(row) for row in words])[: key.terms.encoding.size - start]
    terms = [(mask(private, one.mask, one), -1) for one in survivors]
    residues = values.view(np.uint64)
    keys.Masks(residues.dtype, terms).apply(start, residues)
    return ckks.reduced(residues)
