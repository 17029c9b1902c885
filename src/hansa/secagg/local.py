# SPDX-License-Identifier: Apache-2.0
"""Identities for sites that all run under one user, as in a simulation: Ed25519 keys (RFC 8032) that one process makes.

They make the protocol run whole; they keep no secret from whoever runs the simulation.

| case | result |
|---|---|
| a signature of another site, or of other bytes | AccessError |
| a site that is not among them | AccessError |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hansa.errors import AccessError


class LocalSigner:
    """One site's key, and the public keys of all (a :class:`~hansa.secagg.protocol.Signer`)."""

    def __init__(self, key: Ed25519PrivateKey, known: Mapping[str, Ed25519PublicKey]) -> None:
        self._key, self._known = key, known

    def credential(self) -> bytes:
        """Return nothing: everybody knows everybody's key."""
        return b""

    def sign(self, data: bytes) -> bytes:
        """Return this site's signature of ``data``."""
        return self._key.sign(data)

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        """Check that ``site`` made ``signature``; AccessError if not."""
        if site not in self._known:
            raise AccessError(f"{site!r} is no site of this federation.")
        if not _holds(self._known[site].public_bytes_raw(), data, signature):
            raise AccessError(f"The signature is not that of {site!r} over these bytes.")


@lru_cache(maxsize=1 << 14)
def _holds(key: bytes, data: bytes, signature: bytes) -> bool:
    """Say whether a signature holds; all sites are here, so what one has checked the others need not check again."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def local_signers(sites: Iterable[str]) -> dict[str, LocalSigner]:
    """Make a key for each site."""
    keys = {site: Ed25519PrivateKey.generate() for site in sites}
    known = {site: key.public_key() for site, key in keys.items()}
    return {site: LocalSigner(key, known) for site, key in keys.items()}
