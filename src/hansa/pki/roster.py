# SPDX-License-Identifier: Apache-2.0
"""The roster: which certificates count, signed by the federation's authority.

``{"roster": {...}, "signature": "BASE64"}``. The signature is over the bytes of ``roster`` just as they stand in the
file, so there is no canonical form to get wrong. Server and sites hold the newest one that they have seen; anybody may
carry a newer one to them, since only the authority can make it.

=======================================  =====================================================================
a roster signed by another key           AccessError
one of another federation                AccessError
one older than the roster held           AccessError (:meth:`Roster.succeeds`): nobody can undo a revocation
another one of the same version          AccessError: an authority that says two things is not to be followed
bytes that are no roster                 WireError; another format: VersionError
a certificate of another authority       AccessError, whatever it says
one not begun, expired or revoked        AccessError
one that the authority signed, unlisted  AccessError: whoever issues a certificate does so before everyone's eyes
=======================================  =====================================================================
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature

from hansa.errors import AccessError, VersionError, WireError
from hansa.pki import keys
from hansa.pki.identity import (
    UNREADABLE,
    Certificate,
    Identity,
    Role,
    now,
    read_certificate,
    read_root,
    server_name,
)

FORMAT = 1
MAX_BYTES = 16 << 20
"""Room for 50,000 certificates."""

Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate that counts.

    Attributes:
        serial: its serial number in hex.
        fingerprint: the SHA-256 of its DER in hex.
        expires: when it ends. It stays listed for a while after that, for those who check old signatures.
    """

    serial: str
    fingerprint: str
    expires: Time


class Revocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate that counts no more.

    Attributes:
        member: whose it was, such as ``site/hospital-a``.
        reason: why, as the authority's operator said.
        at: when.
        expires: when it would have ended by itself.
    """

    member: str
    reason: str
    at: Time
    expires: Time


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is signed.

    Attributes:
        format: the version of this format.
        federation: the federation's name.
        version: rises with every roster.
        issued: when it was signed.
        generation: of the servers' certificates; it rises when one of them is revoked.
        members: role/name -> certificates.
        revoked: serial in hex -> revocation.
    """

    format: int
    federation: str
    version: Annotated[int, msgspec.Meta(ge=1)]
    issued: Time
    generation: Annotated[int, msgspec.Meta(ge=0)]
    members: dict[str, tuple[Entry, ...]]
    revoked: dict[str, Revocation]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    roster: msgspec.Raw
    signature: str


class _Format(msgspec.Struct):
    format: int


