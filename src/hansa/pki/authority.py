# SPDX-License-Identifier: Apache-2.0
"""The federation's authority: a folder with a key, that signs who belongs and who does no longer.

It talks to nobody. Its folder may lie on a machine without a network, and need not be the server operator's.

``key.pem`` (0600), ``certificate.pem``, ``roster.json`` (the newest, signed) and ``issued/SERIAL.pem``.

Certificates follow RFC 5280: the authority's may sign members' and no further authorities (path length 0); a server's
is for TLS servers only and everybody else's for TLS clients only; only a server's carries DNS names or addresses.

==========================================  ======================================================================
a folder that holds an authority            StorageError: nothing is overwritten
a request for another name, role or site    AccessError, nothing signed
a request that its own key did not sign     AccessError, nothing signed
a second key for a name that has one        AccessError, unless ``another_key``: an impostor's request looks the same
two commands at once                        one waits for the other
a crash while signing                       a certificate that no roster lists, which nobody admits
a revoked server certificate                every server needs a new one: the name that clients ask for has changed
==========================================  ======================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hansa.errors import AccessError, JobError, StorageError
from hansa.pki import keys, roster
from hansa.pki.identity import (
    AGENTS,
    FEDERATION,
    Certificate,
    Claim,
    Role,
    now,
    read_certificate,
    read_root,
    server_name,
)
from hansa.pki.kit import CERTIFICATE, KEY, ROSTER, Kit
from hansa.pki.request import FORMAT as REPLY_FORMAT
from hansa.pki.request import Reply, make_request, read_request, subject
from hansa.pki.roles import TABLE, Permission
from hansa.pki.roster import Body, Entry, Revocation, Roster

LIFETIMES = {role: timedelta(days=365 if role in AGENTS else 90) for role in Role}
AUTHORITY_LIFETIME = timedelta(days=3650)
CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin so much before they are made, for clocks that are late."""
RETENTION = timedelta(days=90)
"""Expired certificates stay listed for so long, so that the signatures made with them can be checked."""

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_DNS = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


