# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation: the server learns a sum over sites, and nothing else of any site.

========================  ============================================================================
:mod:`~.protocol`         who calls what in which order, what is promised; terms, messages, signatures
:mod:`~.site`             a site's side
:mod:`~.server`           the server's side
:mod:`~.ring`             floats as integers modulo 2^32 or 2^64, and back
:mod:`~.graph`            who shares masks with whom, and how many must answer
:mod:`~.keys`             key agreement, sealed boxes, masks
:mod:`~.shamir`           t-of-n sharing of secrets
:mod:`~.local`            identities for a simulation, where nobody has a certificate
========================  ============================================================================
"""

from hansa.errors import MissingExtraError

try:
    import cryptography  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "Secure aggregation needs cryptography. Install it: pip install 'hansa[network]'"
    ) from error
