# SPDX-License-Identifier: Apache-2.0
"""A kit: the folder with what a server, site or person shows and checks.

``key.pem`` (0600, made here, leaves never), ``certificate.pem``, ``authority.pem`` and ``roster.json``. Files that
change are read again, so a renewal or a new roster needs no restart.

===============================================  ================================================================
a certificate renewed with another key           read together with its key: the certificate is the last file to
                                                 change, and until then ``next-key.pem`` waits beside ``key.pem``
changed files that are bad, or an older roster   the last good ones stay in use, with a warning in the log
another authority than the one pinned            the same
a roster from the network                        used if the authority signed it and its version rises, and then
                                                 durable before it is used
===============================================  ================================================================
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hansa.errors import AccessError, HansaError, StorageError
from hansa.pki import keys
from hansa.pki.identity import Claim, Identity, read_certificate, read_root
from hansa.pki.request import Reply, make_request
from hansa.pki.roster import Roster

KEY = "key.pem"
NEXT_KEY = "next-key.pem"
CERTIFICATE = "certificate.pem"
AUTHORITY = "authority.pem"
ROSTER = "roster.json"
REQUEST = "request.pem"

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class _Files:
    """What the files said when they were last good."""

    key: keys.PrivateKey
    key_pem: bytes
    certificate_pem: bytes
    authority_pem: bytes
    roster: Roster
    identity: Identity


class Kit:
    """The kit in a folder; safe to use from several threads.

    Args:
        directory: its folder.

    Raises:
        StorageError: a file is missing or can't be read.
        AccessError: the files do not belong together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._watched = [str(directory / name) for name in (CERTIFICATE, ROSTER, AUTHORITY, KEY, NEXT_KEY)]
        self._stamp = self._stamps()
        self._files = self._load(None)

    @property
    def identity(self) -> Identity:
        """Whom the certificate names."""
        return self._current().identity

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self._current().identity.federation

    @property
    def server_name(self) -> str:
        """The DNS name to ask of the server's certificate (gRPC: ``grpc.ssl_target_name_override``)."""
        return self._current().roster.server_name

    def pair(self) -> tuple[bytes, bytes]:
        """Return private key and certificate, PEM, that belong together even while files change."""
        files = self._current()
        return files.key_pem, files.certificate_pem

    def key_pem(self) -> bytes:
        """Return the private key, PKCS #8 PEM."""
        return self._current().key_pem

    def certificate_pem(self) -> bytes:
        """Return the certificate, PEM."""
        return self._current().certificate_pem

    def authority_pem(self) -> bytes:
        """Return the authority's certificate, PEM: the one root that TLS is to trust."""
        return self._current().authority_pem

    def roster(self) -> Roster:
        """Return the newest roster."""
        return self._current().roster

    def sign(self, data: bytes) -> bytes:
        """Return this kit's signature of ``data``, which `verify` checks."""
        return keys.sign(self._current().key, "data", data)

    def update_roster(self, data: bytes) -> bool:
        """Take a roster that came from anywhere; say whether it was news.

        Raises:
            WireError, AccessError: it is no roster of this federation's authority, or older than the one held.
            StorageError: it can't be kept.
        """
        with self._lock:
            files = self._current()
            roster = Roster.read(data, files.authority_pem)
            if not roster.succeeds(files.roster):
                return False
            keys.write(self.directory / ROSTER, data, replace=True)
            self._current()
            return True

    @classmethod
    def install(cls, directory: Path, reply: Reply, *, authority: str | None = None, at: datetime | None = None) -> Kit:
        """Put the authority's reply beside the key that it is for.

        Args:
            directory: the folder with the key, where a request was made.
            reply: the authority's reply.
            authority: the SHA-256 fingerprint in hex that the authority's certificate must have, as its operator told
                it by another way; colons and case do not matter. A kit that is renewed has its authority already.
            at: the time that the certificate's dates are held against; now by default.

        Raises:
            AccessError: the certificate is for another key, of another authority than the one pinned or named, or not
                in the roster that came with it.
        """
        certificate_pem, authority_pem = reply.certificate.encode(), reply.authority.encode()
        root = read_root(authority_pem)
        if authority is not None and authority.replace(":", "").lower() != root.fingerprint:
            raise AccessError(
                f"This reply is from an authority with the fingerprint {root.fingerprint}, not the one you named. "
                "Nothing was installed; ask the authority's operator."
            )
        pinned = directory / AUTHORITY
        if pinned.exists() and keys.read(pinned) != authority_pem:
            raise AccessError(f"This reply is from another authority than {pinned}. Nothing was installed.")
        roster = Roster.read(reply.roster.encode(), authority_pem)
        roster.admit(certificate_pem, at)
        if (directory / ROSTER).exists():
            held = Roster.load(directory / ROSTER, authority_pem)
            roster = roster if held.version < roster.version or roster.succeeds(held) else held
        _key_of(directory, certificate_pem)
        keys.write(pinned, authority_pem, replace=True)
        keys.write(directory / ROSTER, roster.data, replace=True)
        keys.write(directory / CERTIFICATE, certificate_pem, replace=True)  # last: with it the kit is a new one
        _settle(directory)
        return cls(directory)

    def renewal(self, *, new_key: bool = False) -> bytes:
        """Make the request for the next certificate, over this key or a new one that waits in ``next-key.pem``."""
        files = self._current()
        key = files.key
        if new_key:
            key = keys.new_key()
            keys.write(self.directory / NEXT_KEY, keys.key_pem(key), keys.PRIVATE, replace=True)
        pem = make_request(key, files.identity)
        keys.write(self.directory / REQUEST, pem, replace=True)
        return pem

    def _current(self) -> _Files:
        stamp = self._stamps()
        if stamp == self._stamp:
            return self._files
        with self._lock:
            if stamp != self._stamp:
                try:
                    self._files = self._load(self._files)
                except HansaError as error:
                    log.warning(
                        "%s changed and is not used; what was read before stays in use: %s", self.directory, error
                    )
                self._stamp = stamp
            return self._files

    def _stamps(self) -> _Stamp:
        return tuple(map(_stamp, self._watched))

    def _load(self, held: _Files | None) -> _Files:
        certificate_pem = keys.read(self.directory / CERTIFICATE)
        authority_pem = keys.read(self.directory / AUTHORITY)
        certificate = read_certificate(certificate_pem)
        path, pem = _key_of(self.directory, certificate_pem)
        roster = Roster.load(self.directory / ROSTER, authority_pem)
        if roster.federation != certificate.identity.federation:
            raise AccessError(f"{self.directory}: certificate and roster are of two federations.")
        if held and not roster.succeeds(held.roster):
            roster = held.roster
        return _Files(keys.read_key(pem, path), pem, certificate_pem, authority_pem, roster, certificate.identity)


