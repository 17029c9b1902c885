# SPDX-License-Identifier: Apache-2.0
"""What a filter is: a client-side transform of an update, as a value made of one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update


@dataclass(frozen=True)
class Given:
    """What a filter is told beside the update.

    Attributes:
        weighed: which parts are multiplied by the weight.
        sent: the parts that the plan carries beside the model.
    """

    weighed: Mapping[str, bool]
    sent: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Filter:
    """``apply(update, given, memory) -> (update, memory)``.

    Attributes:
        name: as in the job.
        traits: what the fit check needs to know.
        apply: the transform; ``memory`` is what this filter returned for this site in the round before. A large
            update's tensors are
            :class:`hansa.core.lazy.Leaf`: they take operators, ``astype`` and ``trees.blocks``, and ``np.asarray``
            makes a whole tensor of one.
    """

    name: str
    traits: frozenset[Trait]
    apply: Callable[[Update, Given, Parts], tuple[Update, Parts]]


def run(
    filters: Sequence[Filter],
    update: Update,
    given: Given,
    memory: Mapping[str, Parts],
) -> tuple[Update, dict[str, Parts]]:
    """Apply ``filters`` in order; ``memory`` and the returned memory are keyed by place and name, ``0-clip``."""
    kept: dict[str, Parts] = {}
    for place, piece in enumerate(filters):
        key = f"{place}-{piece.name}"
        update, kept[key] = piece.apply(update, given, memory.get(key, {}))
    return update, {key: parts for key, parts in kept.items() if parts}
