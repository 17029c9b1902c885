# SPDX-License-Identifier: Apache-2.0
"""Floats as integers modulo 2^32 or 2^64, so that sums under masks are exact.

    x  ──bounded?──>  round(x · 2^e)  ──mod 2^bits──>  masked, summed, unmasked  ──signed──>  sum · 2^-e

Everything that is summed (tensors, weight, metric sums) is a :class:`Field` of one vector, in canonical order, with
bounds for what one site may put in and an exponent of its own. e is the largest that lets ``sites`` values add up
without wrapping: sites · (bound · 2^e + 1) < 2^(bits - 1). The narrower ring is taken if its step 2^-e is small enough.

The same vector, held to sums of 40 bits, is what :mod:`hansa.homomorphic` encrypts.

The sum's error is at most sites · 2^-e / 2 an element, sites · 2^-e with stochastic rounding (:meth:`Encoding.error`);
multiplying by 2^e and adding in the ring are exact. It does not depend on the order of sites or the size of blocks.

| case | result |
|---|---|
| a value outside its field's bounds, by however little | PrivacyError naming site, round, tensor; nothing is clamped |
| a NaN or an infinity | NonFiniteError, likewise |
| a step that 64 bits and so many sites do not give | PrivacyError before anything is trained |
| bounds that are not finite, empty, or only zero | PrivacyError |
| tensors that the fields do not name, or lack, or of other shapes | WireError |
| integers (a mechanism's own noisy counts) | exact, where their step of 1 is |
| a tensor without elements | takes no place |
| a sum that the sites in it can't have, so a site broke the rules | WireError when its block is read |
| whole numbers under stochastic rounding | stay what they are |

Values are read, encoded and decoded ``BLOCK`` elements at a time, across the borders of tensors, so memory does not
depend on the model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from hansa.core import tree as trees
from hansa.core.lazy import BLOCK, Array, Leaf, Memo
from hansa.core.tree import Parts, Tree
from hansa.errors import NonFiniteError, PrivacyError, WireError

if TYPE_CHECKING:
    from hansa.secagg.keys import Keystream

SCALARS = ":scalars"
"""The part that holds what is summed beside the update's own parts."""
WEIGHT = ":weight"
"""The update's weight, among the scalars."""

_WHOLE_BITS = 53  # integers up to 2^53 are exact in float64, in which values are encoded
_COARSEST = 2.0**-16
_LARGEST, _SMALLEST = 2.0**500, 2.0**-500

Width = Literal[32, 40, 64]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
Sites = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Side = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Shape = Annotated[tuple[Side, ...], msgspec.Meta(max_length=32)]


class Range(msgspec.Struct, frozen=True):
    """What one site may put into a tensor or a number.

    Attributes:
        low, high: the bounds of every element.
        step: the coarsest step that it may be rounded to; 2^-16 of the larger bound by default.
        shape: of the tensor; a number has none.
    """

    low: float
    high: float
    step: float | None = None
    shape: tuple[int, ...] = ()

    @property
    def bound(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's or number's place in the vector.

    Attributes:
        part, name: whose place it is.
        shape: the tensor's.
        low, high: the bounds of what one site may put in.
        exponent: e; values are multiples of 2^-e.
    """

    part: Text
    name: Text
    shape: Shape
    low: float
    high: float
    exponent: Annotated[int, msgspec.Meta(ge=-600, le=600)]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def most(self) -> float:
        """The largest magnitude of an element as an integer, rounding included."""
        return math.ldexp(max(abs(self.low), abs(self.high)), self.exponent) + 1


class Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How values become elements of the ring; part of a session's terms, so all sites have the same.

    Attributes:
        bits: what a sum fits into: 32 or 64, those of a ring; 40, the integers that :mod:`hansa.homomorphic` adds.
        sites: how many values are added at most.
        stochastic: round up with the probability of the fraction, so that the mean is right, instead of to the nearest.
        fields: in canonical order.

    Raises:
        PrivacyError: these fields' sums could wrap, or their bounds bound nothing.
    """

    bits: Width
    sites: Sites
    stochastic: bool
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        keys = [(field.part, field.name) for field in self.fields]
        if keys != sorted(set(keys)):
            raise PrivacyError("The fields of the ring's vector are not in order, or one is there twice.")
        for field in self.fields:
            _check_bounds(field.low, field.high, f"{field.name!r} of {field.part!r}")
            if field.most > _limit(self.bits, self.sites):
                raise PrivacyError(
                    f"{field.name!r} of {field.part!r}: the sum of {self.sites} values up to "
                    f"{max(abs(field.low), abs(field.high)):g} in steps of 2^-{field.exponent} can wrap in "
                    f"{self.bits} bits."
                )
        if self.size >= 1 << 48:
            raise PrivacyError(f"The ring's vector has {self.size} elements; nobody has that many.")

    @property
    def size(self) -> int:
        """Number of elements of the vector."""
        return sum(field.size for field in self.fields)

    @property
    def num_bytes(self) -> int:
        """Bytes of the vector."""
        return self.size * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """The ring: uint32 or uint64, whose arithmetic wraps."""
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)

    @property
    def signed(self) -> np.dtype[Any]:
        """The same elements as the integers that they stand for."""
        return np.dtype(np.int32 if self.bits == 32 else np.int64)

    def error(self, part: str, name: str, sites: int | None = None) -> float:
        """Return the largest error that an element of the sum over ``sites`` (all by default) can have."""
        exponent = next(field.exponent for field in self.fields if (field.part, field.name) == (part, name))
        return (sites or self.sites) * math.ldexp(1.0 if self.stochastic else 0.5, -exponent)


