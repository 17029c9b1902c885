# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD's divergence guard."""

import numpy as np
import pytest

from hansa.core.values import Aggregate, Model
from hansa.errors import JobError
from hansa.strategies.scaffold import scaffold
from quadratics import A, B, N, data, federation, value_and_grad


def test_an_explosion_is_not_applied_and_training_recovers():
    factor = 1.0

    def gradient(params, batch):
        value, grads = value_and_grad(params, batch)
        return value, {name: grad * factor for name, grad in grads.items()}

    loop = federation(scaffold(), gradient)
    state = loop.initialize()
    for _ in range(5):
        state, _ = loop.next(state, data())
    assert "guard" not in state.record.notes
    assert state.memories.keys() == {"s0", "s1", "s2"}

    factor = 1e4
    tripped, _ = loop.next(state, data())
    assert "not applied" in tripped.record.notes["guard"]
    np.testing.assert_array_equal(tripped.params["w"], state.params["w"])
    assert not tripped.memories
    assert not tripped.snapshot.acknowledged
    assert tripped.snapshot.state["control"]["w"] == 0

    factor = 1.0
    for _ in range(400):
        tripped, _ = loop.next(tripped, data())
        assert "guard" not in tripped.record.notes
    assert float(tripped.params["w"]) == pytest.approx((N * A * B).sum() / (N * A).sum(), rel=1e-9)


def walk(strategy, lengths):
    model = Model.start({"w": np.zeros(1)})
    state = strategy.init(model)
    notes = {}
    for length in lengths:
        parts = {"delta": {"w": np.array([length])}, "control": {"w": np.ones(1)}}
        aggregate = Aggregate(parts, strategy.weighed, 1.0, 1.0, 1)
        model, state, notes = strategy.step(model, state, aggregate)
    return model, state, notes


@pytest.mark.parametrize(("last", "trips"), [(19.9, False), (20.1, True), (np.inf, True), (np.nan, True)])
def test_the_yardstick_is_the_longest_of_the_first_rounds(last, trips):
    model, state, notes = walk(scaffold(guard=10.0), [1.0, 2.0, 1.5, last])
    assert ("guard" in notes) == trips
    assert float(model.params["w"][0]) == pytest.approx(4.5 if trips else 4.5 + last)
    assert float(state["control"]["w"][0]) == (0.0 if trips else 4.0)


def test_rounds_after_the_first_do_not_stretch_the_yardstick():
    _, _, notes = walk(scaffold(guard=10.0), [1.0, 1.0, 1.0, 9.0, 11.0])
    assert "guard" in notes


def test_warm_up_rounds_are_applied_whatever_their_length():
    model, _, notes = walk(scaffold(guard=2.0), [0.1, 5.0])
    assert float(model.params["w"][0]) == pytest.approx(5.1)
    assert not notes


def test_a_guard_that_would_stop_everything_is_refused():
    with pytest.raises(JobError, match="guard"):
        scaffold(guard=1.0)
