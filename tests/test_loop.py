# SPDX-License-Identifier: Apache-2.0
"""A federation in a researcher's own loop."""

import asyncio

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hansa.client.batches import num_steps, shuffled
from hansa.client.functional import accuracy, of_numpy
from hansa.core.config import TrainSection
from hansa.core.optimizer import adam, sgd
from hansa.errors import FitError, JobError, QuorumError
from hansa.filters.clip import clip
from hansa.loop import process
from hansa.strategies.fedavg import fedavg
from hansa.strategies.fedavgm import fedavgm
from hansa.strategies.fedopt import fedadam
from hansa.strategies.fedprox import fedprox
from hansa.strategies.scaffold import scaffold

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6))
Y = RNG.integers(0, 3, 50)
SIZES = {"berlin": (0, 11), "lyon": (11, 17), "oslo": (17, 50)}
DATA = {site: (X[a:b], Y[a:b]) for site, (a, b) in SIZES.items()}


def linear():
    return nn.Linear(6, 3)


def softmax_regression():
    """The same model in NumPy: its gradient by hand."""
    start = federation(fedavg).initialize().params

    def value_and_grad(params, batch):
        x, y = batch
        logits = x @ params["weight"].T + params["bias"]
        logits = logits - logits.max(1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(p[np.arange(len(y)), y]).mean()
        p[np.arange(len(y)), y] -= 1
        return loss, {"weight": p.T @ x / len(y), "bias": p.mean(0)}

    return of_numpy({name: leaf.astype(np.float64) for name, leaf in start.items()}, value_and_grad)


def federation(strategy, **options):
    options = {"client_optimizer": sgd(0.1), "loss": cross_entropy, "epochs": 1, "batch_size": 4, **options}
    return process(options.pop("model_fn", linear), strategy, **options)


def run(loop, rounds=3, data=DATA, state=None):
    state = state or loop.initialize()
    for _ in range(rounds):
        state, metrics = loop.next(state, data)
    return state, metrics


@pytest.mark.parametrize("strategy", [fedavg, scaffold, lambda: fedprox(0.0)])
@pytest.mark.parametrize("engine", ["local", "batched"])
def test_one_site_alone_is_plain_training_in_torch(strategy, engine):
    loop = federation(strategy, engine=engine)
    module = linear()
    module.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in loop.initialize().params.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, y = (torch.from_numpy(a) for a in (X.astype(np.float32), Y))
    for number in range(1, 4):
        batches = shuffled(50, 4, 0, number, "alone", "batches")
        for rows, _ in zip(batches, range(num_steps(TrainSection(batch_size=4), 50)), strict=False):
            optimizer.zero_grad()
            cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    state, _ = run(loop, data={"alone": (X, Y)})
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(state.params[name], parameter.detach(), atol=1e-6)


def test_one_site_alone_is_plain_training_in_numpy():
    functional = softmax_regression()
    params = dict(functional.params)
    for number in range(1, 4):
        for rows, _ in zip(shuffled(50, 4, 0, number, "alone", "batches"), range(13), strict=False):
            _, grads = functional.gradient(params, (X[rows], Y[rows]), None)
            params = {name: leaf - 0.1 * grads[name] for name, leaf in params.items()}
    state, _ = run(federation(fedavg, model_fn=lambda: functional), data={"alone": (X, Y)})
    for name, leaf in params.items():
        np.testing.assert_allclose(state.params[name], leaf, atol=1e-6)


@pytest.mark.parametrize("strategy", [fedavg, fedavgm, fedadam, lambda: fedprox(0.5), scaffold])
def test_one_rule_serves_torch_and_numpy(strategy):
    functional = softmax_regression()
    ours, metrics = run(federation(strategy, model_fn=lambda: functional))
    theirs, others = run(federation(strategy))
    for name, leaf in theirs.params.items():
        np.testing.assert_allclose(ours.params[name], leaf, atol=1e-6)
        assert abs(leaf - functional.params[name]).max() > 1e-2
    assert metrics["train_loss"] == pytest.approx(others["train_loss"], abs=1e-6)


def test_a_state_can_be_branched():
    loop = federation(scaffold)
    trunk, _ = run(loop, 2)
    before = {name: leaf.copy() for name, leaf in trunk.params.items()}
    left, _ = run(loop, 2, state=trunk)
    right, _ = run(loop, 2, state=trunk)
    other, _ = run(loop, 2, {site: (x + 1, y) for site, (x, y) in DATA.items()}, trunk)
    for name, leaf in left.params.items():
        np.testing.assert_array_equal(leaf, right.params[name])
        assert (leaf != other.params[name]).any()
        np.testing.assert_array_equal(trunk.params[name], before[name])
    assert (trunk.round, left.round) == (2, 4)


async def test_it_works_inside_a_running_event_loop():
    state, metrics = run(federation(fedavg), 1)
    await asyncio.sleep(0)
    assert state.round == 1
    assert metrics["train_loss"] > 0


def test_metrics_are_means_over_rows():
    loop = federation(fedavg, metrics={"accuracy": accuracy}, client_optimizer=sgd(1e-9))
    state, trained = run(loop, 1)
    judged = loop.evaluate(state, DATA)
    assert trained == pytest.approx({f"train_{name}": value for name, value in judged.items()}, abs=1e-6)
    assert set(judged) == {"loss", "accuracy"}
    batched = federation(fedavg, metrics={"accuracy": accuracy}, client_optimizer=sgd(1e-9), engine="batched")
    assert batched.evaluate(state, DATA) == pytest.approx(judged, abs=1e-6)


def test_a_server_optimizer_takes_the_place_of_the_mean():
    for strategy in (fedavg, fedavg(), lambda: fedprox(0.0)):
        state, _ = run(federation(strategy, server_optimizer=adam(0.03)))
        expected, _ = run(federation(fedadam(0.03)))
        for name, leaf in expected.params.items():
            np.testing.assert_allclose(state.params[name], leaf, rtol=1e-6)


@pytest.mark.parametrize("strategy", [scaffold, fedadam, fedavgm, fedavg(lr=0.5)])
def test_a_strategy_with_a_server_step_of_its_own_refuses_another(strategy):
    with pytest.raises(JobError, match="server step of its own"):
        federation(strategy, server_optimizer=adam())


def test_pieces_that_do_not_compose_are_refused():
    with pytest.raises(FitError, match="plain SGD"):
        federation(scaffold, client_optimizer=sgd(0.1, momentum=0.9))
    with pytest.raises(FitError, match="pure function"):
        federation(fedavg, model_fn=softmax_regression, engine="batched")
    with pytest.raises(FitError, match="pure function"):
        federation(fedavg, model_fn=lambda: nn.Sequential(linear(), nn.Dropout(0.5)), engine="batched")
    with pytest.raises(JobError, match="needs a loss"):
        federation(fedavg, loss=None)
    with pytest.raises(JobError, match="not both"):
        federation(fedavg, steps=3)


def test_filters_and_sampling_are_those_of_jobs():
    whole, _ = run(federation(fedavg, client_optimizer=sgd(1.0)), 1)
    clipped, _ = run(federation(fedavg, client_optimizer=sgd(1.0), filters=[clip(1e-3)]), 1)
    start = federation(fedavg).initialize()

    def length(state):
        return sum(float(((leaf - start.params[name]) ** 2).sum()) for name, leaf in state.params.items()) ** 0.5

    assert length(clipped) <= 1e-3 * 1.001 < length(whole)
    sampled, _ = run(federation(fedavg, sample=2), 1)
    assert len(sampled.record.asked) == 2


@pytest.mark.parametrize("engine", ["local", "batched"])
def test_a_site_that_fails_is_named(engine):
    broken = {**DATA, "oslo": (X[:3], Y[:2])}
    with pytest.raises(QuorumError, match="oslo: refused"):
        run(federation(fedavg, engine=engine), 1, broken)
    state, _ = run(federation(fedavg, quorum=0.5, engine=engine), 1, broken)
    assert state.record.accepted == ("berlin", "lyon")
    with pytest.raises(JobError, match="no site"):
        run(federation(fedavg), 1, {})


def test_a_defect_in_the_researchers_code_is_not_hidden():
    with pytest.raises(IndexError):
        run(federation(fedavg, loss=lambda outputs, targets: outputs[:, 99]), 1)
    with pytest.raises(ZeroDivisionError):
        run(federation(fedavg, loss=lambda outputs, targets: outputs / 0 if 1 / 0 else None, engine="batched"), 1)
