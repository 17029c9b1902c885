# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers with one label each, by a multilayer perceptron; small enough for engine ``batched``.

    [recipe]
    name = "tabular-classification"
    features = ["age", "chol"]     # columns of numbers; or one column of vectors (npz), with inputs = their length
    offset = [54.4, 246.7]         # x <- (x - offset) / scale, one number for all inputs or one each
    scale = [9.0, 51.8]
    hidden = [32]

The label's column is ``data.columns.label``, ``label`` by default. Standardising constants stand in the job, as the
label map does: were each site to use its own mean, the same row would be another input at every site. Where nobody
may know the pooled mean, use constants from public statistics, or the bounds of each column.

| case | result |
|---|---|
| a value that is no number | DataError with file, line and column |
| an empty cell | DataError; with ``fill_missing = true`` it counts as its offset, 0 after standardising |
| rows of a length other than the model's inputs | DataError with file and line |

Sums: ``loss`` and ``accuracy`` over ``examples``. An update is weighed by n = the site's training rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hansa import registry
from hansa.client.functional import Examples, FunctionalProgram, accuracy, of_torch
from hansa.client.torch import seeded
from hansa.core import storage
from hansa.core.config import Job
from hansa.core.tree import Array, Tree
from hansa.errors import DataError, JobError
from hansa.privacy.steps import noisy_steps
from hansa.recipes import data, labels
from hansa.recipes.data import SiteData
from hansa.recipes.tables import Table

_ROLES = ("features", "label")


@dataclass(frozen=True)
class Options:
    """What the recipe's section of a job holds; see the module."""

    features: Sequence[str]
    inputs: int
    offset: Array
    scale: Array
    hidden: Sequence[int]
    fill_missing: bool


def build(job: Job) -> FunctionalProgram:
    """Return the tabular-classification program of a job.

    Raises:
        JobError: an option, a role or the label map is missing or wrong, or the job names a model.
    """
    options = _options(**registry.checked("recipe.tabular-classification", _options, job.recipe.options))
    if job.model.base or job.model.config or job.model.adapter:
        raise JobError("tabular-classification makes its own model: leave out [model] and set recipe.hidden.")
    names = labels.label_map(job, "label", _ROLES)
    with seeded(job.seed, "initial"):
        module = perceptron(options.inputs, options.hidden, len(names))

    def write(params: Tree, directory: Path) -> None:
        (directory / "model").mkdir(parents=True, exist_ok=True)
        storage.save_tree(directory / "model" / "model.safetensors", params)
        config = {
            "features": list(options.features),
            "offset": options.offset.tolist(),
            "scale": options.scale.tolist(),
            "hidden": list(options.hidden),
            "labels": list(names),
        }
        (directory / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return FunctionalProgram(
        of_torch(module, nn.functional.cross_entropy, {"accuracy": accuracy}),
        _Rows(SiteData(job, _ROLES), options, names),
        job.train,
        labels=names,
        write=write,
        noisy=noisy_steps(job),
    )


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Return ``inputs - hidden ... - outputs`` with ReLU between, torch's default initial weights.

    >>> [tuple(p.shape) for p in perceptron(4, [3], 2).parameters()]
    [(3, 4), (3,), (2, 3), (2,)]
    """
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _options(
    features: list[str] | None = None,
    inputs: int | None = None,
    offset: float | list[float] = 0.0,
    scale: float | list[float] = 1.0,
    hidden: list[int] | None = None,
    fill_missing: bool = False,
) -> Options:
    where = "recipe.tabular-classification"
    columns = features or ["features"]
    count = len(columns) if inputs is None else inputs
    if features is None and inputs is None:
        raise JobError(f"{where} needs features = [columns of numbers], or inputs = the length of a vector column.")
    widths = [64] if hidden is None else hidden
    if count < 1 or any(width < 1 for width in widths):
        raise JobError(f"{where}: inputs and hidden must be at least 1, they are {count} and {widths}.")
    constants = []
    for name, given in (("offset", offset), ("scale", scale)):
        array = np.asarray(given, np.float64)
        if array.ndim and len(array) != count:
            raise JobError(f"{where}.{name} has {len(array)} numbers, the model has {count} inputs.")
        constants.append(np.broadcast_to(array, (count,)))
    if not all(math.isfinite(value) and value > 0 for value in constants[1]):
        raise JobError(f"{where}.scale must be positive: leave out a column that never changes.")
    return Options(columns, count, constants[0], constants[1], widths, fill_missing)


@dataclass(frozen=True)
class _Rows(Mapping[str, Examples]):
    """Site -> rows, read when they are first asked for."""

    source: SiteData
    options: Options
    names: Sequence[str]

    def __getitem__(self, site: str) -> Examples:
        split = self.source.load(site)
        return Examples(self._arrays(split.train), self._arrays(split.test) if len(split.test) else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.names)

    def __len__(self) -> int:
        return len(self.source.names)

    def __contains__(self, site: object) -> bool:
        return site in self.source.names

    def _arrays(self, table: Table) -> tuple[Array, ...]:
        targets = np.array(data.label_indices(table, "label", self.names), np.int64)
        return inputs_of(table, self.options), targets


def inputs_of(table: Table, options: Options) -> Array:
    """Return the standardised inputs of a table, float32 (rows, inputs).

    Raises:
        DataError: a value is missing or no number, or a row has another length.
    """
    pieces = [_numbers(table, name, options) for name in options.features]
    x = np.concatenate([piece.reshape(len(table), -1) for piece in pieces], axis=1) if len(table) else np.empty((0, 0))
    if len(table) and x.shape[1] != options.inputs:
        raise DataError(f"{table.where(0)}: the row has {x.shape[1]} inputs, the model {options.inputs}.")
    x = x.reshape(len(table), options.inputs)
    standard = (x - options.offset) / options.scale
    return np.where(np.isnan(x), 0.0, standard).astype(np.float32)


def _numbers(table: Table, name: str, options: Options) -> Array:
    """Return a column of numbers or of vectors; an empty cell is NaN where it may be filled."""
    values = table.column(name)
    rows: list[Any] = []
    for index, value in enumerate(values):
        number = _number(value)
        if number is None or (not options.fill_missing and np.isnan(number).any()):
            shown = "empty" if _is_empty(value) else f"{value!r}, which is no number"
            advice = "" if options.fill_missing else ", or set recipe.fill_missing = true for empty cells"
            raise DataError(f"{table.where(index)}: column {name!r} is {shown}. Mend the row{advice}.")
        rows.append(number)
    try:
        return np.array(rows, np.float64)
    except ValueError:
        raise DataError(f"{table.where(0)}: column {name!r} holds rows of different lengths.") from None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _number(value: Any) -> Any:
    if _is_empty(value):
        return math.nan
    try:
        return float(value) if np.ndim(value) == 0 else np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
