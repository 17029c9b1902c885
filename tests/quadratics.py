# SPDX-License-Identifier: Apache-2.0
"""Sites whose losses are a_i/2 (w - b_i)^2, as a functional NumPy program with unequal curvature, steps and weight."""

import numpy as np

from hansa.client.functional import of_numpy
from hansa.core.optimizer import sgd
from hansa.loop import process

LR = 0.05
A = np.array([1.0, 2.0, 4.0])
B = np.array([1.0, 2.0, 3.0])
N = np.array([3, 2, 7])
K = np.array([3, 2, 7])
"""Local steps: with one epoch of batches of one row, as many as a site has rows."""


def value_and_grad(params, batch):
    a, b = batch
    error = params["w"] - b.mean()
    return float(a.mean() / 2 * error**2), {"w": a.mean() * error}


def data():
    return {f"s{i}": (np.full(N[i], A[i]), np.full(N[i], B[i])) for i in range(3)}


def functional():
    return of_numpy({"w": np.zeros(())}, value_and_grad)


def federation(strategy, gradient=value_and_grad, lr=LR, **options):
    return process(
        lambda: of_numpy({"w": np.zeros(())}, gradient),
        strategy,
        client_optimizer=sgd(lr),
        epochs=1,
        batch_size=1,
        **options,
    )


def end(strategy, rounds=400, **options):
    """Return w after ``rounds`` rounds from 0."""
    loop = federation(strategy, **options)
    state = loop.initialize()
    for _ in range(rounds):
        state, _ = loop.next(state, data())
    return float(state.params["w"])
