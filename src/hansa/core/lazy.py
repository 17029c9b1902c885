# SPDX-License-Identifier: Apache-2.0
"""Tensors that are read or computed a block at a time, so that a model's size is no limit.

Guarantee: an expression of leaves has the dtype and the bits that NumPy gives for whole arrays, as every operation is
done element by element, on blocks that are arrays of one dimension.

| case | result |
|---|---|
| an operand that is an array of the same shape | read block by block |
| an operand without dimensions | a number, in every block |
| operands of several shapes | refused: nothing is broadcast |
| a subexpression used twice | computed once a block |
| ``np.asarray`` of a leaf over an array | that array, not a copy |
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 1 << 18
"""Elements handled at a time where an operation would otherwise hold a second whole tensor (1 MiB of float32)."""

Memo = dict["Leaf", Array]


class Leaf:
    """A tensor that is read or computed a block at a time.

    It takes an array's place where only operators, ``astype`` and :func:`blocks` are applied, with the dtypes and
    the bits that NumPy gives. ``np.asarray`` reads the whole of it.

    >>> leaf = Leaf.of(np.arange(3.0)) * 2
    >>> leaf.dtype, leaf.shape, np.asarray(leaf)
    (dtype('float64'), (3,), array([0., 2., 4.]))
    """

    __array_ufunc__ = None  # NumPy's arrays and numbers leave the operators to this class

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[int, int, Memo], Array],
        array: Array | None = None,
    ) -> None:
        """Make a leaf of ``read(start, stop, memo)``, which returns flattened elements; ``array`` holds them all."""
        self.shape = shape
        self.dtype = dtype
        self.array = array
        self._read = read

    @classmethod
    def of(cls, array: Array) -> Leaf:
        """Return ``array`` as a leaf."""
        flat = array.reshape(-1)
        return cls(array.shape, array.dtype, lambda start, stop, memo: flat[start:stop], array)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Leaf:
        """Return zeros."""
        return cls(shape, dtype, lambda start, stop, memo: np.zeros(stop - start, dtype))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the raw data."""
        return self.size * int(self.dtype.itemsize)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, part: slice) -> Array:
        """Return the flattened elements of ``part``, whose step is 1."""
        start, stop, step = part.indices(self.size)
        assert step == 1, "a leaf is read in order"
        return self.values(start, stop, {})

    def values(self, start: int, stop: int, memo: Memo) -> Array:
        """Return the flattened elements from ``start`` to ``stop``; ``memo`` keeps those of every leaf on the way."""
        if self not in memo:
            memo[self] = self._read(start, stop, memo)
        return memo[self]

    def astype(self, dtype: Any, copy: bool = True) -> Leaf:
        """Return the leaf in ``dtype``."""
        return self if np.dtype(dtype) == self.dtype else apply(lambda a: a.astype(dtype), self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self.array is None:
            whole = np.empty(self.size, self.dtype)
            for start in range(0, self.size, BLOCK):
                whole[start : start + BLOCK] = self[start : start + BLOCK]
            whole = whole.reshape(self.shape)
        else:
            whole = self.array.copy() if copy else self.array
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __neg__(self) -> Leaf:
        return apply(operator.neg, self)

    def __add__(self, other: Any) -> Leaf:
        return apply(operator.add, self, other)

    def __radd__(self, other: Any) -> Leaf:
        return apply(operator.add, other, self)

    def __sub__(self, other: Any) -> Leaf:
        return apply(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Leaf:
        return apply(operator.sub, other, self)

    def __mul__(self, other: Any) -> Leaf:
        return apply(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Leaf:
        return apply(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Leaf:
        return apply(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Leaf:
        return apply(operator.truediv, other, self)

    def __pow__(self, other: Any) -> Leaf:
        return apply(operator.pow, self, other)

    def __lt__(self, other: Any) -> Leaf:
        return apply(operator.lt, self, other)

    def __gt__(self, other: Any) -> Leaf:
        return apply(operator.gt, self, other)


def apply(operation: Callable[..., Any], *operands: Any) -> Leaf:
    """Return ``operation(*operands)``: leaves, arrays of one shape, and numbers."""
    operands = tuple(Leaf.of(o) if isinstance(o, np.ndarray) and o.ndim else o for o in operands)
    shapes = {operand.shape for operand in operands if isinstance(operand, Leaf)}
    assert len(shapes) == 1, f"leaves are combined element by element, not with shapes {shapes}"

    def read(start: int, stop: int, memo: Memo) -> Array:
        return cast(Array, operation(*(o.values(start, stop, memo) if isinstance(o, Leaf) else o for o in operands)))

    example = operation(*(np.empty(0, o.dtype) if isinstance(o, Leaf) else o for o in operands))
    return Leaf(shapes.pop(), example.dtype, read)
