# SPDX-License-Identifier: Apache-2.0
"""Multiply the weighed parts of an update by its weight, so that the server only sums."""

from __future__ import annotations

from dataclasses import replace

from hansa.core import tree as trees
from hansa.core.filter import Filter, Given
from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update


def weigh() -> Filter:
    """Return the filter that every job has: parts declared as weighed become weight × part."""

    def apply(update: Update, given: Given, memory: Parts) -> tuple[Update, Parts]:
        parts = {
            part: trees.times(tree, update.weight) if given.weighed[part] else tree
            for part, tree in update.parts.items()
        }
        return replace(update, parts=parts), {}

    return Filter("weigh", frozenset({Trait.WEIGHS}), apply)
