# SPDX-License-Identifier: Apache-2.0
"""Sums under homomorphic encryption: one site has the key, and the server has what is encrypted.

    key site                 server                                 sites
    ────────                 ──────                                 ─────
    offer(terms)   ──Offer──>      ──Invitation────────────────────> accept      a public key, signed by the key site
                                   <═ciphertexts════════════════════ sealed      of this session's key
                                   adds them up, fixes who is in the sum
    open(part)     <─Part───  ...  a part of the sum after the other
                   ──integers──>   the sum, whole numbers
    finish()       <─Finish─                                                     the secret key is deleted

All sessions (:func:`hansa.secagg.agreement.number_of`) have keys of their own, and a session has one sum. Server and
sites work the :class:`Terms` out from the job.

| before this leaves | this is durable, in the key site's folder |
|---|---|
| Offer | the secret key, and the offer itself |
| the first integers | who is in the sum; for each part of it, the digest of its ciphertexts |

**What holds** for sites that keep to the protocol, and for a server that keeps to it but tells others all it sees:

- the server learns the sum over one set of at least ``minimum`` sites: it never has the secret key, and what it is told
  is whole numbers that don't depend on the encryption's error (``ckks``);
- the key site learns the same sum, and gets no site's ciphertexts from such a server;
- other sites learn neither: no ciphertexts and no sums come to them beside the model;
- nobody can have sites use another key: it is signed by the key site's identity, for this session.

| case | result |
|---|---|
| a phase again with the same input, before or after a restart | the same bytes |
| a key signed by another than the key site, or for another session | AccessError, WireError; nothing is encrypted |
| a key that the job's terms do not name the owner of | PrivacyError |
| fewer sites than the minimum in the sum, others than were asked, or another set than before | PrivacyError |
| other ciphertexts in place of a part that was opened | PrivacyError, for ever |
| a sum of fewer or more ciphertexts than of the sites it is said to be of, by a server's mistake | PrivacyError |
| what decrypts to no integers, or to more than so many sites can put in | WireError; nothing of it is shown |
| an older session than the one before; a session after its end | PrivacyError |
| a key site that lost its folder between offer and end | the round can't be opened, by anybody |

**Not promised.** A server and a key site that work together read every update: that is what the key is for. A server
that lies can hand the key site something else than the sum, one site's ciphertext with numbers added to it, say, and
is told what is in it: ciphertexts can be computed with, so no check inside of them stops it. ``secagg`` withstands
both. The key site, or any site, can spoil a sum.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, TypeVar

import msgspec

from hansa.errors import AccessError, PrivacyError, WireError
from hansa.homomorphic import ckks
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
        sites: those asked, sorted.
        key_site: who has the secret key; it need not be among those asked.
        encoding: what is summed, as integers.
        minimum: the fewest sites that may be summed, at least three.

    Raises:
        PrivacyError: terms that protect nobody, or sums that can't be decrypted.
    """

    job: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    round: Count
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
        return hashlib.sha256(b"hansa homomorphic terms v1\0" + pack(self)).digest()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels; ``session`` is the digest of the terms."""

    session: Hash


class Offer(Message, frozen=True, tag="homomorphic-offer"):
    """The key site's public key for one session.

    Attributes:
        public: the key, as :mod:`.ckks` takes it.
        credential: what proves who signed.
        signature: of :meth:`content`.
    """

    public: Annotated[bytes, msgspec.Meta(min_length=ckks.PUBLIC_BYTES, max_length=ckks.PUBLIC_BYTES)]
    credential: Credential
    signature: Signature = b""

    def content(self) -> bytes:
        """Return what is signed."""
        return b"hansa homomorphic offer v1\0" + self.session + hashlib.sha256(self.public).digest()


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="homomorphic-invitation"):
    """What a site is told before it encrypts anything."""

    terms: Terms
    offer: Offer


class Part(Message, frozen=True, tag="homomorphic-part"):
    """A part of the sum, to be opened.

    Attributes:
        survivors: whose ciphertexts are in it, sorted.
        first: which of the sum's ciphertexts it begins with, a multiple of ``PART``.
        words: up to ``PART`` ciphertexts.
    """

    survivors: Names
    first: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    words: Annotated[bytes, msgspec.Meta(max_length=PART * ckks.WORDS * 8)]


class Finish(Message, frozen=True, tag="homomorphic-finish"):
    """The sum is durable: the secret key has done its work."""


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
    """Check that a public key is the key site's own, for this session.

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
