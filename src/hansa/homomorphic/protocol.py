# SPDX-License-Identifier: Apache-2.0
"""Sums under homomorphic encryption: one site has the key, and the server has what is encrypted, and masked inside.

    key site                 server                                 sites
    ────────                 ──────                                 ─────
    offer(terms)   ──Offer──>      ──Invitation────────────────────> accept      public keys, signed by the key site
                                   <─Acceptance───────────────────── one more, signed by the site
                                   <═ciphertexts════════════════════ sealed      of vector + mask, modulo 2^40
                                   adds them up, fixes who is in the sum
    open(part)     <─Part───  ...  a part of the sum after the other; the first one names who is in it
                   ──Integers──>   the sum, less the masks of those: whole numbers
    finish()       <─Finish─                                                     the secret keys are deleted

All sessions (:func:`hansa.secagg.agreement.number_of`), and attempts at one, have keys of their own, and a session has
one sum. Server and sites work the :class:`Terms` out from the job. A site's mask is the keystream (``secagg.keys``) of
what its X25519 key and the key site's agree on; the key site masks its own vector in the same way, with itself. The key
site takes part in the protocol whether it is asked for a vector or not.

| before this leaves | this is durable |
|---|---|
| Offer | at the key site: the secret keys, and the offer itself |
| Acceptance | at the site: the key of its mask, and the acceptance itself |
| the first ciphertext | at the site: a digest of what is masked |
| the first Part | at the server: the sum, and who is in it |
| any word on a part, a refusal too | at the key site: who is in the sum, and the digest of the part's ciphertexts |

**What holds**, against a server that lies and any sites that work with it, the key site apart:

- the server learns the sum over one set of at least ``minimum`` sites, those that work with it among them, and nothing
  else of any site. For what it has is v + m of each, the masks m uniform modulo 2^40, and what it is told is what it
  gave less the sum of one set's masks, once: one-time pads. If that was not the sum of those sites' ciphertexts (one of
  them alone, one twice, the sum of others), what is left is noise, which the key site nearly always refuses to show.
  That holds even if it had the secret key of CKKS;
- a refusal tells one bit, and there is no other try: the set and the part were fixed before it was decrypted;
- nobody can have sites use another key, or the key site other masks: both are signed, for this session, by identities
  that the roster lists.

For a server that keeps to the protocol, and tells others all it sees, also this:

- what it has is encrypted, by a scheme that no quantum computer is known to break, beside the masks;
- the key site learns the same sum, and gets no site's ciphertexts from such a server.

Other sites learn neither: no ciphertexts and no sums come to them beside the model.

| case | result |
|---|---|
| a phase again with the same input, before or after a restart | the same bytes |
| a key signed by another than its owner, or for another session | AccessError, WireError; nothing comes of it |
| a key that the job's terms do not name the owner of | PrivacyError |
| fewer sites than the minimum in the sum, others than were asked, or another set than before | PrivacyError |
| other ciphertexts in place of a part that was asked for | PrivacyError, for ever |
| a sum of fewer or more ciphertexts than of the sites it is said to be of | PrivacyError, for ever |
| what decrypts to no integers, or to more than so many sites can put in | WireError; nothing of it is shown, for ever |
| other values under a mask that was used | PrivacyError; nothing is sent |
| an older session or attempt than the one before; a session after its end | PrivacyError |
| another attempt at a session of which a part was asked for | PrivacyError: that would be a second sum |
| a key site that lost its folder between offer and end | it says so (Lost); another attempt has other keys |

**Not promised.** A server and a key site that work together read every update: that is what the keys are for. A key
site that lost its folder does not know what it opened: a server that lies can have a second sum of that round from it.
Whoever takes part can spoil a sum. ``secagg`` withstands a key site, as it has none.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, TypeVar

import msgspec

from hansa.errors import AccessError, PrivacyError, WireError
from hansa.homomorphic import ckks
from hansa.secagg import keys
from hansa.secagg.protocol import Checker, Count, Credential, Hash, Name, Names, Signature
from hansa.secagg.ring import Encoding

PART = 32
"""How many ciphertexts of the sum are opened at a time: their integers are 1 MiB."""
MAX_BYTES = 8 << 20
"""No message is larger."""
LEAST = 3

M = TypeVar("M", bound=msgspec.Struct)


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="homomorphic-terms"):
    """What all agree on before a session begins.

    Attributes:
        job: the job's id.
        round: the session's number, from 1.
        attempt: from 1. What is tried again is another attempt, with other keys.
        sites: those asked, sorted.
        key_site: who has the secret key; it need not be among those asked.
        encoding: what is summed, as integers.
        minimum: the fewest sites that may be summed, at least three.

    Raises:
        PrivacyError: terms that protect nobody, or sums that can't be decrypted.
    """

    job: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    round: Count
    attempt: Count
    sites: Names
    key_site: Name
    encoding: Encoding
    minimum: Count = LEAST

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(set(self.sites)):
            raise self.refusal("the sites are not in order, or one is there twice")
        if self.minimum < LEAST:
            raise self.refusal(f"a minimum of {self.minimum} sites is below {LEAST}")
        if len(self.sites) < self.minimum:
            raise self.refusal(f"{len(self.sites)} sites are asked, and fewer than {self.minimum} are never summed")
        if len(self.sites) > ckks.MOST_SITES:
            raise self.refusal(
                f"{len(self.sites)} sites are asked, and the sum of more than {ckks.MOST_SITES} is not exact. Use "
                "secure_aggregation"
            )
        if (self.encoding.bits, self.encoding.stochastic) != (ckks.BITS, False):
            raise self.refusal("this is not what integers of these ciphertexts are made by")
        if self.encoding.sites < len(self.sites):
            raise self.refusal(f"the integers are for {self.encoding.sites} sites, and {len(self.sites)} are asked")

    @property
    def order(self) -> tuple[int, int]:
        """What tells which of two sessions of a job is the later."""
        return self.round, self.attempt

    @property
    def num_ciphertexts(self) -> int:
        """How many ciphertexts a site's vector is."""
        return ckks.num_ciphertexts(self.encoding.size)

    @property
    def num_words(self) -> int:
        """How many uint64 they are."""
        return self.num_ciphertexts * ckks.WORDS

    def refusal(self, why: str, site: str | None = None) -> PrivacyError:
        """Return the error for what these terms do not allow."""
        return PrivacyError(f"Homomorphic encryption is refused: {why}.", job=self.job, site=site, round=self.round)

    def malformed(self, why: str, site: str | None = None) -> WireError:
        """Return the error for what somebody sent."""
        return WireError(f"Homomorphic encryption: {why}.", job=self.job, site=site, round=self.round)

    def digest(self) -> bytes:
        """Return the hash that names this session."""
        return hashlib.sha256(b"hansa homomorphic terms v2\0" + pack(self)).digest()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels; ``session`` is the digest of the terms."""

    session: Hash


class Offer(Message, frozen=True, tag="homomorphic-offer"):
    """The key site's public keys for one session.

    Attributes:
        public: the one to encrypt with, as :mod:`.ckks` takes it.
        mask: the X25519 key to agree on masks with.
        credential: what proves who signed.
        signature: of :meth:`content`.
    """

    public: Annotated[bytes, msgspec.Meta(min_length=ckks.PUBLIC_BYTES, max_length=ckks.PUBLIC_BYTES)]
    mask: Hash
    credential: Credential
    signature: Signature = b""

    def content(self) -> bytes:
        """Return what is signed."""
        return b"hansa homomorphic offer v2\0" + self.session + hashlib.sha256(self.public).digest() + self.mask

    def digest(self) -> bytes:
        """Return the hash that acceptances name."""
        return hashlib.sha256(self.content()).digest()


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="homomorphic-invitation"):
    """What a site is told before it encrypts anything."""

    terms: Terms
    offer: Offer


class Acceptance(Message, frozen=True, tag="homomorphic-acceptance"):
    """A site's public key for its mask.

    Attributes:
        site: whose.
        offer: the digest of the offer that it is for.
        mask: the X25519 key.
        credential: what proves who signed.
        signature: of :meth:`content`.
    """

    site: Name
    offer: Hash
    mask: Hash
    credential: Credential
    signature: Signature = b""

    def content(self) -> bytes:
        """Return what is signed."""
        return b"hansa homomorphic acceptance v1\0" + self.session + self.offer + self.mask + self.site.encode()


class Part(Message, frozen=True, tag="homomorphic-part"):
    """A part of the sum, to be opened.

    Attributes:
        survivors: of the first part: the acceptances of those whose vectors are in the sum, sorted by name.
        first: which of the sum's ciphertexts it begins with, a multiple of ``PART``.
        words: up to ``PART`` ciphertexts.
    """

    survivors: tuple[Acceptance, ...]
    first: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    words: Annotated[bytes, msgspec.Meta(max_length=PART * ckks.WORDS * 8)]


class Integers(Message, frozen=True, tag="homomorphic-integers"):
    """What a part of the sum holds, less the masks: int64, little-endian."""

    values: Annotated[bytes, msgspec.Meta(max_length=PART * ckks.SLOTS * 8)]


class Lost(Message, frozen=True, tag="homomorphic-lost"):
    """The key site has no key of this session: it has lost its folder since."""


class Finish(Message, frozen=True, tag="homomorphic-finish"):
    """The sum is durable: the secret keys have done their work."""


def pack(value: msgspec.Struct) -> bytes:
    """Return the bytes of a message."""
    return msgspec.msgpack.encode(value)


def unpack(data: bytes, kind: type[M]) -> M:
    """Read a message.

    Raises:
        WireError: the bytes are none of this kind, or more than ``MAX_BYTES``.
        PrivacyError: terms that protect nobody.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"Homomorphic encryption: {len(data):,} bytes; no message has more than {MAX_BYTES:,}.")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"Homomorphic encryption: this is no {kind.__name__}: {str(error)[:200]}.") from None


