# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation: the server learns a sum over sites, and nothing else of any site.

========================  ============================================================================
:mod:`~.protocol`         who calls what in which order, what is promised; terms, messages, signatures
:mod:`~.site`             a site's side
:mod:`~.server`           the server's side
:mod:`~.ranges`           what a job sums, and between which bounds
:mod:`~.agreement`        a session's terms
:mod:`~.ring`             floats as integers modulo 2^32 or 2^64, and back
:mod:`~.graph`            who shares masks with whom, and how many must answer
:mod:`~.keys`             key agreement, sealed boxes, masks
:mod:`~.shamir`           t-of-n sharing of secrets
:mod:`~.local`            identities for a simulation, where nobody has a certificate
========================  ============================================================================
"""
