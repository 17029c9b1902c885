# SPDX-License-Identifier: Apache-2.0
"""Who is who in a federation: certificates, the roster that says which of them count, and what each role may do.

One authority signs everything. Its key may lie on a machine that is never connected: what it makes are files.

```
site: key ──request──> authority ──reply──> site's kit        (the key never leaves the site)
                           └── roster, signed, its version only rises ──> server and sites
```

========================  ============================================================================
:mod:`~.identity`         a certificate says who somebody is: federation, role, name
:mod:`~.roles`            the table of what each role may do
:mod:`~.request`          a site's request for a certificate, and the authority's reply
:mod:`~.roster`           the signed list of certificates that count; its ``admit`` is made at every call
:mod:`~.authority`        makes a federation; signs, renews, revokes
:mod:`~.kit`              the files that a server, site or person holds
:mod:`~.provision`        all of it in one go, for a laboratory
========================  ============================================================================
"""

from hansa.errors import MissingExtraError

try:
    import cryptography  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("Certificates need cryptography. Install it: pip install 'hansa[network]'") from error
