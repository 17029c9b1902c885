# SPDX-License-Identifier: Apache-2.0
"""The streaming sum of updates.

Guarantees, each held by a test:

- memory is the model's accumulator, or where that is large, in a file, a few chunks, whatever the number of sites; an
  update that arrives before its turn waits on disk;
- updates are added in the order of site names in ``order``, so the bits of the sum depend on the set of accepted
  updates alone, never on their arrival;
- sums are kept in float32, and in float64 where the model is float64, whatever dtype an update arrives in;
- an update is checked whole (layout, checksums, finiteness) before its first element is added, and the disk space
  of an accumulator is claimed before it is used.

Updates that lie on disk are added several at a time, block by block, so an accumulator is read and written once for
``TOGETHER`` of them, and large ones by two processors, each at other blocks. It is not mapped for that: a first
write to a mapped page costs more than the adding.

| case | result |
|---|---|
| no update at all | weight 0, count 0, no tensors |
| NaN or infinity in an update, a weight that is not positive and finite in float32 | rejected, nothing added |
| a tensor missing, extra, of another shape, or not floating | rejected, nothing added |
| a norm above the bound, where there is one | rejected, nothing added |
| the same site twice, a site not asked, a site given up on | rejected |
| finite updates whose sum is not finite | NonFiniteError from ``close`` |
| a waiting update that changed on disk | StorageError: the sum can't be trusted any more |
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.ports import Handle
from hansa.core.shared import shared
from hansa.core.tree import Array, Layout
from hansa.core.values import Aggregate, Header, Update
from hansa.errors import NonFiniteError, StorageError, WireError

MAP_BYTES = trees.LARGE
"""Accumulators larger than this are files, mapped once they are whole."""

TOGETHER = 4
"""How many updates on disk are added at a time."""

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


class Fold:
    """Adds updates up, in canonical order, as they come.

    Args:
        order: the sites asked, in the order their updates are added.
        expected: part -> tensor -> spec that every update must have (shapes must match; dtypes may be other
            floating types).
        weighed: part -> whether it was multiplied by the site's weight.
        population: the number of sites in the federation.
        directory: where early updates and large accumulators are kept; a temporary folder by default.
        max_norm: the largest joint L2 norm of an update's parts, but for those named in ``beside``.
        beside: parts that are not the model's; where there is a ``max_norm``, each has a norm of at most 1.
    """

    def __init__(
        self,
        order: Sequence[str],
        expected: Mapping[str, Layout],
        weighed: Mapping[str, bool],
        population: int,
        directory: Path | None = None,
        *,
        max_norm: float | None = None,
        beside: Collection[str] = (),
    ) -> None:
        self._max_norm = max_norm
        self._beside = beside
        self._order = list(order)
        self._place = {site: place for place, site in enumerate(self._order)}
        assert len(self._place) == len(self._order), "a site may be asked once a round"
        self._expected = expected
        self._weighed = weighed
        self._population = population
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._waiting: dict[str, tuple[Handle, float] | None] = {}
        self._next = 0
        self._due: list[tuple[Handle, float]] = []  # their turn has come, and they lie on disk
        self._done: set[str] = set()  # the sites of these, and of what was added
        self._sums: dict[str, _Sum] = {}
        self._weight = 0.0
        self._count = 0.0
        self._metrics: dict[str, float] = {}

    def add(self, handle: Handle, discount: float = 1.0) -> None:
        """Accept one update; it is added once its turn has come, and waits on disk until then.

        An update that is accepted is released once it has been added. One that is not stays the caller's.

        Args:
            handle: the update.
            discount: the factor in (0, 1] that a stale update and its weight are multiplied by.

        Raises:
            WireError: it is malformed or does not match the model.
            NonFiniteError: it holds a NaN or an infinity.
            StorageError: it has to wait, and the disk is full.
        """
        assert 0 < discount <= 1, "a discount is a share"
        header = handle.header
        problem = self._unwelcome(header) or self._misfit(header)
        if problem:
            raise WireError(problem, site=header.site, round=header.round)
        problem = self._not_finite(handle)
        if problem:
            raise NonFiniteError(problem, site=header.site, round=header.round)
        place = self._place[header.site]
        if isinstance(handle, Update) and place != self._next:
            handle = wire.spool(handle, self._folder() / f"early-{place:06d}.hansa")
        self._waiting[header.site] = (handle, discount)
        self._advance()

    def skip(self, site: str) -> None:
        """Say that nothing will come from ``site``; one that has answered stays in the sum."""
        if site in self._place and site not in self._waiting and site not in self._done:
            self._waiting[site] = None
            self._advance()

    def close(self) -> Aggregate:
        """Fold what still waits, sites that never answered left out, and return the sum.

        Raises:
            NonFiniteError: the updates are finite and their sum is not.
        """
        for site in self._order[self._next :]:
            self._waiting.setdefault(site, None)
        self._advance()
        self._add_due()
        sums = {part: total.whole() for part, total in self._sums.items()}
        for part, total in self._sums.items():
            name = total.overflown
            if name is not None:
                raise NonFiniteError(f"The sum of all updates overflows in tensor {name!r} of {part!r}.")
        if self._weight > _LARGEST:
            raise NonFiniteError("The sum of all updates' weights overflows.")
        return Aggregate(sums, self._weighed, self._weight, self._count, self._population, dict(self._metrics))

    def discard(self) -> None:
        """Free the accumulators and every waiting update."""
        for entry in (*self._waiting.values(), *self._due):
            if entry:
                entry[0].release()
        self._waiting, self._due = {}, []
        for total in self._sums.values():
            total.close()
            if total.path is not None:
                self._spares().give(total.path)
        self._sums = {}
        if self._temporary:
            self._temporary.cleanup()

    def _folder(self) -> Path:
        if self._directory:
            return self._directory
        if not self._temporary:
            self._temporary = tempfile.TemporaryDirectory(prefix="hansa-fold-")
        return Path(self._temporary.name)

    def _spares(self) -> storage.Spares:
        return storage.Spares(self._folder() / storage.SPARES)

    def _unwelcome(self, header: Header) -> str | None:
        if header.site not in self._place:
            return "The site was not asked in this round."
        if header.site in self._done or self._waiting.get(header.site):
            return "The site has answered already."
        if header.site in self._waiting or self._place[header.site] < self._next:
            return "The site had been given up on in this round."
        return None

    def _misfit(self, header: Header) -> str | None:
        if header.layout.keys() != self._expected.keys():
            return f"The update has parts {sorted(header.layout)}, expected {sorted(self._expected)}."
        for part, expected in self._expected.items():
            got = header.layout[part]
            for name in sorted(expected.keys() ^ got.keys()):
                problem = "lacks" if name in expected else "has an unknown"
                return f"The update {problem} tensor {name!r} in {part!r}."
            for name, spec in expected.items():
                if got[name].shape != spec.shape or not trees.is_floating(trees.dtype_of(got[name].dtype)):
                    return (
                        f"Tensor {name!r} of {part!r} is {got[name].dtype}{list(got[name].shape)}, "
                        f"the model has {spec.dtype}{list(spec.shape)}."
                    )
        return None

    def _not_finite(self, handle: Handle) -> str | None:
        header = handle.header
        if not _SMALLEST <= header.weight <= _LARGEST:
            return f"The update's weight is {header.weight}; it must be positive and finite in float32."
        for name, value in header.sums.items():
            if not math.isfinite(value):
                return f"The update's metric {name!r} is {value}."
        squares = dict.fromkeys(self._expected, 0.0)
        for chunk in handle.chunks():
            kept_in = trees.wide(trees.dtype_of(self._expected[chunk.part][chunk.tensor].dtype))
            with np.errstate(over="ignore"):
                values = chunk.values.astype(kept_in, copy=False)
            if not np.isfinite(values).all():
                return f"Tensor {chunk.tensor!r} of {chunk.part!r} holds a NaN or an infinity."
            if self._max_norm is not None:
                flat = values.reshape(-1).astype(np.float64, copy=False)
                squares[chunk.part] += float(flat @ flat)
        return None if self._max_norm is None else self._too_long(squares, self._max_norm)

    def _too_long(self, squares: Mapping[str, float], max_norm: float) -> str | None:
        length = math.sqrt(sum(value for part, value in squares.items() if part not in self._beside))
        if length > max_norm:
            return f"The update's norm is {length:.6g}; no site's may exceed {max_norm:.6g}."
        for part in self._beside:
            if math.sqrt(squares[part]) > 1:
                return f"The part {part!r} has a norm of {math.sqrt(squares[part]):.6g}; it may not exceed 1."
        return None

    def _advance(self) -> None:
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            site = self._order[self._next]
            entry = self._waiting.pop(site)
            self._next += 1
            if entry:
                self._due.append(entry)
                self._done.add(site)
                if isinstance(entry[0], Update) or len(self._due) == TOGETHER:
                    self._add_due()

    def _add_due(self) -> None:
        due, self._due = self._due, []
        if due:
            self._put(due)
        for handle, discount in due:
            header = handle.header
            self._weight += header.weight * discount
            self._count += discount
            for name, value in header.sums.items():
                self._metrics[name] = self._metrics.get(name, 0.0) + value
            handle.release()

    def _put(self, due: Sequence[tuple[Handle, float]]) -> None:
        """Add the tensors of updates, in their order, to the sums.

        Raises:
            StorageError: one can't be read any more, or the disk is full.
        """
        if not self._sums:
            for number, (part, layout) in enumerate(self._expected.items()):
                self._sums[part] = self._begun(number, layout)
        accepted = []
        for handle, _ in due:
            with as_accepted(handle.header):
                accepted.append({part: trees.leaves(tree) for part, tree in handle.parts.items()})

        def add(place: tuple[str, str, int]) -> None:
            part, name, start = place
            sums = self._sums[part]
            total = sums.read(name, start, min(trees.BLOCK, self._expected[part][name].size - start))
            with np.errstate(over="ignore", invalid="ignore"):
                for parts, (handle, discount) in zip(accepted, due, strict=True):
                    with as_accepted(handle.header):
                        values = trees.block(parts[part][name], start)
                    if discount != 1.0:
                        values = values.astype(total.dtype) * total.dtype.type(discount)
                    out = total if total.ndim else None
                    total = np.add(total, values, out=out, dtype=total.dtype, casting="same_kind")
            sums.write(name, start, total)

        places = [
            (part, name, start)
            for part, layout in self._expected.items()
            for name, spec in layout.items()
            for start in range(0, spec.size, trees.BLOCK)
        ]
        on_disk = not any(isinstance(handle, Update) for handle, _ in due)
        shared(due[0][0].header.num_bytes if on_disk else 0, add, places)
        for sums in self._sums.values():
            sums.begun = True

    def _begun(self, number: int, layout: Layout) -> _Sum:
        dtypes = {name: trees.wide(trees.dtype_of(spec.dtype)) for name, spec in layout.items()}
        if sum(dtypes[name].itemsize * spec.size for name, spec in layout.items()) <= MAP_BYTES:
            return _Sum(layout, dtypes)
        path = self._folder() / f"accumulator-{number}.bin"
        path.unlink(missing_ok=True)
        self._spares().take(path)
        return _Sum(layout, dtypes, path)


@contextlib.contextmanager
def as_accepted(header: Header) -> Iterator[None]:
    """Read from an update that has been checked.

    Raises:
        StorageError: it is not what it was.
    """
    try:
        yield
    except WireError as error:
        raise StorageError(
            f"The update changed while it waited on disk: {error.message} Resume the run.",
            site=header.site,
            round=header.round,
        ) from error


class _Sum:
    """The sums of a part's tensors, all zero at first: in memory, or in the file ``path``.

    Attributes:
        path: the file.
        begun: whether all of it has been written.
        close: closes the file; what is mapped stays.
    """

    def __init__(self, layout: Layout, dtypes: Mapping[str, np.dtype[Any]], path: Path | None = None) -> None:
        self.path = path
        self.begun = False
        self.close: Callable[[], object] = lambda: None
        self._layout = layout
        self._dtypes = dtypes
        self._arrays: dict[str, Array] = {}
        self._overflown: str | None = None
        if path is None:
            self._arrays = {name: np.zeros(spec.shape, dtypes[name]) for name, spec in layout.items()}
            return
        self._places: dict[str, int] = {}
        self._num_bytes = 0
        for name in sorted(layout, key=lambda name: -dtypes[name].itemsize):  # float64 first: all stay aligned
            self._places[name] = self._num_bytes
            self._num_bytes += dtypes[name].itemsize * layout[name].size
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            os.ftruncate(self._descriptor, self._num_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self._num_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._failed(error) from error

    def read(self, name: str, start: int, size: int) -> Array:
        """Return a copy, or where sums are in memory a view, of so many elements of a tensor; one 0 if all are new."""
        if self.path is None:
            return self._arrays[name].reshape(-1)[start : start + size]
        if not self.begun:
            return np.zeros((), self._dtypes[name])
        values = np.empty(size, self._dtypes[name])
        done, raw = 0, memoryview(values.view(np.uint8).data)
        while done < len(raw):
            step = os.preadv(self._descriptor, [raw[done:]], self._place(name, start) + done)
            if not step:
                raise StorageError(f"{self.path} became shorter while it was in use. Resume the run.")
            done += step
        return values

    def write(self, name: str, start: int, values: Array) -> None:
        """Put back what `read` gave."""
        if self.path is None:
            return
        if not trees.finite(values):  # what is added to it can't make it finite again
            self._overflown = name
        try:
            storage.write_at(self._descriptor, memoryview(values.view(np.uint8).data), self._place(name, start))
        except OSError as error:
            raise self._failed(error) from error

    @property
    def overflown(self) -> str | None:
        """The name of a tensor with a NaN or an infinity, or None."""
        return trees.first_non_finite(self._arrays) if self.path is None else self._overflown

    def whole(self) -> dict[str, Array]:
        """Return the sums; those in a file are mapped."""
        if self.path is None or self._arrays:
            return self._arrays
        mapped = np.memmap(self.path, np.uint8, "r", shape=(self._num_bytes,))
        for name, spec in self._layout.items():
            begin, dtype = self._places[name], self._dtypes[name]
            raw = mapped[begin : begin + dtype.itemsize * spec.size]
            self._arrays[name] = raw.view(np.ndarray).view(dtype).reshape(spec.shape)
        return self._arrays

    def _place(self, name: str, start: int) -> int:
        return self._places[name] + start * self._dtypes[name].itemsize

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"Can't keep a sum of {self._num_bytes} bytes at {self.path}: {error.strerror}. "
            "Free some space or set output.dir to a larger disk, then resume."
        )
