# SPDX-License-Identifier: Apache-2.0
"""Send an update in half precision; the server still adds in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hansa.core import tree as trees
from hansa.core.filter import Filter, Given
from hansa.core.fit import Trait
from hansa.core.tree import Parts
from hansa.core.values import Update


def cast(dtype: Literal["bfloat16", "float16"] = "bfloat16") -> Filter:
    """Return the filter that casts every floating tensor to ``dtype`` (relative error 2⁻⁹ or 2⁻¹²).

    float16 overflows above 65,504; a site whose update does is refused as not finite.
    """
    target = trees.dtype_of(dtype)

    def apply(update: Update, given: Given, memory: Parts) -> tuple[Update, Parts]:
        parts = {
            part: {name: leaf.astype(target) if trees.is_floating(leaf.dtype) else leaf for name, leaf in tree.items()}
            for part, tree in update.parts.items()
        }
        return replace(update, parts=parts), {}

    return Filter("cast", frozenset({Trait.ENCODES}), apply)
