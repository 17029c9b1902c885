# SPDX-License-Identifier: Apache-2.0
"""Server steps against the papers' formulas, worked out here in float64 element by element."""

import numpy as np
import pytest

from hansa.core.optimizer import adam, sgd
from hansa.core.values import Aggregate, Model
from hansa.errors import JobError
from hansa.strategies.fedavg import fedavg
from hansa.strategies.fedavgm import fedavgm
from hansa.strategies.fedopt import fedadagrad, fedadam, fedyogi

W0 = np.array([0.3, -1.0, 2.0, 0.0])
DELTAS = np.random.default_rng(0).normal(0, 0.3, (8, 4))


def trajectory(strategy):
    """Return w after each of the given mean updates."""
    model = Model.start({"w": W0.copy()})
    state = strategy.init(model)
    seen = []
    for delta in DELTAS:
        aggregate = Aggregate({"delta": {"w": delta * 2.5}}, {"delta": True}, 2.5, 3.0, 3)
        model, state, _ = strategy.step(model, state, aggregate)
        seen.append(model.params["w"].copy())
    assert model.version == len(DELTAS)
    return np.stack(seen)


def momentum(lr, beta):
    w, v, seen = W0.copy(), np.zeros(4), []
    for delta in DELTAS:
        v = beta * v + delta
        w = w + lr * v
        seen.append(w)
    return np.stack(seen)


def nesterov(lr, beta):
    w, v, seen = W0.copy(), np.zeros(4), []
    for delta in DELTAS:
        v = beta * v + delta
        w = w + lr * (delta + beta * v)
        seen.append(w)
    return np.stack(seen)


def adaptive(second, lr, beta1, tau):
    seen = np.zeros_like(DELTAS)
    for j in range(4):
        w, m, v = W0[j], 0.0, 0.0
        for t, delta in enumerate(DELTAS[:, j]):
            m = beta1 * m + (1 - beta1) * delta
            v = second(v, delta**2)
            w = w + lr * m / (v**0.5 + tau)
            seen[t, j] = w
    return seen


def test_fedavg_adds_the_mean_update():
    np.testing.assert_allclose(trajectory(fedavg(lr=0.5)), W0 + 0.5 * DELTAS.cumsum(0), rtol=1e-12)


def test_fedavgm():
    np.testing.assert_allclose(trajectory(fedavgm(0.7, 0.9)), momentum(0.7, 0.9), rtol=1e-12)
    assert abs(trajectory(fedavgm(0.7, 0.9)) - momentum(0.7, 0.8)).max() > 0.01


def test_the_outer_nesterov_step_of_diloco():
    np.testing.assert_allclose(trajectory(fedavgm(0.7, 0.9, nesterov=True)), nesterov(0.7, 0.9), rtol=1e-12)


def test_fedadagrad():
    expected = adaptive(lambda v, d2: v + d2, 0.1, 0.0, 1e-3)
    np.testing.assert_allclose(trajectory(fedadagrad(0.1)), expected, rtol=1e-12)


def test_fedadam():
    expected = adaptive(lambda v, d2: 0.99 * v + 0.01 * d2, 0.03, 0.9, 1e-3)
    np.testing.assert_allclose(trajectory(fedadam(0.03)), expected, rtol=1e-12)


def test_fedyogi():
    expected = adaptive(lambda v, d2: v - 0.01 * d2 * np.sign(v - d2), 0.03, 0.9, 1e-3)
    np.testing.assert_allclose(trajectory(fedyogi(0.03)), expected, rtol=1e-12)


def test_the_three_second_moments_are_told_apart():
    ends = [trajectory(build(0.03))[-1] for build in (fedadam, fedyogi, fedadagrad)]
    assert all(abs(a - b).max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])


def test_half_precision_parameters_are_stepped_in_float32():
    import ml_dtypes

    model = Model.start({"w": np.ones(1, ml_dtypes.bfloat16)})
    strategy = fedavg()
    for _ in range(4):
        aggregate = Aggregate({"delta": {"w": np.full(1, 1e-3, np.float32)}}, {"delta": True}, 1.0, 1.0, 1)
        model, _, _ = strategy.step(model, {}, aggregate)
    assert model.params["w"][0] == pytest.approx(1.004, rel=1e-6)
    assert model.native()["w"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "build",
    [
        lambda: fedavg(lr=0),
        lambda: fedavgm(momentum=1.0),
        lambda: fedavgm(momentum=0.0, nesterov=True),
        lambda: fedadam(tau=0),
        lambda: fedyogi(beta1=1.0),
        lambda: fedadagrad(lr=float("inf")),
        lambda: adam(beta2=1.5),
        lambda: sgd(lr=float("nan")),
    ],
)
def test_settings_out_of_range_are_named(build):
    with pytest.raises(JobError, match=r"lr|momentum|tau|beta"):
        build()
