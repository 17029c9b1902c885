# SPDX-License-Identifier: Apache-2.0
"""Small jobs that are attacked: digits at three sites, by a perceptron or a convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from hansa import registry
from hansa.client.functional import Examples, FunctionalProgram, of_torch
from hansa.client.torch import seeded
from hansa.core.config import Job, parse

SITES = ("s0", "s1", "s2")
PERCEPTRON = {"name": "tabular-classification", "inputs": 64, "offset": 8.0, "scale": 8.0, "hidden": [32]}
CONVOLUTION = {**PERCEPTRON, "name": "audited:convolution"}


def job(folder: Path, rows: int = 40, wrong: float = 0.0, **more: Any) -> Job:
    """Return a job on ``rows`` digits a site, of which it trains on four fifths.

    Args:
        folder: for its files.
        rows: see above.
        wrong: the share of labels that are drawn by lot.
        more: replaces its sections.
    """
    x, y = load_digits(return_X_y=True)
    drawn = np.random.default_rng(7)
    y = np.where(drawn.random(len(y)) < wrong, drawn.integers(0, 10, len(y)), y)
    files = {}
    for place, site in enumerate(SITES):
        own, path = slice(place * rows, (place + 1) * rows), folder / f"{site}.npz"
        np.savez(path, features=x[own], label=y[own].astype(str))
        files[site] = str(path)
    values: dict[str, Any] = {
        "name": "digits",
        "rounds": 1,
        "recipe": PERCEPTRON,
        "data": {"train": files, "labels": [str(digit) for digit in range(10)]},
        "train": {"optimizer": "sgd", "lr": 0.5, "epochs": 1, "batch_size": 8},
        "baselines": {"local": False},
        "secure_aggregation": False,  # single updates are attacked
    }
    return parse({**values, **more})


def convolution(job: Job) -> FunctionalProgram:
    """Return the digits of ``job`` as images, for a network whose first layer is a convolution."""
    recipe = job.recipe.model_copy(update={"name": "tabular-classification"})
    flat = registry.load("recipes", recipe.name)(job.model_copy(update={"recipe": recipe}))
    with seeded(job.seed, "initial"):
        module = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Flatten(),
            nn.Linear(512, 10),
        )  # fmt: skip
    rows = {site: flat.examples(site).train for site in flat.sites}
    data = {site: Examples((x.reshape(-1, 1, 8, 8), y)) for site, (x, y) in rows.items()}
    return FunctionalProgram(of_torch(module, nn.functional.cross_entropy), data, job.train)
