# SPDX-License-Identifier: Apache-2.0
"""Flat trees of arrays, ``name -> array`` as in safetensors, and their arithmetic.

Strategy rules use only the operators ``+ - * / **`` and comparisons on the leaves, so that one rule serves
NumPy, torch and JAX arrays. What needs NumPy itself (norms, casts, finiteness) says so in its signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tree = Mapping[str, Array]
Parts = Mapping[str, Tree]

BLOCK = 1 << 18
"""Elements handled at a time where an operation would otherwise hold a second whole tensor (1 MiB of float32)."""

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


def layout_of(tree: Tree) -> dict[str, Spec]:
    """Return the dtype and shape of every leaf."""
    return {name: Spec(leaf.dtype.name, tuple(leaf.shape)) for name, leaf in tree.items()}


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Say whether ``dtype`` is a floating type; bfloat16, which NumPy calls void, is one."""
    return bool(np.issubdtype(dtype, np.floating)) or dtype == _DTYPES["bfloat16"]


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that sums of ``dtype`` are kept in: float64 for float64, otherwise float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def floating(tree: Tree) -> dict[str, Array]:
    """Return the floating leaves: integer and boolean buffers are state, never averaged into floats."""
    return {name: leaf for name, leaf in tree.items() if is_floating(leaf.dtype)}


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
    return {name: np.zeros(leaf.shape, dtype or leaf.dtype) for name, leaf in tree.items()}


def cast(tree: Tree, dtypes: Mapping[str, str]) -> dict[str, Array]:
    """Return the tree with each leaf in the dtype that ``dtypes`` names for it; no copy where it already is."""
    return {
        name: leaf.astype(_DTYPES[dtypes[name]], copy=False) if name in dtypes else leaf for name, leaf in tree.items()
    }


def widen(tree: Tree) -> dict[str, Array]:
    """Return the tree with half-precision leaves as float32; everything else is left as it is, uncopied."""
    return {
        name: leaf.astype(wide(leaf.dtype), copy=False) if is_floating(leaf.dtype) else leaf
        for name, leaf in tree.items()
    }


def blocks(leaf: Array) -> Iterator[tuple[int, Array]]:
    """Yield ``(start, values)`` over the flattened leaf, ``BLOCK`` elements at a time, as views where possible."""
    flat = leaf.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield start, flat[start : start + BLOCK]


def norm(tree: Tree) -> float:
    """Return the joint L2 norm of all floating leaves, summed in float64, in the order of their names.

    >>> norm({"a": np.array([3.0]), "b": np.array([4.0])})
    5.0
    """
    total = 0.0
    for name in sorted(tree):
        for _, values in blocks(tree[name]):
            if not is_floating(values.dtype):
                break
            wide_values = values.astype(np.float64)
            total += float(np.dot(wide_values, wide_values))
    return math.sqrt(total)


def first_non_finite(tree: Tree) -> str | None:
    """Return the name of the first leaf that holds a NaN or an infinity, or None."""
    for name in tree:
        for _, values in blocks(tree[name]):
            if is_floating(values.dtype) and not np.isfinite(values.astype(wide(values.dtype), copy=False)).all():
                return name
    return None


def num_bytes(tree: Tree) -> int:
    """Return the bytes of the raw data of all leaves."""
    return sum(leaf.nbytes for leaf in tree.values())
