# SPDX-License-Identifier: Apache-2.0
"""``hansa init``: a commented TOML job, made from the descriptions and defaults of the configuration itself.

What the recipe needs is set; every other setting stands there commented out, with its default or an example.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hansa import registry
from hansa.core.config import Job, Section
from hansa.errors import JobError, StorageError, nearest

LORA = {"method": "lora", "r": 8, "lora_alpha": 16}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "causal-lm": {
        "recipe": {"name": "causal-lm", "max_length": 256, "prompts": ["A prompt to show the model with"]},
        "model": {"base": "path/to/base-model", "adapter": LORA},
        "data": {"train": "data/*.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}},
        "train": {"lr": 1e-3, "steps": 20},
    },
    "sequence-classification": {
        "recipe": {"name": "sequence-classification", "max_length": 128},
        "model": {"base": "path/to/base-model", "adapter": LORA},
        "data": {
            "train": "data/*.csv",
            "columns": {"text": "text", "label": "label"},
            "labels": ["negative", "positive"],
        },
        "train": {"lr": 1e-3, "epochs": 1.0},
    },
    "token-classification": {
        "recipe": {"name": "token-classification", "max_length": 128},
        "model": {"base": "path/to/base-model"},
        "data": {"train": "data/*.conll", "labels": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]},
        "train": {"lr": 5e-5, "epochs": 1.0},
    },
    "image-classification": {
        "recipe": {"name": "image-classification"},
        "model": {"base": "path/to/base-model"},
        "data": {"train": {"site-a": "images/site-a", "site-b": "images/site-b"}, "labels": ["cat", "dog"]},
        "train": {"lr": 5e-5, "epochs": 1.0},
    },
    "script": {
        "recipe": {"name": "script", "path": "train.py", "sites": 4},
        "model": {"factory": "train.py:Model"},
        "baselines": {"local": False},
    },
}

EXAMPLES: Mapping[str, Any] = {
    "partition": {"name": "dirichlet", "sites": 6, "alpha": 0.5},
    "filters": [{"name": "clip", "max_norm": 1.0}],
    "model.base": "path/to/base-model",
    "model.config": {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4},
    "model.tokenizer": "bytes",
    "model.adapter": LORA,
    "model.factory": "model.py:build",
    "data.train": {"site-a": "a.jsonl", "site-b": "b.jsonl"},
    "data.test": "held-out/*.jsonl",
    "data.format": "jsonl",
    "data.labels": ["negative", "positive"],
    "data.limit": 1000,
    "train.steps": 20,
    "train.epochs": 1.0,
    "train.clip_grad": 1.0,
    "train.max_seconds": 600.0,
    "cohort.deadline_s": 600.0,
    "cohort.sites": ["site-a", "site-b"],
    "engine.workers": 2,
    "engine.sites": {"site-a": {"cpus": 2}},
    "evaluation.patience": 3,
    "privacy.mechanism": "dp-sgd",
    "privacy.unit": "example",
    "privacy.clip": 1.0,
    "privacy.adaptive_clip": {"quantile": 0.5},
    "privacy.noise_multiplier": 1.0,
    "privacy.epsilon": 8.0,
    "privacy.delta": 1e-5,
    "privacy.weight_cap": 1000.0,
    "privacy.participations": 5,
    "secure_aggregation.off": "the sites trust the server",
    "secure_aggregation.step": 1e-6,
    "secure_aggregation.metrics": {"loss_sum": 1e6, "examples": 1e6},
    "homomorphic_encryption.key_site": "site-a",
    "homomorphic_encryption.step": 1e-6,
    "homomorphic_encryption.metrics": {"loss_sum": 1e6, "examples": 1e6},
}
"""What stands, commented out, at settings that have no default value."""

FAMILIES = {
    "recipe": "recipes",
    "partition": "partitions",
    "strategy": "strategies",
    "filters": "filters",
    "workflow": "workflows",
}

_HEAD = """\
# A job for Hansa. Change what is set below, then:
#   hansa check {file}      validate it without training
#   hansa run {file}        carry it out
# Lines with ## explain. Lines with # are further settings, with their default or an example; take the # away to set
# one. On the command line, --set train.lr=0.01 changes a setting for one run. Relative paths are relative to this
# file. Without a partition, each file of data.train is one site.
"""


def write(path: Path, recipe: str) -> None:
    """Write a job file.

    Raises:
        JobError: the file is there already, it is no .toml file, or there is no such recipe to start from.
        StorageError: the file can't be written.
    """
    if path.suffix.lower() != ".toml":
        raise JobError(f"hansa init writes a .toml file, not {path.name!r}.")
    if recipe not in RECIPES:
        raise JobError(f"hansa init has no job for {recipe!r}; it has: {', '.join(RECIPES)}.{nearest(recipe, RECIPES)}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text(path, recipe))
    except FileExistsError:
        raise JobError(f"{str(path)!r} is there already, and is left as it is. Name another file.") from None
    except OSError as error:
        raise StorageError(f"Can't write {str(path)!r}: {error.strerror}.") from error


def text(path: Path, recipe: str) -> str:
    """Return the commented job for a recipe."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem).lstrip("._-")
    values = {"name": name[:100] or "job", "baselines": {"local": True}, **RECIPES[recipe]}
    lines = [_HEAD.format(file=path.name)]
    tables = []
    for key, field in Job.model_fields.items():
        section = _section(field)
        if key == "directory":
            continue
        if section is None:
            lines += _setting(key, key, field, values)
        else:
            tables += ["", *_settings(key, section, values.get(key, {}), field.default is None)]
    return "\n".join([*lines, *tables]) + "\n"


def _section(field: FieldInfo) -> type[Section] | None:
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, Section)), None)


def _settings(table: str, section: type[Section], values: Mapping[str, Any], may_be_left_out: bool) -> Iterator[str]:
    if section.__doc__:
        yield f"## {section.__doc__.splitlines()[0].replace('``', '')}"
    yield f"# [{table}]" if may_be_left_out and not values else f"[{table}]"
    for key, field in section.model_fields.items():
        yield from _setting(key, f"{table}.{key}", field, values)


def _setting(key: str, where: str, field: FieldInfo, values: Mapping[str, Any]) -> Iterator[str]:
    if field.description:
        yield from (f"## {line}" for line in wrap(field.description, 100))
    if where in FAMILIES:
        yield from (f"## {line}" for line in wrap(f"Known: {', '.join(registry.names(FAMILIES[where]))}.", 100))
    if key in values:
        yield f"{key} = {toml(values[key])}"
        return
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or default is None or default in ([], {}):
        default = EXAMPLES.get(where, default)
    elif hasattr(default, "model_dump"):
        default = default.model_dump(exclude_none=True)
    yield f"# {key} = {toml(default)}"


def toml(value: Any) -> str:
    """Return a value as TOML, on one line.

    >>> toml({"name": "x", "sites": [1, 2.5], "on": True})
    '{ name = "x", sites = [1, 2.5], on = true }'
    """
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key} = {toml(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return f"[{', '.join(toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