def verify(data: bytes, signature: bytes, certificate_pem: bytes) -> None:
    """Check that ``signature`` is that of ``data`` by a certificate's holder (`Kit.sign`).

    Whether the certificate counts is another question: ask `Roster.admit`, at the time of signing.

    Raises:
        AccessError: it is not, or this is no certificate.
    """
    certificate = read_certificate(certificate_pem)
    if not keys.signed(certificate.public_key, "data", data, signature):
        raise AccessError(
            f"The signature is not that of {certificate.identity.member} over these bytes: they were altered, or "
            "somebody else signed them. Nothing of them is used."
        )


def request(directory: Path, claim: Claim) -> bytes:
    """Make a key in ``directory``, which never leaves it, and the request to send to the authority.

    A key that is there already is used again, so that a lost request can be made anew.

    Raises:
        StorageError: the folder holds a whole kit, or can't be written.
    """
    if (directory / CERTIFICATE).exists():
        raise StorageError(f"{directory} holds a certificate already. `hansa pki renew` asks for the next one.")
    path = directory / KEY
    if path.exists():
        key = keys.read_key(keys.read(path), path)
    else:
        key = keys.new_key()
        keys.write(path, keys.key_pem(key), keys.PRIVATE)
    pem = make_request(key, claim)
    keys.write(directory / REQUEST, pem, replace=True)
    return pem


def _key_of(directory: Path, certificate_pem: bytes) -> tuple[Path, bytes]:
    """Return the key file in ``directory`` that a certificate is for, and its bytes."""
    wanted = keys.public_bytes(read_certificate(certificate_pem).public_key)
    paths = [path for path in (directory / KEY, directory / NEXT_KEY) if path.exists()]
    for path in paths:
        pem = keys.read(path)
        if keys.public_bytes(keys.read_key(pem, path).public_key()) == wanted:
            return path, pem
    if not paths:
        raise StorageError(f"There is no key in {directory}. `hansa pki request` makes one.")
    raise AccessError(f"The certificate is for another key than the one in {directory}.")


def _settle(directory: Path) -> None:
    """Let a new key that has its certificate become the key."""
    path, _ = _key_of(directory, keys.read(directory / CERTIFICATE))
    if path.name == NEXT_KEY:
        path.replace(directory / KEY)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - made at every call, and pathlib takes twice as long
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
