# SPDX-License-Identifier: Apache-2.0
"""The terms of a session: what server and sites must agree on, each from the job and the tensors' shapes.

A site refuses a session whose terms are others than those that it works out by itself, so the server can neither widen
a range nor lower the number of sites.

Sessions are numbered in the order in which they come: two for each round, its training and its evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hansa.core.config import SecureAggregationSection
from hansa.core.values import Task
from hansa.errors import PrivacyError
from hansa.secagg.protocol import Terms
from hansa.secagg.ranges import Bounds, Shapes, ring_of, shapes_in


def terms(
    section: SecureAggregationSection,
    bounds: Bounds,
    job: str,
    number: int,
    attempt: int,
    sites: Sequence[str],
    shapes: Shapes,
    weighed: Mapping[str, bool],
) -> Terms:
    """Return the terms of one session.

    Args:
        section, bounds, shapes, weighed: as of :func:`~hansa.secagg.ranges.ring_of`.
        job: what the sites' states are kept by.
        number: the session's (:func:`number_of`).
        attempt: from 1.
        sites: those asked.

    Raises:
        PrivacyError: terms that protect nobody, or sums that could wrap.
    """
    return Terms(
        job=job,
        round=number,
        attempt=attempt,
        sites=tuple(sorted(sites)),
        encoding=ring_of(section, bounds, len(sites), shapes, weighed),
        minimum=section.minimum,
        corrupt=section.corrupt,
        dropout=section.dropout,
    )


def number_of(round: int, task: Task) -> int:
    """Return the number of the session in which a round's plan is answered.

    >>> number_of(0, "evaluate"), number_of(1, "train"), number_of(1, "evaluate"), number_of(2, "train")
    (1, 2, 3, 4)
    """
    return 2 * round + (task == "evaluate")


def check(
    proposed: Terms,
    section: SecureAggregationSection,
    bounds: Bounds,
    job: str,
    weighed: Mapping[str, bool],
) -> None:
    """Check that a server's terms are those of the job.

    Raises:
        PrivacyError: they are not.
    """
    own = terms(
        section,
        bounds,
        job,
        proposed.round,
        proposed.attempt,
        proposed.sites,
        shapes_in(proposed.encoding),
        weighed,
    )
    if own != proposed:
        raise PrivacyError(
            "The server proposes other terms of secure aggregation than the job's: another ring, other ranges, or "
            "fewer sites. Nothing is sent.",
            job=job,
            round=proposed.round,
        )
