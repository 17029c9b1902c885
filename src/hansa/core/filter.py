# SPDX-License-Identifier: Apache-2.0
"""What a filter is: a client-side transform of an update, as a value made of one pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update


@dataclass(frozen=True)
class Filter:
    """``apply(update, weighed, memory) -> (update, memory)``.

    Attributes:
        name: as in the job.
        traits: what the fit check needs to know.
        apply: the transform; ``weighed`` says which parts are multiplied by the weight, ``memory`` is what
            this filter returned for this site in the round before. A large update's tensors are
            :class:`hansa.core.lazy.Leaf`: they take operators, ``astype`` and ``trees.blocks``, and ``np.asarray``
            makes a whole tensor of one.
    """

    name: str
    traits: frozenset[Trait]
    apply: Callable[[Update, Mapping[str, bool], Parts], tuple[Update, Parts]]


def run(
    filters: Sequence[Filter],
    update: Update,
    weighed: Mapping[str, bool],
    memory: Mapping[str, Parts],
) -> tuple[Update, dict[str, Parts]]:
    """Apply ``filters`` in order; ``memory`` and the returned memory are keyed by place and name, ``0-clip``."""
    kept: dict[str, Parts] = {}
    for place, piece in enumerate(filters):
        key = f"{place}-{piece.name}"
        update, kept[key] = piece.apply(update, weighed, memory.get(key, {}))
    return update, {key: parts for key, parts in kept.items() if parts}
