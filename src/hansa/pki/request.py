# SPDX-License-Identifier: Apache-2.0
"""A request for a certificate (PKCS #10, RFC 2986), and the authority's reply.

A request is signed with the key that it is for, so nobody can ask for a certificate over a key that they don't hold.
Of what it asks, the authority reads the claim and the key and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from hansa.errors import AccessError, VersionError, WireError
from hansa.pki.identity import MAX_PEM_BYTES, UNREADABLE, Claim, read_claim
from hansa.pki.keys import PrivateKey, PublicKey, is_p256

FORMAT = 1
MAX_REPLY_BYTES = 32 << 20


@dataclass(frozen=True)
class Request:
    """A request whose signature has been checked.

    Attributes:
        claim: who its maker wants to be.
        public_key: the key that its maker holds.
    """

    claim: Claim
    public_key: PublicKey


def subject(claim: Claim) -> x509.Name:
    """Return the subject that people see in other tools; identity is in the URI alone."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, claim.federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, claim.role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, claim.name[:64]),  # X.520 allows no more
        ]
    )


def make_request(key: PrivateKey, claim: Claim) -> bytes:
    """Return a PEM request for a certificate over ``key``."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(claim.uri)])
    builder = x509.CertificateSigningRequestBuilder(subject(claim)).add_extension(names, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> Request:
    """Read a request and check that its maker holds the key.

    Raises:
        AccessError: it is no request, or not signed by its own key.
    """
    try:
        if len(pem) > MAX_PEM_BYTES:
            raise ValueError(f"it has {len(pem):,} bytes")
        raw = x509.load_pem_x509_csr(pem)
        key = raw.public_key()
        if not is_p256(key):
            raise ValueError("its key is not P-256")
        claim = read_claim(raw.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        valid = raw.is_signature_valid
    except UNREADABLE as error:
        raise AccessError(
            f"This is no request for a federation's certificate: {error}. `hansa pki request` makes one."
        ) from error
    if not valid:
        raise AccessError(f"The request of {claim.member} is not signed by the key it is for. Don't sign it.")
    assert isinstance(key, PublicKey)
    return Request(claim, key)


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the authority sends back, in one file without secrets.

    Attributes:
        format: the version of this file's format.
        certificate: the new certificate, PEM.
        authority: the authority's, PEM.
        roster: the signed roster that lists the new certificate.
    """

    format: int
    certificate: str
    authority: str
    roster: str

    def write(self) -> bytes:
        """Return the bytes of the file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def read_reply(data: bytes) -> Reply:
    """Read a reply; its parts are not vouched for yet.

    Raises:
        WireError: it is none, or of another format.
    """
    if len(data) > MAX_REPLY_BYTES:
        raise WireError(f"This reply has {len(data):,} bytes; no authority writes one so large.")
    try:
        reply = msgspec.json.decode(data, type=Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"This is no reply of an authority: {error}. `hansa pki sign` writes one.") from error
    if reply.format != FORMAT:
        raise VersionError(f"This reply is of format {reply.format}; this release reads {FORMAT}.")
    return reply
