# SPDX-License-Identifier: Apache-2.0
"""A certificate says who somebody is, in one URI among its subject alternative names (RFC 5280, 4.2.1.6).

``hansa://FEDERATION/ROLE/NAME``, with ``?site=SITE`` for the admin of a site and ``?scopes=A,B`` where a credential
may do less than its role. A federation's name is a DNS label, because clients check that the server's certificate
carries ``server.FEDERATION.hansa``, wherever it is reached; other names are those of sites in jobs.

Reading a certificate does not vouch for it: :meth:`hansa.pki.roster.Roster.admit` does.

==========================================  ==========================================================
bytes that are no PEM, or two certificates  AccessError
another key than P-256                      AccessError
no ``hansa://`` URI, or two                 AccessError
an unknown role, a name out of form         AccessError
a certificate that may sign others          AccessError: an authority is nobody's identity
==========================================  ==========================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from hansa.errors import AccessError, JobError
from hansa.pki.keys import PublicKey, is_p256

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FEDERATION = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAX_PEM_BYTES = 64 << 10
"""No certificate or request of ours comes near this."""

UNREADABLE = (
    ValueError,  # and UnicodeDecodeError
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises on hostile certificates and requests."""


class Role(StrEnum):
    """What a certificate's holder is in the federation."""

    SERVER = "server"
    SITE = "site"
    LEAD = "lead"
    ADMIN = "admin"
    OBSERVER = "observer"


AGENTS = frozenset({Role.SERVER, Role.SITE})
"""Programs; the other roles are people."""