def _limit(bits: int, sites: int) -> int:
    """Return the largest integer that so many sites may each put in without a sum that wraps."""
    return min(((1 << (bits - 1)) - 1) // sites, 1 << _WHOLE_BITS)


def _check_bounds(low: float, high: float, what: str) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise PrivacyError(f"{what}: the range from {low} to {high} bounds nothing.")
    if not _SMALLEST <= max(abs(low), abs(high)) <= _LARGEST:
        raise PrivacyError(f"{what}: the range from {low:g} to {high:g} is too small or too large for any ring.")


def encoding(
    ranges: Mapping[str, Mapping[str, Range]],
    sites: int,
    *,
    stochastic: bool = False,
    widths: Sequence[Width] = (32, 64),
) -> Encoding:
    """Choose the narrowest ring in which the sum can't wrap and every step is fine enough.

    Args:
        ranges: part -> name -> what a site may put in.
        sites: how many are added at most.
        stochastic: as of :class:`Encoding`.
        widths: the bits to choose from, the narrowest first.

    Raises:
        PrivacyError: not even the widest does, or a range bounds nothing.

    >>> encoding({"delta": {"w": Range(-1, 1, shape=(3,))}}, sites=100).fields[0].exponent
    24
    """
    flat = {(part, name): ranges[part][name] for part in sorted(ranges) for name in sorted(ranges[part])}
    for (part, name), given in flat.items():
        _check_bounds(given.low, given.high, f"{name!r} of {part!r}")
    for bits in widths:
        exponents = {key: _exponent(given.bound, _limit(bits, sites)) for key, given in flat.items()}
        coarse = [key for key, given in flat.items() if not _is_fine(given, exponents[key])]
        if not coarse:
            fields = tuple(
                Field(*key, given.shape, float(given.low), float(given.high), exponents[key])
                for key, given in flat.items()
            )
            return Encoding(bits, sites, stochastic, fields)
    part, name = coarse[0]
    given = flat[part, name]
    raise PrivacyError(
        f"{name!r} of {part!r}: no ring adds {sites} values up to {given.bound:g} in steps of {given.step:g}; the "
        f"finest is {math.ldexp(1.0, -exponents[part, name]):g}. Allow a coarser step or a smaller range."
    )


def _is_fine(given: Range, exponent: int) -> bool:
    return math.ldexp(1.0, -exponent) <= (given.bound * _COARSEST if given.step is None else given.step)


def _exponent(bound: float, limit: int) -> int:
    """Return the largest e with bound · 2^e + 1 <= limit."""
    exponent = math.frexp((limit - 1) / bound)[1] - 1
    return exponent if math.ldexp(bound, exponent) + 1 <= limit else exponent - 1


def summands(parts: Parts, weight: float, sums: Mapping[str, float]) -> dict[str, Tree]:
    """Return an update's parts with its weight and metric sums beside them, as :class:`Vector` takes them."""
    assert SCALARS not in parts, "the name is taken"
    assert WEIGHT not in sums, "the name is taken"
    scalars = {WEIGHT: np.float64(weight), **{name: np.float64(value) for name, value in sums.items()}}
    return {**parts, SCALARS: {name: np.asarray(value) for name, value in scalars.items()}}


class Vector:
    """The encoded vector of one site's values, made a block at a time when it is read.

    Not for two threads at once.

    Args:
        encoding: what it is made by.
        parts: the values; leaves may be lazy.
        site, round: for messages.
        randomness: what stochastic rounding, and nothing else, draws from: the same at every reading.

    Raises:
        WireError: the parts are not those that the encoding names.
    """

    def __init__(
        self, encoding: Encoding, parts: Parts, site: str, round: int, randomness: Keystream | None = None
    ) -> None:
        self.encoding = encoding
        self._site, self._round = site, round
        self._randomness = randomness
        self._leaves = self._fitting(parts)
        self._starts = [0, *accumulate(field.size for field in encoding.fields)]
        self._wide = np.empty(BLOCK)
        self._spare = np.empty(BLOCK if encoding.stochastic else 0)
        self._draws = np.empty(BLOCK if encoding.stochastic else 0, np.uint32)

    def _fitting(self, parts: Parts) -> list[Any]:
        held = {(part, name): leaf for part, tree in parts.items() for name, leaf in trees.leaves(tree).items()}
        wanted = {(field.part, field.name): field for field in self.encoding.fields}
        for part, name in sorted(held.keys() ^ wanted.keys()):
            there = "are to be summed and have no place in the ring" if (part, name) in held else "are missing"
            raise WireError(f"The values of {name!r} of {part!r} {there}.", site=self._site, round=self._round)
        for key, field in wanted.items():
            if tuple(held[key].shape) != field.shape:
                raise WireError(
                    f"{key[1]!r} of {key[0]!r} has the shape {list(held[key].shape)} instead of {list(field.shape)}.",
                    site=self._site,
                    round=self._round,
                )
        return [leaf if trees.is_leaf(leaf) else np.asarray(leaf).reshape(-1) for leaf in map(held.get, wanted)]

    def encode(self, start: int, out: Array) -> None:
        """Write the elements from ``start`` on into ``out``, at most ``BLOCK`` of the ring's dtype.

        Raises:
            NonFiniteError, PrivacyError: a value is NaN, infinite or outside its bounds.
        """
        done = 0
        while done < out.size:
            place = bisect_right(self._starts, start + done) - 1
            inside = start + done - self._starts[place]
            count = min(out.size - done, self._starts[place + 1] - start - done)
            values = self._wide[:count]
            values[:] = self._leaves[place][inside : inside + count]
            self._check(self.encoding.fields[place], values)
            np.multiply(values, math.ldexp(1.0, self.encoding.fields[place].exponent), out=values)
            self._round_off(start + done, values)
            np.copyto(out[done : done + count].view(self.encoding.signed), values, casting="unsafe")
            done += count

    def _check(self, field: Field, values: Array) -> None:
        with np.errstate(invalid="ignore"):
            low, high = float(values.min()), float(values.max())
        if field.low <= low and high <= field.high:
            return
        what = f"{field.name!r} of {field.part!r}"
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(f"{what} holds a NaN or an infinity.", site=self._site, round=self._round)
        raise PrivacyError(
            f"{what} holds {low if low < field.low else high:.6g}{_held_by(field)}, outside its range from "
            f"{field.low:g} to {field.high:g}. Nothing was sent. Raise {_setting(field)}, or set secure_aggregation = "
            "false.",
            site=self._site,
            round=self._round,
        )

    def _round_off(self, start: int, values: Array) -> None:
        if not self.encoding.stochastic:
            np.rint(values, out=values)
            return
        below, draws = self._spare[: values.size], self._draws[: values.size]
        assert self._randomness is not None, "stochastic rounding draws"
        self._randomness.read(4 * start)(draws.view(np.uint8).data)
        np.floor(values, out=below)
        np.subtract(values, below, out=values)  # exact: the fraction
        np.ldexp(values, 32, out=values)
        np.add(below, draws < values, out=values)


def _held_by(field: Field) -> str:
    return "" if field.part == SCALARS else ", weighed"


def _setting(field: Field) -> str:
    """Return the key of a job that a field's range follows from."""
    if field.part != SCALARS:
        return "secure_aggregation.range, or clip updates"
    return "secure_aggregation.weight_cap" if field.name == WEIGHT else f"secure_aggregation.metrics.{field.name}"


def decoded(encoding: Encoding, total: Array, sites: int) -> dict[str, Tree]:
    """Return the sum over ``sites``, as parts of float64 leaves that are computed when they are read.

    Args:
        encoding: what the summands were made by.
        total: the unmasked sum, ``encoding.size`` elements of the ring; read whenever a leaf is.
        sites: how many were added.

    Raises:
        WireError: when a block is read that holds what so many sites can't have added up to.
    """
    assert (total.dtype, total.shape) == (encoding.dtype, (encoding.size,)), "a sum is a vector over the ring"
    parts: dict[str, dict[str, Any]] = {}
    start = 0
    for field in encoding.fields:
        signed = total[start : start + field.size].view(encoding.signed)
        parts.setdefault(field.part, {})[field.name] = _decoded(field, signed, sites)
        start += field.size
    return {part: trees.Lazy(tree) for part, tree in parts.items()}


def _decoded(field: Field, signed: Array, sites: int) -> Leaf:
    def read(start: int, stop: int, memo: Memo) -> Array:
        values = signed[start:stop].astype(np.float64)
        if values.size and max(-values.min(), values.max()) > sites * field.most:
            raise WireError(
                f"The sum of {field.name!r} of {field.part!r} is more than {sites} sites can put in: one of them did "
                "not keep to its range, or to the masks agreed. Nothing of this round is used."
            )
        values *= math.ldexp(1.0, -field.exponent)
        return values

    return Leaf(field.shape, np.dtype(np.float64), read)