def check_offer(terms: Terms, offer: Offer, checker: Checker) -> None:
    """Check that public keys are the key site's own, for this session.

    Raises:
        WireError: it is for another session, or no key.
        AccessError: another has signed it.
    """
    if offer.session != terms.digest():
        raise terms.malformed("the public key is for another session")
    try:
        checker.check(terms.key_site, offer.credential, offer.content(), offer.signature)
    except AccessError as error:
        raise AccessError(
            f"The public key was not signed by {terms.key_site!r}, the key's owner: {error.message} Nothing is "
            "encrypted with it.",
            job=terms.job,
            round=terms.round,
        ) from error
    ckks.check_public(offer.public)
    _check_sound(terms, offer.mask, terms.key_site)


def check_acceptance(terms: Terms, offer: Offer, acceptance: Acceptance, checker: Checker) -> None:
    """Check that a mask's key is that of a site which was asked, for this offer.

    Raises:
        PrivacyError: the site was not asked.
        WireError: it is for another session or offer, or no key.
        AccessError: another has signed it.
    """
    if acceptance.site not in terms.sites:
        raise terms.refusal("the sum is said to be of others than the sites asked", acceptance.site)
    if (acceptance.session, acceptance.offer) != (terms.digest(), offer.digest()):
        raise terms.malformed("the mask's key is for another session or offer", acceptance.site)
    try:
        checker.check(acceptance.site, acceptance.credential, acceptance.content(), acceptance.signature)
    except AccessError as error:
        raise AccessError(
            f"The mask's key was not signed by the site that it is said to be of: {error.message}",
            job=terms.job,
            site=acceptance.site,
            round=terms.round,
        ) from error
    _check_sound(terms, acceptance.mask, acceptance.site)


def _check_sound(terms: Terms, public: bytes, site: str) -> None:
    if not keys.is_sound(public):
        raise terms.malformed("its public key is of low order: anybody could agree with it", site)


def mask(private: keys.PrivateKey, public: bytes, acceptance: Acceptance) -> keys.Keystream:
    """Return a site's mask, from its own private key and the offer's public one, or the other way round."""
    context = acceptance.content()
    return keys.Keystream(keys.agree(private, public, "homomorphic mask", context), "homomorphic stream", context)