class Authority:
    """The authority in a folder.

    Args:
        directory: its folder.
        clock: tells the time, in UTC.

    Raises:
        StorageError: there is no authority here.
        AccessError: its files are not those of one authority.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], datetime] = now) -> None:
        self.directory = directory
        self._clock = clock
        if not (directory / KEY).exists():
            raise StorageError(f"There is no authority in {directory}. `hansa pki init` makes one.")
        self._key = keys.read_key(keys.read(directory / KEY), directory / KEY)
        self.certificate_pem = keys.read(directory / CERTIFICATE)
        root = read_root(self.certificate_pem)
        self.federation = root.federation
        if keys.public_bytes(root.public_key) != keys.public_bytes(self._key.public_key()):
            raise AccessError(f"{directory / KEY} is not the key of {directory / CERTIFICATE}. Restore both together.")

    @classmethod
    def create(cls, directory: Path, federation: str, *, clock: Callable[[], datetime] = now) -> Authority:
        """Make a federation: its authority's key and certificate, and an empty roster.

        Raises:
            JobError: the federation's name is no DNS label.
            StorageError: the folder holds an authority or can't be written.
        """
        if not FEDERATION.fullmatch(federation):
            raise JobError(
                f"{federation[:100]!r} can't name a federation: use up to 63 small letters, digits and dashes."
            )
        key = keys.new_key()
        pem = _root(key, federation, clock())
        body = Body(roster.FORMAT, federation, 1, clock(), 0, {}, {})
        with _locked(directory):
            if (directory / KEY).exists():
                raise StorageError(f"{directory} holds an authority already. Choose another folder.")
            keys.write(directory / CERTIFICATE, pem, replace=True)
            keys.write(directory / ROSTER, Roster.seal(body, key, pem).data, replace=True)
            keys.write(directory / KEY, keys.key_pem(key), keys.PRIVATE)  # last: with it the authority exists
        return cls(directory, clock=clock)

    @classmethod
    def open(cls, directory: Path, *, clock: Callable[[], datetime] = now) -> Authority:
        """Return the authority in a folder; raises what the class does."""
        return cls(directory, clock=clock)

    @property
    def roster(self) -> Roster:
        """The newest roster."""
        return Roster.load(self.directory / ROSTER, self.certificate_pem)

    def sign(
        self,
        request_pem: bytes,
        role: Role,
        name: str,
        *,
        site: str | None = None,
        scopes: Iterable[str] = (),
        hosts: Iterable[str] = (),
        lifetime: timedelta | None = None,
        another_key: bool = False,
    ) -> bytes:
        """Sign a request, and a roster that lists the new certificate.

        Args:
            request_pem: the request.
            role: the role that the operator means to give; the request must ask for the same.
            name: the name that the operator means to give; the request must ask for the same.
            site: an admin's site; the request must ask for the same.
            scopes: the permissions to narrow the credential to; all of the role's by default.
            hosts: DNS names and addresses of a server, beside the federation's own name for it.
            lifetime: how long the certificate counts; a year for programs and 90 days for people by default.
            another_key: let a server or site have a second key.

        Returns:
            The certificate, PEM.

        Raises:
            AccessError: the request is bad or asks for something else, or the name has another key already.
            JobError: a name, scope, host or lifetime that can't be.
        """
        request = read_request(request_pem)
        claim = self._claim(role, name, site, scopes)
        asked = request.claim
        if (asked.federation, asked.member, asked.site) != (claim.federation, claim.member, claim.site):
            wanted = asked.uri.removeprefix("hansa://").partition("&scopes")[0].partition("?scopes")[0]
            raise AccessError(
                f"This request is for {wanted}, not for {claim.federation}/{claim.member}"
                f"{f' of {claim.site}' if claim.site else ''}. Nothing was signed."
            )
        with _locked(self.directory):
            return self._certify(claim, request.public_key, _names(claim, hosts), lifetime, another_key=another_key)

    def issue(
        self,
        directory: Path,
        role: Role,
        name: str,
        *,
        site: str | None = None,
        scopes: Iterable[str] = (),
        hosts: Iterable[str] = (),
        lifetime: timedelta | None = None,
        another_key: bool = False,
    ) -> Kit:
        """Make a key and its certificate here and write a whole kit: for people on this machine, and laboratories.

        Raises:
            StorageError: the folder holds a kit already.
            AccessError, JobError: as `sign`.
        """
        claim = self._claim(role, name, site, scopes)
        if (directory / KEY).exists():
            raise StorageError(f"{directory} holds a key already and is left as it is. Choose another folder.")
        key = keys.new_key()
        request = make_request(key, claim)
        pem = self.sign(
            request, role, name, site=site, scopes=scopes, hosts=hosts, lifetime=lifetime, another_key=another_key
        )
        keys.write(directory / KEY, keys.key_pem(key), keys.PRIVATE)
        return Kit.install(directory, self.reply(pem), at=self._clock())

    def renew(self, request_pem: bytes) -> bytes:
        """Sign a request by a key that has a certificate: the same again, from now on for as long as before.

        The old certificate counts until it ends by itself, so nothing is cut.

        Raises:
            AccessError: nobody of this name holds this key, or its certificate was revoked.
        """
        request = read_request(request_pem)
        with _locked(self.directory):
            held = [
                certificate
                for certificate in self._issued(request.claim.member)
                if keys.public_bytes(certificate.public_key) == keys.public_bytes(request.public_key)
            ]
            if not held:
                raise AccessError(
                    f"No certificate of {request.claim.member} that counts is over this key, so there is nothing to "
                    "renew. A new key needs `hansa pki sign`, with a name and role that you vouch for."
                )
            old = max(held, key=lambda certificate: certificate.starts)
            was = old.identity
            claim = self._claim(was.role, was.name, was.site, was.scopes)
            lifetime = was.expires - old.starts - CLOCK_SKEW
            return self._certify(claim, request.public_key, _hosts_of(old), lifetime, another_key=False)

    def revoke(self, who: str, reason: str) -> Roster:
        """Revoke a member's certificates, or one certificate, for good.

        Args:
            who: ``role/name``, a name that one role alone has, or a serial number in hex.
            reason: why, for those who will be refused.

        Returns:
            The new roster.

        Raises:
            JobError: nobody and nothing is called that, or several are; or there is no reason.
        """
        if not reason.strip() or len(reason) > 500:
            raise JobError("Give a reason of up to 500 letters: whoever is refused will see it.")
        with _locked(self.directory):
            body = self.roster.body
            gone = _find(body, who)
            at = self._clock()
            members = {
                member: tuple(entry for entry in entries if entry.serial not in gone)
                for member, entries in body.members.items()
            }
            revoked = {
                entry.serial: Revocation(member, reason.strip(), at, entry.expires)
                for member, entries in body.members.items()
                for entry in entries
                if entry.serial in gone
            }
            servers = any(Role(item.member.partition("/")[0]) is Role.SERVER for item in revoked.values())
            return self._publish(
                msgspec.structs.replace(
                    body,
                    members=members,
                    revoked=body.revoked | revoked,
                    generation=body.generation + servers,
                )
            )

    def refresh(self, above: int = 0) -> Roster:
        """Sign the roster anew, with a version above ``above``: what an authority restored from a backup needs."""
        with _locked(self.directory):
            body = self.roster.body
            return self._publish(msgspec.structs.replace(body, version=max(body.version, above)))

    def reply(self, certificate_pem: bytes) -> Reply:
        """Return the file to send back: the certificate, the authority's own, and the newest roster."""
        return Reply(REPLY_FORMAT, certificate_pem.decode(), self.certificate_pem.decode(), self.roster.data.decode())

    def _claim(self, role: Role, name: str, site: str | None, scopes: Iterable[str]) -> Claim:
        claim = Claim.of(self.federation, role, name, site, scopes)
        if unknown := claim.scopes - set(Permission):
            raise JobError(f"There is no scope {sorted(unknown)[0]!r}. Known: {', '.join(Permission)}.")
        if beyond := claim.scopes - set(TABLE[role]):
            raise JobError(f"A scope narrows a role, and the role {role} may not {sorted(beyond)[0]} to begin with.")
        return claim

    def _issued(self, member: str) -> list[Certificate]:
        entries = self.roster.members.get(member, ())
        return [read_certificate(keys.read(self.directory / "issued" / f"{entry.serial}.pem")) for entry in entries]

    def _certify(
        self,
        claim: Claim,
        key: keys.PublicKey,
        hosts: list[x509.GeneralName],
        lifetime: timedelta | None,
        *,
        another_key: bool,
    ) -> bytes:
        """Make, keep and list one certificate; the folder is locked."""
        body = self.roster.body
        root = read_root(self.certificate_pem).raw
        start = self._clock()
        lifetime = LIFETIMES[claim.role] if lifetime is None else lifetime
        if not timedelta(minutes=1) <= lifetime <= root.not_valid_after_utc - start:
            raise JobError(
                f"A certificate can't count for {lifetime}: at least a minute, and not beyond the authority's own end "
                f"on {root.not_valid_after_utc:%Y-%m-%d}."
            )
        end = (start + lifetime).replace(microsecond=0)  # a certificate has whole seconds
        self._check_name(claim, key, another_key=another_key)
        certificate = _leaf(claim, key, hosts, body, (start - CLOCK_SKEW, end), root).sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        serial = f"{certificate.serial_number:x}"
        keys.write(self.directory / "issued" / f"{serial}.pem", pem)
        entry = Entry(serial, certificate.fingerprint(hashes.SHA256()).hex(), end)
        entries = (*body.members.get(claim.member, ()), entry)
        self._publish(msgspec.structs.replace(body, members={**body.members, claim.member: entries}))
        return pem

    def _check_name(self, claim: Claim, key: keys.PublicKey, *, another_key: bool) -> None:
        if claim.role not in AGENTS:
            return
        if another_key:
            return
        for held in self._issued(claim.member):
            same = keys.public_bytes(held.public_key) == keys.public_bytes(key)
            if held.identity.expires > self._clock() and not same:
                raise AccessError(
                    f"{claim.member} has a certificate over another key (serial {held.identity.serial:x}). Is this "
                    "request really theirs? Ask them; then allow another key, or revoke the old certificate first."
                )

    def _publish(self, body: Body) -> Roster:
        """Sign and keep the next roster; what expired long ago is left out."""
        since = self._clock() - RETENTION
        members = {
            member: kept
            for member, entries in body.members.items()
            if (kept := tuple(entry for entry in entries if entry.expires > since))
        }
        revoked = {serial: item for serial, item in body.revoked.items() if item.expires > since}
        following = msgspec.structs.replace(
            body, version=body.version + 1, issued=self._clock(), members=members, revoked=revoked
        )
        sealed = Roster.seal(following, self._key, self.certificate_pem)
        keys.write(self.directory / ROSTER, sealed.data, replace=True)
        return sealed


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise StorageError(f"Can't write to {directory}: {error.strerror}.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find(body: Body, who: str) -> set[str]:
    """Return the serials that ``who`` stands for."""
    named = [member for member in body.members if who in (member, member.partition("/")[2])]
    serials = {entry.serial for entries in body.members.values() for entry in entries}
    if len(named) == 1:
        return {entry.serial for entry in body.members[named[0]]}
    if named:
        raise JobError(f"There are several called {who}: {', '.join(sorted(named))}. Say which.")
    if who.lower() in serials:
        return {who.lower()}
    if who.lower() in body.revoked:
        raise JobError(f"The certificate {who} is revoked already.")
    raise JobError(f"There is no member and no certificate {who!r}. `hansa pki show` lists them.")


def _names(claim: Claim, hosts: Iterable[str]) -> list[x509.GeneralName]:
    """Return a server's host names and addresses as a certificate has them."""
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        if claim.role is not Role.SERVER:
            raise JobError(f"Only a server's certificate carries host names; {claim.member} is none.")
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _DNS.fullmatch(host) or host.lower().endswith(".hansa"):
                raise JobError(f"{host[:100]!r} is no DNS name or address that a server may have.") from None
            names.append(x509.DNSName(host))
    return names


def _hosts_of(certificate: Certificate) -> list[x509.GeneralName]:
    """Return the hosts of a certificate: its names, but for those that every certificate of its role has."""
    names = certificate.raw.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [
        name
        for name in names
        if isinstance(name, x509.IPAddress) or (isinstance(name, x509.DNSName) and not name.value.endswith(".hansa"))
    ]


def _root(key: keys.PrivateKey, federation: str, start: datetime) -> bytes:
    """Return the authority's own certificate."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "Hansa authority"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"hansa://{federation}")]), critical=False
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _leaf(
    claim: Claim,
    key: keys.PublicKey,
    hosts: list[x509.GeneralName],
    body: Body,
    dates: tuple[datetime, datetime],
    root: x509.Certificate,
) -> x509.CertificateBuilder:
    """Return a member's certificate, to be signed."""
    server = claim.role is Role.SERVER
    own = [x509.DNSName(server_name(body.federation, body.generation))] if server else []
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(subject(claim))
        .issuer_name(root.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(dates[0])
        .not_valid_after(dates[1])
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(claim.uri), *own, *hosts]), critical=False
        )
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
