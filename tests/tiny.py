# SPDX-License-Identifier: Apache-2.0
"""Small jobs that train in a second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa import registry
from hansa.core.config import parse
from hansa.core.ports import Program
from hansa.core.tree import Tree
from hansa.core.values import Plan

LLAMA: Mapping[str, Any] = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "tokenizer": "bytes",
}
BERT: Mapping[str, Any] = {
    "config": {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "tokenizer": "bytes",
}
VIT: Mapping[str, Any] = {
    "config": {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
}


def rows(path: Path, items: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON lines and return the path as text."""
    path.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return str(path)


def program(recipe: Any, model: Mapping[str, Any], data: Mapping[str, Any], **more: Any) -> Program:
    """Return the program of a job; ``more`` are its other sections."""
    values = {"name": "tiny", "recipe": recipe, "model": model, "data": data, **more}
    job = parse(values)
    built: Program = registry.load("recipes", job.recipe.name)(job)
    return built


def plan(params: Tree, round: int = 1, seed: int = 0) -> Plan:
    """Return a training plan; evaluation does not look at its task."""
    return Plan("tiny", round, "train", 0, params, seed=seed)


def score(built: Program, params: Tree, site: str) -> dict[str, float]:
    """Return the metrics of one site's held-out rows."""
    return built.summarise(built.evaluate(site, plan(params)))


def same(a: Tree, b: Tree) -> bool:
    """Say whether two trees are equal in every bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
