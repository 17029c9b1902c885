# SPDX-License-Identifier: Apache-2.0
"""What a job's words on secure aggregation mean: the ring, what is summed in it, and a session's terms.

Server and sites work the terms out by themselves, from the job and the tensors' shapes; a site refuses a session whose
terms are others, so the server can neither widen a range nor lower the number of sites.

Sessions are numbered in the order in which they come: two for each round, its training and its evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hansa.core.config import SecureAggregationSection
from hansa.core.values import WEIGHT_SCALE, Task
from hansa.errors import PrivacyError
from hansa.secagg.protocol import Terms
from hansa.secagg.ring import SCALARS, WEIGHT, Encoding, Range, encoding


@dataclass(frozen=True)
class Bounds:
    """What one site may put into the ring.

    Attributes:
        largest: the magnitude of an element, before it is weighed.
        heaviest: the weight.
        step: the coarsest that an element may be rounded to.
    """

    largest: float
    heaviest: float
    step: float


Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""part -> tensor -> shape."""

STEP = 1e-9
_FINE, _FINEST = 2.0**-20, 2.0**-36


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
        section: the job's words.
        bounds: what one site's update is bounded by (:func:`bounds_of`, or a privacy plan's own).
        job: what the sites' states are kept by.
        number: the session's (:func:`number_of`).
        attempt: from 1.
        sites: those asked.
        shapes: of what is summed beside the weight and the metrics.
        weighed: which parts are multiplied by the weight.

    Raises:
        PrivacyError: terms that protect nobody, or sums that could wrap.
    """
    heaviest = bounds.heaviest if shapes else 1.0  # an evaluation weighs 1

    def span(part: str, shape: tuple[int, ...]) -> Range:
        most = bounds.largest * (heaviest if weighed.get(part) else 1.0)
        return Range(-most, most, bounds.step, shape)

    ranges = {part: {name: span(part, shape) for name, shape in tree.items()} for part, tree in shapes.items()}
    fine = _FINE if shapes else _FINEST  # where tensors need the narrow ring, metrics make do with it
    scalars = {name: Range(-most, most, most * fine) for name, most in section.metrics.items()}
    weight = Range(0.0, heaviest, heaviest * _FINE)
    return Terms(
        job=job,
        round=number,
        attempt=attempt,
        sites=tuple(sorted(sites)),
        encoding=encoding({**ranges, SCALARS: {**scalars, WEIGHT: weight}}, len(sites)),
        minimum=section.minimum,
        corrupt=section.corrupt,
        dropout=section.dropout,
    )


def bounds_of(section: SecureAggregationSection) -> Bounds:
    """Return what updates are bounded by where no privacy plan bounds them."""
    return Bounds(section.range, section.weight_cap / WEIGHT_SCALE, section.step or STEP)


def number_of(round: int, task: Task) -> int:
    """Return the number of the session in which a round's plan is answered.

    >>> number_of(0, "evaluate"), number_of(1, "train"), number_of(1, "evaluate"), number_of(2, "train")
    (1, 2, 3, 4)
    """
    return 2 * round + (task == "evaluate")


def shapes_in(ring: Encoding) -> Shapes:
    """Return the shapes of all that a ring's vector holds beside the scalars."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for field in ring.fields:
        if field.part != SCALARS:
            shapes.setdefault(field.part, {})[field.name] = field.shape
    return shapes


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