def now() -> datetime:
    """Return the time, to the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def server_name(federation: str, generation: int = 0) -> str:
    """Return the DNS name that every server's certificate carries and every client checks.

    A server whose certificate is revoked makes the next generation: clients that know the new roster ask for the new
    name, which the revoked certificate does not carry.

    >>> server_name("lab"), server_name("lab", 2)
    ('server.lab.hansa', 'server-2.lab.hansa')
    """
    return f"server-{generation}.{federation}.hansa" if generation else f"server.{federation}.hansa"


@dataclass(frozen=True)
class Claim:
    """Who somebody says to be: what a request asks for and a certificate confirms.

    Attributes:
        federation: the federation's name.
        role: the role in it.
        name: the site's, server's or person's name; unique within its role.
        site: the site whose admin this is; of no other role.
        scopes: the permissions that this credential is narrowed to; empty for all of its role.
    """

    federation: str
    role: Role
    name: str
    site: str | None = None
    scopes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, federation: str, role: Role, name: str, site: str | None = None, scopes: Iterable[str] = ()) -> Claim:
        """Return a claim whose names have been checked.

        Raises:
            JobError: a name is out of form, or an admin without a site.
        """
        if not FEDERATION.fullmatch(federation):
            raise JobError(
                f"{federation[:100]!r} can't name a federation: use up to 63 small letters, digits and dashes."
            )
        for word in (name, site):
            if word is not None and not NAME.fullmatch(word):
                raise JobError(
                    f"{word[:100]!r} can't be a name: use up to 100 letters, digits, dots, dashes and underscores, "
                    "a letter or digit first."
                )
        if (site is not None) != (role is Role.ADMIN):
            raise JobError("An admin is the admin of one site: give its name." if site is None else _NO_SITE)
        return cls(federation, role, name, site, frozenset(scopes))

    @property
    def member(self) -> str:
        """Role and name, such as ``site/hospital-a``: the key of the roster."""
        return f"{self.role}/{self.name}"

    @property
    def uri(self) -> str:
        """The URI that stands in a certificate."""
        query = [f"site={self.site}"] if self.site else []
        query += [f"scopes={','.join(sorted(self.scopes))}"] if self.scopes else []
        return f"hansa://{self.federation}/{self.member}" + (f"?{'&'.join(query)}" if query else "")


_NO_SITE = "Only an admin's certificate names a site beside its own name."

_URI = re.compile(
    rf"hansa://(?P<federation>{FEDERATION.pattern})/(?P<role>{'|'.join(Role)})/(?P<name>{NAME.pattern})"
    rf"(?:\?(?:site=(?P<site>{NAME.pattern}))?&?(?:scopes=(?P<scopes>[a-z]+(?:,[a-z]+)*))?)?"
)


def read_claim(names: x509.SubjectAlternativeName) -> Claim:
    """Read the one ``hansa://`` URI among the names of a certificate or request.

    Raises:
        ValueError: there is none, there are several, or it is out of form.
    """
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("hansa:")]
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if not match:
        raise ValueError("it names no one member of a federation")
    scopes = match["scopes"].split(",") if match["scopes"] else ()
    claim = Claim(match["federation"], Role(match["role"]), match["name"], match["site"], frozenset(scopes))
    if claim.uri != uris[0] or (claim.site is not None) != (claim.role is Role.ADMIN):
        raise ValueError("it names no one member of a federation")
    return claim


@dataclass(frozen=True, kw_only=True)
class Identity(Claim):
    """Who the holder of a certificate is.

    Attributes:
        serial: the certificate's serial number, up to 159 bits.
        expires: when the certificate ends.
    """

    serial: int
    expires: datetime

    @property
    def at_site(self) -> str | None:
        """The site that this identity acts for: a site's own name, an admin's site, nothing for others."""
        return self.name if self.role is Role.SITE else self.site


@dataclass(frozen=True)
class Certificate:
    """A certificate that has been read, not vouched for.

    Attributes:
        identity: whom it names.
        starts: when it begins.
        fingerprint: the SHA-256 of its DER, in hex.
        public_key: its holder's key.
        raw: all of it.
    """

    identity: Identity
    starts: datetime
    fingerprint: str
    public_key: PublicKey
    raw: x509.Certificate


@lru_cache(maxsize=4096)
def read_certificate(pem: bytes) -> Certificate:
    """Read a member's certificate. Repeated calls are cheap.

    Raises:
        AccessError: it is no certificate of a federation's member.
    """
    try:
        raw = _one(pem)
        key = raw.public_key()
        if raw.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("it is an authority's")
        claim = read_claim(raw.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        serial, starts, expires = raw.serial_number, raw.not_valid_before_utc, raw.not_valid_after_utc
    except UNREADABLE as error:
        raise AccessError(f"This is no certificate of a federation's member: {error}.") from error
    assert isinstance(key, PublicKey)
    identity = Identity(
        claim.federation, claim.role, claim.name, claim.site, claim.scopes, serial=serial, expires=expires
    )
    return Certificate(identity, starts, raw.fingerprint(hashes.SHA256()).hex(), key, raw)


def identity_of(certificate_pem: bytes) -> Identity:
    """Return whom a certificate names; whether it counts is said by the roster alone.

    Raises:
        AccessError: it is no certificate of a federation's member.
    """
    return read_certificate(certificate_pem).identity


@dataclass(frozen=True)
class Root:
    """An authority's certificate.

    Attributes:
        federation: the federation that it founds.
        fingerprint: the SHA-256 of its DER, in hex: what people compare by telephone.
        public_key: the key that signs certificates and rosters.
        raw: all of it.
    """

    federation: str
    fingerprint: str
    public_key: PublicKey
    raw: x509.Certificate


@lru_cache(maxsize=64)
def read_root(pem: bytes) -> Root:
    """Read an authority's certificate.

    Raises:
        AccessError: it is none.
    """
    try:
        raw = _one(pem)
        key = raw.public_key()
        if not raw.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("it may not sign certificates")
        raw.verify_directly_issued_by(raw)
        names = raw.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        federation = uri.removeprefix("hansa://")
        if uri == federation or not FEDERATION.fullmatch(federation):
            raise ValueError("it names no federation")
    except (*UNREADABLE, InvalidSignature) as error:
        raise AccessError(f"This is no authority's certificate: {error}.") from error
    assert isinstance(key, PublicKey)
    return Root(federation, raw.fingerprint(hashes.SHA256()).hex(), key, raw)


def _one(pem: bytes) -> x509.Certificate:
    """Return the one certificate in ``pem``, of a P-256 key, or raise one of `UNREADABLE`."""
    if len(pem) > MAX_PEM_BYTES:
        raise ValueError(f"it has {len(pem):,} bytes")
    (raw,) = x509.load_pem_x509_certificates(pem)
    if not is_p256(raw.public_key()):
        raise ValueError("its key is not P-256")
    return raw
