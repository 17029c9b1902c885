# SPDX-License-Identifier: Apache-2.0
"""Who signed what in secure aggregation: sites' certificates, as the pinned roster admits them at the moment.

| case | result |
|---|---|
| a certificate of another site, or of a person or server | AccessError |
| one that was revoked, has expired, or is not in the roster | AccessError |
| a signature over other bytes, or by another key | AccessError |
| a certificate that is renewed, with another key, between a site's two signatures | the second is not accepted |
"""

from __future__ import annotations

from hansa.errors import AccessError
from hansa.pki.identity import Role
from hansa.pki.kit import Kit, verify


class Identities:
    """Tells sites' signatures by a kit's roster, and makes those of the kit's own site.

    It is a ``hansa.secagg.protocol.Signer``; a server's kit only checks.

    Args:
        kit: who this is, and whom it trusts.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def credential(self) -> bytes:
        """Return this site's certificate."""
        return self._kit.certificate_pem()

    def sign(self, data: bytes) -> bytes:
        """Return this site's signature of ``data``."""
        return self._kit.sign(data)

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        """Check that ``site`` made ``signature``, with a certificate that counts now.

        Raises:
            AccessError: it did not, or not with such a one.
        """
        who = self._kit.roster().admit(credential)
        if (who.role, who.name) != (Role.SITE, site):
            raise AccessError(f"The certificate is that of {who.member}, not of site/{site}.")
        verify(data, signature, credential)
