# SPDX-License-Identifier: Apache-2.0
"""The fold of a rule that needs each update: it takes and refuses what the sum does, and keeps what it takes.

Guarantees beside those of :mod:`hansa.core.fold`, each held by a test:

- memory is a few blocks, whatever the model's size and the number of sites; accepted updates lie in one file, as wide
  as they would be summed, until the stack is discarded and its aggregate let go of;
- the result depends on the set of accepted updates alone, and is the same to the bit whether it is read a block at a
  time or whole.

| case | result |
|---|---|
| an update that says it started from an older model | rejected |
| a weight of any size that a site states | it counts as 1 |
| fewer updates than the rule needs, or none | no result; the quorum of the round says so |
| a result that is not finite, of updates near the end of float64 | NonFiniteError, when it is read |
| the disk is full | StorageError |
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.each import Rows, Rule, places
from hansa.core.fold import Fold, as_accepted
from hansa.core.ports import Handle
from hansa.core.tree import Layout
from hansa.core.values import Aggregate, Chunk
from hansa.errors import NonFiniteError, StorageError, WireError


class Stack(Fold):
    """Keeps updates until the round closes, then combines them by ``rule``.

    Args:
        rule: what makes one update of them.
        order: the sites asked, in canonical order.
        expected: part -> tensor -> spec that every update must have.
        population: the number of sites in the federation.
        directory: where updates are kept; a temporary folder by default.
        max_norm: the largest joint L2 norm of an update's parts.
    """

    def __init__(
        self,
        rule: Rule,
        order: Sequence[str],
        expected: Mapping[str, Layout],
        population: int,
        directory: Path | None = None,
        *,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(order, expected, dict.fromkeys(expected, False), population, directory, max_norm=max_norm)
        self._rule = rule
        self._layout = expected
        self._places, self._width = places(expected)
        self._kept: list[str] = []
        self._file: int | None = None
        self._close: Callable[[], object] = lambda: None

    def add(self, handle: Handle, discount: float = 1.0) -> None:
        """Accept one update, as :meth:`Fold.add` does, of the model at hand only.

        Raises:
            WireError: besides, it started from an older model.
        """
        if discount != 1.0:
            reason = f"The update started from an older model, and {self._rule.name!r} compares those of one."
            raise WireError(reason, site=handle.header.site, round=handle.header.round)
        super().add(handle)

    def close(self) -> Aggregate:
        """Return the rule's result as the sum of one update, with the rule's notes.

        Tensors of a large model are read from the updates' file, which they hold open.

        Raises:
            StorageError: an update can't be read.
            NonFiniteError: the result is not finite.
        """
        total = super().close()
        if len(self._kept) < self._rule.least:
            return total
        assert self._file is not None, "updates are kept in it"
        rows = Rows(self._file, tuple(self._kept), self._layout)
        combine, notes = self._rule.combine(rows)

        def error(name: str) -> NonFiniteError:
            return NonFiniteError(f"What {self._rule.name!r} makes of all updates overflows in tensor {name!r}.")

        sums = {part: trees.arrays(trees.checked(tree, error)) for part, tree in rows.combined(combine).items()}
        return replace(total, sums=sums, count=1.0, notes=notes)

    def discard(self) -> None:
        """Free every update."""
        self._close()
        super().discard()

    def _add_due(self) -> None:
        super()._add_due()
        self._weight = float(len(self._kept))

    def _put(self, due: Sequence[tuple[Handle, float]]) -> None:
        for handle, _ in due:
            self._keep(handle)

    def _keep(self, handle: Handle) -> None:
        begin = len(self._kept) * self._width
        try:
            if self._file is None:
                path = self._folder() / "updates.bin"
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                self._close = weakref.finalize(self, os.close, self._file)
                path.unlink()  # it is this round's only, and goes with its descriptor, whatever ends the process
            for chunk in _reading(handle):
                offset, dtype = self._places[chunk.part, chunk.tensor]
                raw = np.ascontiguousarray(chunk.values, dtype).view(np.uint8).data
                storage.write_at(self._file, raw, begin + offset + chunk.start * dtype.itemsize)
        except OSError as error:
            raise StorageError(
                f"Can't keep the update on disk: {error.strerror}. Free some space or set output.dir to a larger disk, "
                "then resume.",
                site=handle.header.site,
                round=handle.header.round,
            ) from error
        self._kept.append(handle.header.site)


def _reading(handle: Handle) -> Iterator[Chunk]:
    with as_accepted(handle.header):
        yield from handle.chunks()
