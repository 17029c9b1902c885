# SPDX-License-Identifier: Apache-2.0
"""Flat trees of arrays, ``name -> array`` as in safetensors, and their arithmetic.

Strategy rules use only the operators ``+ - * / **`` and comparisons on the leaves, so that one rule serves
NumPy, torch and JAX arrays. What needs NumPy itself (norms, casts, finiteness) says so in its signature.

Large trees are lazy. Inside a rule or a filter the leaves of a tree above ``LARGE`` bytes are :class:`Leaf`: they
stand for arrays that are computed a block at a time, when they are written, so memory is a few blocks whatever the
model's size. Outside, :class:`Lazy` trees give ordinary arrays, one at a time.

    lazily(tree)   arrays -> leaves (a small tree stays as it is)
    arrays(tree)   leaves -> a tree whose leaves are arrays when they are read

Blocks are the same whoever reads, and rules work element by element, so lazy and eager bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from typing import cast as typed

import ml_dtypes
import numpy as np

from hansa.core.lazy import BLOCK as BLOCK
from hansa.core.lazy import Array as Array
from hansa.core.lazy import Leaf as Leaf
from hansa.core.lazy import apply

Tree = Mapping[str, Array]
Parts = Mapping[str, Tree]

LARGE = 4 << 20
"""Trees of more bytes than this are not held in memory: a round would hold several copies at once."""

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}


@dataclass(frozen=True)
class Spec:
    """The dtype (NumPy's name, or ``bfloat16``) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the raw data."""
        return self.size * int(_DTYPES[self.dtype].itemsize)


Layout = Mapping[str, Spec]


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype called ``name`` (KeyError for one that no Hansa value may hold)."""
    return _DTYPES[name]


def dtype_names() -> tuple[str, ...]:
    """Return the names of all dtypes a Hansa value may hold."""
    return tuple(_DTYPES)


class Derived(Mapping[str, Array]):
    """A tree whose leaves are computed each time they are read, so that no more than one needs memory at a time.

    >>> negative = Derived(["w"], lambda name: -np.ones(2))
    >>> negative["w"]
    array([-1., -1.])
    """

    def __init__(self, names: Collection[str], leaf: Callable[[str], Array]) -> None:
        self._names = dict.fromkeys(names)
        self._leaf = leaf

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._leaf(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Lazy(Mapping[str, Array]):
    """A tree over :class:`Leaf`, each made an array when it is read, so that no more than one needs memory."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        self.leaves = leaves

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.leaves[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def lazily(tree: Tree) -> Tree:
    """Return a large tree with a :class:`Leaf` for every tensor, and a small one as it is.

    Tensors without a dimension stay arrays, as NumPy treats them as numbers.
    """
    if num_bytes(tree) <= LARGE:
        return tree
    held: Mapping[str, Any] = leaves(tree)
    return {name: _lazy(leaf) if leaf.ndim else np.asarray(leaf) for name, leaf in held.items()}


def _lazy(leaf: Any) -> Array:
    return typed(Array, leaf if is_leaf(leaf) else Leaf.of(leaf))


def arrays(tree: Tree) -> Tree:
    """Return a tree whose leaves are arrays, computed when they are read where they are not there yet."""
    held: dict[str, Any] = dict(leaves(tree))
    held = {name: leaf.array if is_leaf(leaf) and leaf.array is not None else leaf for name, leaf in held.items()}
    return Lazy(held) if any(map(is_leaf, held.values())) else held


def is_leaf(value: Any) -> bool:
    """Say whether ``value`` is a :class:`Leaf`."""
    return isinstance(value, Leaf)


def tensor(value: Any) -> Array:
    """Return a leaf as it is, and as an array what NumPy made a number of (``-np.zeros(())`` is one)."""
    return typed(Array, value) if is_leaf(value) else np.asarray(value)


def leaves(tree: Tree) -> Tree:
    """Return the leaves as they are held, without computing any."""
    return tree.leaves if isinstance(tree, Lazy) else tree


def layout_of(tree: Tree) -> dict[str, Spec]:
    """Return the dtype and shape of every leaf."""
    return {name: Spec(leaf.dtype.name, tuple(leaf.shape)) for name, leaf in leaves(tree).items()}


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Say whether ``dtype`` is a floating type; bfloat16, which NumPy calls void, is one."""
    return bool(np.issubdtype(dtype, np.floating)) or dtype == _DTYPES["bfloat16"]


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that sums of ``dtype`` are kept in: float64 for float64, otherwise float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def floating(tree: Tree) -> Tree:
    """Return the floating leaves: integer and boolean buffers are state, never averaged into floats."""
    held = {name: leaf for name, leaf in leaves(tree).items() if is_floating(leaf.dtype)}
    return Lazy(held) if isinstance(tree, Lazy) else held


def tree_map(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Apply ``function`` to the leaves of trees that share their names.

    >>> tree_map(lambda a, b: a + b, {"w": 1.0}, {"w": 2.0})
    {'w': 3.0}
    """
    return {name: function(leaf, *(other[name] for other in others)) for name, leaf in tree.items()}


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``a + b``."""
    return {name: leaf + b[name] for name, leaf in a.items()}


def subtract(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``a - b``."""
    return {name: leaf - b[name] for name, leaf in a.items()}


def scale(a: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return ``factor * a``. NumPy makes bfloat16 times a Python number float32; every other dtype stays."""
    return {name: leaf * factor for name, leaf in a.items()}


def times(tree: Tree, factor: float) -> dict[str, Array]:
    """Return ``factor * tree``, computed in float32 or wider and rounded once to each leaf's dtype.

    A factor rounded to bfloat16 first would be off by up to 0.4 %, for all elements alike.
    """
    return {name: (leaf * wide(leaf.dtype).type(factor)).astype(leaf.dtype, copy=False) for name, leaf in tree.items()}


def zeros_like(tree: Tree, dtype: np.dtype[Any] | None = None) -> dict[str, Array]:
    """Return zeros of the same shapes, in ``dtype`` or each leaf's own."""
    return {
        name: tensor(Leaf.zeros(leaf.shape, dtype or leaf.dtype))
        if is_leaf(leaf)
        else np.zeros(leaf.shape, dtype or leaf.dtype)
        for name, leaf in tree.items()
    }


def cast(tree: Tree, dtypes: Mapping[str, str]) -> dict[str, Array]:
    """Return the tree with each leaf in the dtype that ``dtypes`` names for it; no copy where it already is."""
    return {
        name: leaf.astype(_DTYPES[dtypes[name]], copy=False) if name in dtypes else leaf for name, leaf in tree.items()
    }


def checked(tree: Tree, error: Callable[[str], Exception]) -> Tree:
    """Return a tree that raises ``error(name)`` when a block with a NaN or an infinity is read."""

    def check(name: str, values: Array) -> Array:
        if not finite(values):
            raise error(name)
        return values

    held: Mapping[str, Any] = leaves(tree)
    return {n: tensor(apply(partial(check, n), a) if is_leaf(a) else check(n, a)) for n, a in held.items()}


def widen(tree: Tree) -> dict[str, Array]:
    """Return the tree with half-precision leaves as float32; everything else is left as it is, uncopied."""
    return {
        name: leaf.astype(wide(leaf.dtype), copy=False) if is_floating(leaf.dtype) else leaf
        for name, leaf in tree.items()
    }


def blocks(leaf: Array) -> Iterator[tuple[int, Array]]:
    """Yield ``(start, values)`` over the flattened leaf, ``BLOCK`` elements at a time, as views where possible."""
    for start in range(0, leaf.size, BLOCK):
        yield start, block(leaf, start)


def block(leaf: Array, start: int) -> Array:
    """Return the flattened elements from ``start`` on, ``BLOCK`` at most, as a view where possible."""
    flat = leaf if is_leaf(leaf) else leaf.reshape(-1)
    return flat[start : start + BLOCK]


def norm(tree: Tree) -> float:
    """Return the joint L2 norm of all floating leaves, summed in float64, in the order of their names.

    >>> norm({"a": np.array([3.0]), "b": np.array([4.0])})
    5.0
    """
    total = 0.0
    held = leaves(tree)
    for name in sorted(held):
        for _, values in blocks(held[name]):
            if not is_floating(values.dtype):
                break
            wide_values = values.astype(np.float64)
            total += float(np.dot(wide_values, wide_values))
    return math.sqrt(total)


def first_non_finite(tree: Tree) -> str | None:
    """Return the name of the first leaf that holds a NaN or an infinity, or None."""
    for name, leaf in leaves(tree).items():
        if any(not finite(values) for _, values in blocks(leaf)):
            return name
    return None


def finite(values: Array) -> bool:
    """Say whether no value is a NaN or an infinity; integers never are."""
    return not is_floating(values.dtype) or bool(np.isfinite(values.astype(wide(values.dtype), copy=False)).all())


def num_bytes(tree: Tree) -> int:
    """Return the bytes of the raw data of all leaves."""
    return sum(leaf.nbytes for leaf in leaves(tree).values())
