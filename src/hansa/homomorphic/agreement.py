# SPDX-License-Identifier: Apache-2.0
"""What a job's words on homomorphic encryption mean: what is summed, who has the key, and what it costs.

Server and sites work the terms out by themselves, from the job and the tensors' shapes, as for masks
(:mod:`hansa.secagg.agreement`); a site refuses a session whose terms are others.

An element of the sum over n sites is off by at most n · step / 2, from rounding alone: encryption adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hansa.core.config import HomomorphicEncryptionSection
from hansa.errors import FitError, PrivacyError
from hansa.homomorphic import ckks
from hansa.homomorphic.protocol import Terms
from hansa.secagg.ranges import FINE, Bounds, Shapes, shapes_in, spans
from hansa.secagg.ring import SCALARS, Range, encoding

COUNT = ":sites"
"""A one of each site, among the numbers that are summed."""

_SECONDS = 2.7e-3
"""To encrypt one ciphertext, about, on one core (benchmarks/homomorphic.py)."""


@dataclass(frozen=True)
class Cost:
    """What one site pays for one update.

    Attributes:
        elements: how many numbers are summed.
        num_bytes: of the ciphertexts that it sends.
        seconds: to encrypt them, about, on one core.
    """

    elements: int
    num_bytes: int
    seconds: float


def cost(elements: int) -> Cost:
    """Return what it costs to encrypt so many numbers.

    >>> cost(1_000_000).num_bytes / 4_000_000
    8.02816
    """
    count = ckks.num_ciphertexts(elements)
    return Cost(elements, count * ckks.WORDS * 8, count * _SECONDS)


def check_cost(section: HomomorphicEncryptionSection, elements: int) -> None:
    """Raise FitError, with the estimate, if an update of so many numbers is larger than the job allows."""
    found = cost(elements)
    if found.num_bytes > section.max_bytes:
        raise FitError(
            f"An update of {elements:,} numbers is {found.num_bytes:,} bytes encrypted, for every site and round, and "
            f"takes about {found.seconds:.2g} s to encrypt; homomorphic_encryption.max_bytes is {section.max_bytes:,}. "
            "Train a smaller adapter (a lower r, fewer target modules), use [secure_aggregation], whose updates are a "
            "quarter of that or less, or raise the limit."
        )


def terms(
    section: HomomorphicEncryptionSection,
    bounds: Bounds,
    job: str,
    number: int,
    attempt: int,
    sites: Sequence[str],
    shapes: Shapes,
    weighed: Mapping[str, bool],
) -> Terms:
    """Return the terms of one session; arguments are those of :func:`hansa.secagg.agreement.terms`.

    Raises:
        PrivacyError: terms that protect nobody, or a step that is too fine for the range and so many sites.
        FitError: an update is larger than the job allows.
    """
    fields = spans(bounds, shapes, weighed, section.metrics, FINE)
    fields[SCALARS][COUNT] = Range(0.0, 1.0, 1.0)
    chosen = encoding(fields, len(sites), widths=(ckks.BITS,))
    check_cost(section, chosen.size)
    return Terms(job, number, attempt, tuple(sorted(sites)), section.key_site or min(sites), chosen, section.minimum)


def check(
    proposed: Terms, section: HomomorphicEncryptionSection, bounds: Bounds, job: str, weighed: Mapping[str, bool]
) -> None:
    """Check that a server's terms are those of the job.

    Raises:
        PrivacyError: they are not.
    """
    shapes = shapes_in(proposed.encoding)
    if terms(section, bounds, job, proposed.round, proposed.attempt, proposed.sites, shapes, weighed) != proposed:
        raise PrivacyError(
            "The server proposes other terms of homomorphic encryption than the job's: another owner of the key, other "
            "ranges, or fewer sites. Nothing is sent.",
            job=job,
            round=proposed.round,
        )
