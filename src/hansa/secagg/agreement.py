# SPDX-License-Identifier: Apache-2.0
"""What a job's words on secure aggregation mean: the ring, what is summed in it, and a session's terms.

Server and sites work the terms out by themselves, from the job and the tensors' shapes; a site refuses a session whose
terms are others, so the server can neither widen a range nor lower the number of sites.

Sessions are numbered in the order in which they come: two for each round, its training and its evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hansa.core.config import PrivacySection, SecureAggregationSection
from hansa.core.values import WEIGHT_SCALE, Task
from hansa.errors import PrivacyError
from hansa.secagg.protocol import Terms
from hansa.secagg.ring import SCALARS, WEIGHT, Encoding, Range, encoding

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""part -> tensor -> shape."""

STEP = 1e-9
_FINE, _FINEST = 2.0**-20, 2.0**-36
_ROUNDED = 1.01
"""What a clipped update's largest element may be over the clip, through rounding to half precision."""


def terms(
    section: SecureAggregationSection,
    private: PrivacySection | None,
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
        private: its privacy plan, whose clip bounds updates.
        job: what the sites' states are kept by.
        number: the session's (:func:`number_of`).
        attempt: from 1.
        sites: those asked.
        shapes: of what is summed beside the weight and the metrics.
        weighed: which parts are multiplied by the weight.

    Raises:
        PrivacyError: terms that protect nobody, or sums that could wrap.
    """
    clipped = private is not None and private.mechanism in ("central", "dp-ftrl")
    fixed = clipped and private is not None and private.adaptive_clip is None
    heaviest = 1.0 if clipped or not shapes else section.weight_cap / WEIGHT_SCALE  # an evaluation weighs 1
    largest = private.clip * _ROUNDED if private is not None and fixed else section.range
    step = section.step or (largest * _FINE if fixed else STEP)

    def span(part: str, shape: tuple[int, ...]) -> Range:
        bound = largest * (heaviest if weighed.get(part) else 1.0)
        return Range(-bound, bound, step, shape)

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
    private: PrivacySection | None,
    job: str,
    weighed: Mapping[str, bool],
) -> None:
    """Check that a server's terms are those of the job.

    Raises:
        PrivacyError: they are not.
    """
    own = terms(
        section,
        private,
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
