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
            this filter returned for this site in the round before.
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
    """Apply ``filters`` in order; ``memory`` and the returned memory are keyed by filter name."""
    kept: dict[str, Parts] = {}
    for piece in filters:
        update, kept[piece.name] = piece.apply(update, weighed, memory.get(piece.name, {}))
    return update, {name: parts for name, parts in kept.items() if parts}
