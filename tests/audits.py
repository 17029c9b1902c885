# SPDX-License-Identifier: Apache-2.0
"""A small job to audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.config import Job, parse
from tiny import rows


def job(folder: Path, **more: Any) -> Job:
    """Return a job over three sites of twelve rows each."""
    generator = np.random.default_rng(1)
    for site in "abc":
        points = generator.normal(size=(12, 4))
        lines = [{"features": list(map(float, x)), "label": str(int(x[0] > 0))} for x in points]
        rows(folder / f"{site}.jsonl", lines)
    return parse(
        {
            "name": "audited",
            "rounds": 2,
            "recipe": {"name": "tabular-classification", "inputs": 4, "hidden": [8]},
            "data": {"train": {site: str(folder / f"{site}.jsonl") for site in "abc"}, "labels": ["0", "1"]},
            "train": {"epochs": 1, "batch_size": 4, "lr": 0.1, "optimizer": "sgd"},
            "output": {"dir": str(folder / "runs")},
            "secure_aggregation": False,  # single updates are attacked
            **more,
        }
    )
