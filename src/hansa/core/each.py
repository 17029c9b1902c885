# SPDX-License-Identifier: Apache-2.0
"""Every site's update by itself, for rules that need more than a sum: what they read, and what they are.

The updates lie in one file, a row each, in the order of site names. A rule reads :meth:`Rows.blocks` as often as it
has to, and says what its result is by a function of one block; the result is computed when it is read.

| case | result |
|---|---|
| any number of elements | at most ``lazy.BLOCK`` elements are held, or 1,024 of each site where that is more |
| updates in half precision | kept and combined as float32; float64 stays float64 |
| a tensor without elements | no block, and an empty result |
| the file can't be read | StorageError |
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hansa.core import tree as trees
from hansa.core.lazy import BLOCK, Leaf, Memo
from hansa.core.tree import Array, Layout, Tree
from hansa.errors import StorageError

LEAST = 1024
"""Elements of each site that are read at a time, at least."""

Combine = Callable[[Array], Array]
"""From a block of all updates, (sites, elements) in float64, to one of the result, (elements,)."""


@dataclass(frozen=True)
class Rule:
    """What takes the mean's place: how the updates of a round become one, every site counted once.

    Attributes:
        name: as in the job.
        least: the fewest updates that it can be used on.
        combine: from the updates to the result's block function, and notes for the record.
    """

    name: str
    least: int
    combine: Callable[[Rows], tuple[Combine, Mapping[str, Any]]]


class Rows:
    """The updates of a round.

    Args:
        descriptor: an open file of rows; it is held open by a descriptor of its own.
        sites: whose rows they are, in order.
        layout: part -> tensor -> spec, as the model has it.
    """

    def __init__(self, descriptor: int, sites: tuple[str, ...], layout: Mapping[str, Layout]) -> None:
        self.sites = sites
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._layout = layout
        self._places, self._width = places(layout)
        self._step = max(LEAST, BLOCK // max(1, len(sites)))

    def blocks(self) -> Iterator[Array]:
        """Yield all elements of all updates, a block of (sites, elements) in float64 at a time."""
        for part, name in self._places:
            size = self._layout[part][name].size
            for start in range(0, size, self._step):
                yield self._read(part, name, start, min(start + self._step, size))

    def combined(self, combine: Combine) -> dict[str, Tree]:
        """Return the trees that ``combine`` makes of the updates; those of a large model are computed when read."""
        found: dict[str, Tree] = {}
        for part, layout in self._layout.items():
            tree = trees.Lazy({name: self._leaf(part, name, combine) for name in layout})
            found[part] = tree if trees.num_bytes(tree) > trees.LARGE else dict(tree)
        return found

    def _leaf(self, part: str, name: str, combine: Combine) -> Leaf:
        dtype = self._places[part, name][1]

        def read(start: int, stop: int, memo: Memo) -> Array:
            values = np.empty(stop - start, dtype)
            for begin in range(start, stop, self._step):
                end = min(begin + self._step, stop)
                with np.errstate(over="ignore"):
                    values[begin - start : end - start] = combine(self._read(part, name, begin, end))
            return values

        return Leaf(self._layout[part][name].shape, dtype, read)

    def _read(self, part: str, name: str, start: int, stop: int) -> Array:
        offset, dtype = self._places[part, name]
        block = np.empty((len(self.sites), stop - start))
        for place, site in enumerate(self.sites):
            begin = place * self._width + offset + start * dtype.itemsize
            raw = _pread(self._descriptor, (stop - start) * dtype.itemsize, begin, site)
            block[place] = np.frombuffer(raw, dtype)
        return block


def places(layout: Mapping[str, Layout]) -> tuple[dict[tuple[str, str], tuple[int, np.dtype[Any]]], int]:
    """Return where each (part, tensor) lies in a row (bytes), its dtype there, and how many bytes a row has."""
    found: dict[tuple[str, str], tuple[int, np.dtype[Any]]] = {}
    offset = 0
    for part in sorted(layout):
        for name in sorted(layout[part]):
            spec = layout[part][name]
            dtype = trees.wide(trees.dtype_of(spec.dtype))
            found[part, name] = offset, dtype
            offset += spec.size * dtype.itemsize
    return found, offset


def _pread(descriptor: int, count: int, offset: int, site: str) -> bytes:
    try:
        raw = os.pread(descriptor, count, offset)
    except OSError as error:
        raise StorageError(f"Can't read the update that was kept: {error.strerror}.", site=site) from error
    if len(raw) != count:
        raise StorageError("The file of this round's updates was cut off while it was in use. Resume.", site=site)
    return raw
