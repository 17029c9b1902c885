# SPDX-License-Identifier: Apache-2.0
"""Least squares at six sites of unequal size and slope: small enough to be done again by hand (``by_hand``).

A job names it as recipe ``regression:build``, or ``regression:build_torch`` for the same in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hansa.client.functional import Examples, Functional, FunctionalProgram, of_numpy, of_torch
from hansa.core.config import Job
from hansa.privacy.steps import noisy_steps

SIZE = 4
ROWS = {"s0": 2, "s1": 3, "s2": 4, "s3": 5, "s4": 6, "s5": 7}


def rows(site):
    """Return a site's inputs (n, SIZE) and targets (n,), in float64."""
    generator = np.random.default_rng(list(ROWS).index(site))
    inputs = generator.normal(size=(ROWS[site], SIZE))
    slope = np.array([1.0, -2.0, 0.5, 3.0]) + generator.normal(size=SIZE)
    return inputs, inputs @ slope + 0.1 * generator.normal(size=ROWS[site])


def value_and_grad(params, batch):
    inputs, targets = batch
    errors = inputs @ params["w"] - targets
    return float((errors**2).mean() / 2), {"w": inputs.T @ errors / len(errors)}


def each(params, batch):
    inputs, targets = batch
    return {"loss": (inputs @ params["w"] - targets) ** 2 / 2}


def program(job: Job, functional: Functional, kind: Callable[..., FunctionalProgram] = FunctionalProgram):
    data = {site: Examples(rows(site), rows(site)) for site in ROWS}
    return kind(functional, data, job.train, noisy=noisy_steps(job))


def build(job: Job) -> FunctionalProgram:
    return program(job, of_numpy({"w": np.zeros(SIZE)}, value_and_grad, each))


def build_torch(job: Job) -> FunctionalProgram:
    import torch

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))

        def forward(self, inputs):
            return inputs @ self.w

    return program(job, of_torch(Line(), lambda outputs, targets: (outputs - targets) ** 2 / 2))
