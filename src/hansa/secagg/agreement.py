# SPDX-License-Identifier: Apache-2.0
"""What a job's words on secret sums mean: what is summed, in which ranges, and the terms of a session of masks.

Server and sites work the terms out by themselves, from the job and the tensors' shapes; a site refuses a session whose
terms are others, so the server can neither widen a range nor lower the number of sites.

Sessions are numbered in the order in which they come: two for each round, its training and its evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hansa.core.config import SecretSums, SecureAggregationSection
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

FINE = 2.0**-20
"""The coarsest step of a number that is summed beside tensors, relative to its range."""
_FINEST = 2.0**-36


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
    fine = FINE if shapes else _FINEST  # where tensors need the narrow ring, metrics make do with it
    return Terms(
        job=job,
        round=number,
        attempt=attempt,
        sites=tuple(sorted(sites)),
        encoding=encoding(ranges(section, bounds, shapes, weighed, fine), len(sites)),
        minimum=section.minimum,
        corrupt=section.corrupt,
        dropout=section.dropout,
    )


def ranges(
    section: SecretSums, bounds: Bounds, shapes: Shapes, weighed: Mapping[str, bool], fine: float
) -> dict[str, dict[str, Range]]:
    """Return what one site may put into each tensor and number of a sum.

    Args:
        section, bounds, shapes, weighed: as of :func:`terms`.
        fine: the coarsest step of a metric, relative to its range.
    """
    heaviest = bounds.heaviest if shapes else 1.0  # an evaluation weighs 1

    def span(part: str, shape: tuple[int, ...]) -> Range:
        most = bounds.largest * (heaviest if weighed.get(part) else 1.0)
        return Range(-most, most, bounds.step, shape)

    scalars = {name: Range(-most, most, most * fine) for name, most in section.metrics.items()}
    return {
        **{part: {name: span(part, shape) for name, shape in tree.items()} for part, tree in shapes.items()},
        SCALARS: {**scalars, WEIGHT: Range(0.0, heaviest, heaviest * FINE)},
    }


def bounds_of(section: SecretSums) -> Bounds:
    """Return what updates are bounded by where no privacy plan bounds them."""
    return Bounds(section.range, section.weight_cap / WEIGHT_SCALE, section.step or section.default_step)


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