class Roster:
    """A roster that the authority signed: made by `read`, `load` or `seal`, and by nothing else.

    Attributes:
        body: what it says.
        data: its file's bytes.
        authority_pem: the authority whose signature it bears.
    """

    def __init__(self, body: Body, data: bytes, authority_pem: bytes) -> None:
        self.body = body
        self.data = data
        self.authority_pem = authority_pem
        self._listed = {entry.fingerprint for entries in body.members.values() for entry in entries}

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self.body.federation

    @property
    def version(self) -> int:
        """The number that rises with every roster."""
        return self.body.version

    @property
    def issued(self) -> datetime:
        """When the authority signed it."""
        return self.body.issued

    @property
    def members(self) -> Mapping[str, tuple[Entry, ...]]:
        """Role/name -> the certificates that count."""
        return self.body.members

    @property
    def sites(self) -> list[str]:
        """The names of the federation's sites, sorted."""
        prefix = f"{Role.SITE.value}/"
        return sorted(name.removeprefix(prefix) for name in self.members if name.startswith(prefix))

    @property
    def revoked(self) -> Mapping[str, Revocation]:
        """Serial in hex -> revocation."""
        return self.body.revoked

    @property
    def server_name(self) -> str:
        """The DNS name to ask of the server's certificate (gRPC: ``grpc.ssl_target_name_override``)."""
        return server_name(self.body.federation, self.body.generation)

    @classmethod
    def seal(cls, body: Body, key: keys.PrivateKey, authority_pem: bytes) -> Roster:
        """Sign a roster with the authority's key."""
        payload = msgspec.json.encode(body)
        signature = base64.b64encode(keys.sign(key, "roster", payload)).decode()
        return cls(body, msgspec.json.encode(_Sealed(msgspec.Raw(payload), signature)), authority_pem)

    @classmethod
    def read(cls, data: bytes, authority_pem: bytes) -> Roster:
        """Read a roster and check its signature.

        Raises:
            WireError: these bytes are no roster; VersionError where they are one of another format.
            AccessError: another key signed it, or it is another federation's.
        """
        root = read_root(authority_pem)
        if len(data) > MAX_BYTES:
            raise WireError(f"This roster has {len(data):,} bytes; more than {MAX_BYTES:,} are not read.")
        try:
            sealed = msgspec.json.decode(data, type=_Sealed)
            payload = bytes(sealed.roster)
            signature = base64.b64decode(sealed.signature, validate=True)
        except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as error:
            raise WireError(f"This is no roster: {error}.") from error
        if not keys.signed(root.public_key, "roster", payload, signature):
            raise AccessError(
                f"This roster was not signed by the authority of {root.federation}, or was altered. Nothing of it is "
                "used; ask the authority's operator for the true one."
            )
        try:
            form = msgspec.json.decode(payload, type=_Format).format
            if form != FORMAT:
                raise VersionError(f"This roster is of format {form}; this release reads {FORMAT}.")
            body = msgspec.json.decode(payload, type=Body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"This is no roster: {error}.") from error
        if body.federation != root.federation:
            raise AccessError(f"This roster is that of {body.federation!r}, not of {root.federation!r}.")
        return cls(body, data, authority_pem)

    @classmethod
    def load(cls, path: Path, authority_pem: bytes) -> Roster:
        """Read a roster's file; raises what `read` does, and StorageError where there is none."""
        return cls.read(keys.read(path), authority_pem)

    def succeeds(self, held: Roster) -> bool:
        """Say whether this roster is newer than ``held``; False if it is the same one.

        Raises:
            AccessError: it is older, of another authority, or another one of the same version.
        """
        if self.authority_pem != held.authority_pem:
            raise AccessError("This roster is another authority's than the one held.")
        if self.version < held.version:
            raise AccessError(
                f"This roster has version {self.version}, older than the {held.version} that is held. It is not used: "
                "an old roster would bring revoked certificates back."
            )
        if self.version == held.version and self.body != held.body:
            raise AccessError(
                f"There are two rosters of version {held.version}. Was the authority restored from a backup? "
                "The one held stays in use; have the authority sign a later one."
            )
        return self.version > held.version

    def admit(self, certificate_pem: bytes, at: datetime | None = None) -> Identity:
        """Return whom a certificate names, if it counts: the check made at every call.

        Args:
            certificate_pem: the peer's certificate, as TLS has it.
            at: the time that its dates are held against; now by default, or when a signature was made.

        Raises:
            AccessError: another authority signed it, it has not begun, has expired, was revoked, or is not listed.
        """
        certificate = _vouched(certificate_pem, self.authority_pem)
        who = certificate.identity
        at = at or now()
        serial = f"{who.serial:x}"
        if serial in self.body.revoked:
            gone = self.body.revoked[serial]
            raise AccessError(
                f"The certificate {serial} of {who.member} was revoked on {gone.at:%Y-%m-%d}: {gone.reason}. "
                "Ask the federation's authority for a new one."
            )
        if at > who.expires:
            raise AccessError(
                f"The certificate {serial} of {who.member} expired on {who.expires:%Y-%m-%d %H:%M} UTC. "
                "`hansa pki renew` asks for the next one."
            )
        if at < certificate.starts:
            raise AccessError(
                f"The certificate {serial} of {who.member} begins on {certificate.starts:%Y-%m-%d %H:%M} UTC, and here "
                f"it is {at:%Y-%m-%d %H:%M}. Set this machine's clock."
            )
        if certificate.fingerprint not in self._listed:
            raise AccessError(
                f"The certificate {serial} of {who.member} is not in the roster (version {self.version}). "
                "If it is new, bring the newer roster that came with it."
            )
        return who


@lru_cache(maxsize=4096)
def _vouched(certificate_pem: bytes, authority_pem: bytes) -> Certificate:
    """Read a certificate that this authority signed; what never changes about it is checked once."""
    root = read_root(authority_pem)
    certificate = read_certificate(certificate_pem)
    try:
        certificate.raw.verify_directly_issued_by(root.raw)
    except (InvalidSignature, *UNREADABLE) as error:
        raise AccessError(
            f"The certificate of {certificate.identity.member} was not signed by the authority of {root.federation}."
        ) from error
    if certificate.identity.federation != root.federation:
        raise AccessError(f"The certificate of {certificate.identity.member} is of another federation.")
    return certificate
