# SPDX-License-Identifier: Apache-2.0
"""Identities for sites that all run under one user, as in a simulation: Ed25519 keys (RFC 8032) from secrets at hand.

They make the protocol run whole; they keep no secret from whoever runs the simulation.

| case | result |
|---|---|
| a signature of another site, or of other bytes | AccessError |
| a site without a secret | AccessError |
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hansa.errors import AccessError


class LocalSigner:
    """One site among others whose secrets are known too (a :class:`~hansa.secagg.protocol.Signer`).

    Args:
        site: whose signatures are made.
        secret_of: site -> the 32 bytes that its key is made from; None if there is no such site.
    """

    def __init__(self, site: str, secret_of: Callable[[str], bytes | None]) -> None:
        self._site, self._secret_of = site, secret_of

    def credential(self) -> bytes:
        """Return nothing: everybody can work out everybody's key."""
        return b""

    def sign(self, data: bytes) -> bytes:
        """Return this site's signature of ``data``."""
        return Ed25519PrivateKey.from_private_bytes(self._secret(self._site)).sign(data)

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        """Check that ``site`` made ``signature``; AccessError if not."""
        if not _holds(self._secret(site), data, signature):
            raise AccessError(f"The signature is not that of {site!r} over these bytes.")

    def _secret(self, site: str) -> bytes:
        secret = self._secret_of(site)
        if secret is None:
            raise AccessError(f"{site!r} is no site of this federation.")
        return secret


@lru_cache(maxsize=1 << 14)
def _holds(secret: bytes, data: bytes, signature: bytes) -> bool:
    """Say whether a signature holds; all sites are here, so what one has checked the others need not check again."""
    try:
        _public_key(secret).verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=1 << 12)
def _public_key(secret: bytes) -> Ed25519PublicKey:
    return Ed25519PrivateKey.from_private_bytes(secret).public_key()


def local_signers(sites: Iterable[str]) -> dict[str, LocalSigner]:
    """Make a key for each site."""
    known = {site: secrets.token_bytes(32) for site in sites}
    return {site: LocalSigner(site, known.get) for site in known}
