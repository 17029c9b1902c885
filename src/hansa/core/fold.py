# SPDX-License-Identifier: Apache-2.0
"""The streaming sum of updates.

Guarantees, each held by a test:

- memory is the model's accumulator and a few chunks, whatever the number of sites; an update that arrives
  before its turn waits on disk;
- updates are added in the order of site names in ``order``, so the bits of the sum depend on the set of accepted
  updates alone, never on their arrival;
- half precision is added in float32 (float64 in float64), whatever arrives;
- an update is checked whole (layout, checksums, finiteness) before its first element is added.

| case | result |
|---|---|
| no update at all | weight 0, count 0, no tensors |
| NaN or infinity in an update, a weight that is not positive and finite | rejected, nothing added |
| a tensor missing, extra, or of another shape | rejected, nothing added |
| the same site twice, a site not asked | rejected |
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hansa.core import tree as trees
from hansa.core import wire
from hansa.core.ports import Handle
from hansa.core.tree import Array, Layout
from hansa.core.values import Aggregate, Update
from hansa.errors import NonFiniteError, StorageError, WireError

MAP_BYTES = 64 << 20
"""Accumulators larger than this are memory-mapped files."""


class _Turn(Protocol):
    discount: float
    handle: Handle


class Fold:
    """Adds updates up, in canonical order, as they come.

    Args:
        order: the sites asked, in the order their updates are added.
        expected: part -> tensor -> spec that every update must have (shapes must match; dtypes may differ).
        weighed: part -> whether it was multiplied by the site's weight.
        population: the number of sites in the federation.
        directory: where early updates and large accumulators are kept; a temporary folder by default.
    """

    def __init__(
        self,
        order: Sequence[str],
        expected: Mapping[str, Layout],
        weighed: Mapping[str, bool],
        population: int,
        directory: Path | None = None,
    ) -> None:
        self._order = list(order)
        self._expected = expected
        self._weighed = weighed
        self._population = population
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="hansa-fold-")
        self._directory = directory or Path(self._temporary.name)  # type: ignore[union-attr]
        self._waiting: dict[str, tuple[Handle, float] | None] = {}
        self._next = 0
        self._sums: dict[str, dict[str, Array]] = {}
        self._scratch: dict[np.dtype[np.generic], Array] = {}
        self._weight = 0.0
        self._count = 0.0
        self._metrics: dict[str, float] = {}

    def add(self, handle: Handle, discount: float = 1.0) -> None:
        """Accept one update; it is added now if its turn has come, and waits on disk if not.

        Raises:
            WireError: it is malformed or does not match the model.
            NonFiniteError: it holds a NaN or an infinity.
        """
        header = handle.header
        if header.site not in self._order:
            raise WireError("The site was not asked in this round.", site=header.site, round=header.round)
        if header.site in self._waiting or self._order.index(header.site) < self._next:
            raise WireError("The site has answered already.", site=header.site, round=header.round)
        self._check(handle)
        if isinstance(handle, Update) and header.site != self._order[self._next]:
            handle = wire.spool(handle, self._directory / f"early-{self._order.index(header.site):06d}.hansa")
        self._waiting[header.site] = (handle, discount)
        self._advance()

    def skip(self, site: str) -> None:
        """Say that nothing will come from ``site``."""
        if site not in self._waiting:
            self._waiting[site] = None
            self._advance()

    def close(self) -> Aggregate:
        """Fold what still waits, sites that never answered left out, and return the sum."""
        for site in self._order[self._next :]:
            self._waiting.setdefault(site, None)
        self._advance()
        return Aggregate(
            self._sums, self._weighed, self._weight, self._count, self._population, dict(self._metrics)
        )

    def discard(self) -> None:
        """Free the accumulator's files and every waiting update."""
        for entry in self._waiting.values():
            if entry:
                entry[0].release()
        self._sums = {}
        for path in self._directory.glob("accumulator-*.bin"):
            path.unlink(missing_ok=True)
        if self._temporary:
            self._temporary.cleanup()

    def _check(self, handle: Handle) -> None:
        header = handle.header
        where = {"site": header.site, "round": header.round}
        if not (math.isfinite(header.weight) and header.weight > 0):
            raise NonFiniteError(f"The update's weight is {header.weight}.", **where)  # type: ignore[arg-type]
        if not all(math.isfinite(value) for value in header.sums.values()):
            raise NonFiniteError("A metric of the update is NaN or infinite.", **where)  # type: ignore[arg-type]
        if header.layout.keys() != self._expected.keys():
            raise WireError(
                f"The update has parts {sorted(header.layout)}, expected {sorted(self._expected)}.",
                **where,  # type: ignore[arg-type]
            )
        for part, expected in self._expected.items():
            got = header.layout[part]
            for name in sorted(expected.keys() ^ got.keys()):
                problem = "lacks" if name in expected else "has an unknown"
                raise WireError(f"The update {problem} tensor {name!r} in {part!r}.", **where)  # type: ignore[arg-type]
            for name, spec in expected.items():
                if got[name].shape != spec.shape or not trees.is_floating(trees.dtype_of(got[name].dtype)):
                    raise WireError(
                        f"Tensor {name!r} of {part!r} is {got[name].dtype}{list(got[name].shape)}, "
                        f"the model has {spec.dtype}{list(spec.shape)}.",
                        **where,  # type: ignore[arg-type]
                    )
        for chunk in handle.chunks():
            values = chunk.values.astype(trees.wide(chunk.values.dtype), copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                total = values.sum()
            if not np.isfinite(total) and not np.isfinite(values).all():
                raise NonFiniteError(
                    f"Tensor {chunk.tensor!r} of {chunk.part!r} holds a NaN or an infinity.",
                    **where,  # type: ignore[arg-type]
                )

    def _advance(self) -> None:
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            entry = self._waiting.pop(self._order[self._next])
            self._next += 1
            if entry:
                handle, discount = entry
                self._accumulate(handle, discount)
                handle.release()

    def _accumulate(self, handle: Handle, discount: float) -> None:
        header = handle.header
        if not self._sums:
            self._sums = {part: self._accumulators(part, header.layout[part]) for part in header.layout}
        for chunk in handle.chunks():
            into = self._sums[chunk.part][chunk.tensor].reshape(-1)
            into = into[chunk.start : chunk.start + chunk.values.size]
            values = self._widened(chunk.values, into.dtype)
            if discount != 1.0:
                values = values * into.dtype.type(discount)
            np.add(into, values, out=into)
        self._weight += header.weight * discount
        self._count += discount
        for name, value in header.sums.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value

    def _widened(self, values: Array, dtype: np.dtype[np.generic]) -> Array:
        if values.dtype == dtype:
            return values
        scratch = self._scratch.setdefault(dtype, np.empty(0, dtype))
        if scratch.size < values.size:
            scratch = self._scratch[dtype] = np.empty(max(values.size, trees.BLOCK), dtype)
        out = scratch[: values.size]
        if values.dtype.name == "bfloat16" and dtype == np.float32:
            # bfloat16 is the upper half of a float32; shifting is several times faster than casting.
            np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            out[:] = values
        return out

    def _accumulators(self, part: str, layout: Layout) -> dict[str, Array]:
        specs = {name: (trees.wide(trees.dtype_of(spec.dtype)), spec) for name, spec in layout.items()}
        total = sum(dtype.itemsize * spec.size for dtype, spec in specs.values())
        if total <= MAP_BYTES:
            return {name: np.zeros(spec.shape, dtype) for name, (dtype, spec) in specs.items()}
        path = self._directory / f"accumulator-{part}.bin"
        try:
            buffer = np.memmap(path, np.uint8, "w+", shape=(total,))
        except OSError as error:
            raise StorageError(
                f"Can't map an accumulator of {total} bytes at {path}: {error.strerror}."
            ) from error
        arrays: dict[str, Array] = {}
        offset = 0
        for name, (dtype, spec) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
            end = offset + dtype.itemsize * spec.size
            arrays[name] = buffer[offset:end].view(dtype).reshape(spec.shape)
            offset = end
        return arrays
