# SPDX-License-Identifier: Apache-2.0
"""Optimisers, held by the papers' formulas, by torch's own optimisers, and by one rule serving NumPy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hansa.core import optimizer as optimizers
from hansa.core import storage
from hansa.core.optimizer import Optimizer, adagrad, adam, sgd, yogi
from hansa.errors import JobError

ALL: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: sgd(0.1),
    "momentum": lambda: sgd(0.1, momentum=0.9),
    "nesterov": lambda: sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda: adagrad(0.1),
    "adagrad with momentum": lambda: adagrad(0.1, beta1=0.5),
    "adam": lambda: adam(0.05),
    "adamw": lambda: adam(0.05, beta2=0.999, tau=1e-8, weight_decay=0.1, bias_correction=True),
    "yogi": lambda: yogi(0.05),
}

rng = np.random.default_rng(0)
START = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=5), "scalar": np.array(0.5)}
GRADS = [{name: rng.normal(size=leaf.shape) * 10.0**k for name, leaf in START.items()} for k in (0, -2, 1, -1, 0, 2)]


def run(optimizer: Optimizer, params: Any, grads: Any) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for gradient in grads:
        params, state = optimizer.update(params, gradient, state)
    return params, state


def as_numpy(tree: Any, dtype: Any) -> Any:
    return {name: leaf.astype(dtype) for name, leaf in tree.items()}


def as_torch(tree: Any, dtype: Any) -> Any:
    return {name: torch.tensor(leaf, dtype=dtype) for name, leaf in tree.items()}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("float64", 1e-12)])
def test_numpy_and_torch_give_the_same(make: Callable[[], Optimizer], dtype: str, rtol: float) -> None:
    ours, state = run(make(), as_numpy(START, dtype), [as_numpy(g, dtype) for g in GRADS])
    kind = getattr(torch, dtype)
    theirs, torch_state = run(make(), as_torch(START, kind), [as_torch(g, kind) for g in GRADS])
    for name in START:
        assert not np.array_equal(ours[name], START[name].astype(dtype)), "nothing moved"
        np.testing.assert_allclose(ours[name], theirs[name].numpy(), rtol=rtol, atol=rtol)
    for key, tree in state.items():
        for name, leaf in tree.items():
            np.testing.assert_allclose(leaf, torch_state[key][name].numpy(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_leaf_of_model_and_state_keeps_its_dtype(make: Callable[[], Optimizer], dtype: str) -> None:
    params, state = run(make(), as_numpy(START, dtype), [as_numpy(g, dtype) for g in GRADS])
    for tree in (params, *state.values()):
        assert {leaf.dtype.name for leaf in tree.values()} == {dtype}
    assert {name: leaf.shape for name, leaf in params.items()} == {name: leaf.shape for name, leaf in START.items()}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_a_run_may_be_cut_and_go_on_from_disk(make: Callable[[], Optimizer], tmp_path: Any) -> None:
    start = as_numpy(START, np.float32)
    grads = [as_numpy(g, np.float32) for g in GRADS]
    whole, _ = run(make(), start, grads)
    params, state = run(make(), start, grads[:3])
    for name, tree in state.items():
        storage.save_tree(tmp_path / name, tree)
    state = {name: storage.load_tree(tmp_path / name) for name in state}
    for gradient in grads[3:]:
        params, state = make().update(params, gradient, state)
    for name in whole:
        assert params[name].tobytes() == whole[name].tobytes()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_an_update_changes_nothing_in_place(make: Callable[[], Optimizer]) -> None:
    optimizer, params, grads = make(), as_numpy(START, np.float32), as_numpy(GRADS[0], np.float32)
    state = optimizer.init(params)
    for tree in (params, grads, *state.values()):
        for leaf in tree.values():
            if isinstance(leaf, np.ndarray):
                leaf.flags.writeable = False
    optimizer.update(params, grads, state)


def one(value: float) -> dict[str, np.ndarray]:
    return {"w": np.array([value])}


def steps(optimizer: Optimizer, start: float, grads: list[float]) -> tuple[list[float], Any]:
    """The trajectory of a single number."""
    params: Any = one(start)
    state, path = optimizer.init(params), []
    for gradient in grads:
        params, state = optimizer.update(params, one(gradient), state)
        path.append(float(params["w"][0]))
    return path, state


# Reddi et al. 2021, Algorithm 2, worked by hand with g = -delta: m = (1-b1) g, then v, then w - lr m / (sqrt v + tau).


def test_adam_by_hand() -> None:
    b1, b2, lr, tau, g, h = 0.9, 0.99, 0.1, 1e-3, 0.5, -2.0
    m1, v1 = (1 - b1) * g, (1 - b2) * g**2
    w1 = 1 - lr * m1 / (math.sqrt(v1) + tau)
    m2, v2 = b1 * m1 + (1 - b1) * h, b2 * v1 + (1 - b2) * h**2
    w2 = w1 - lr * m2 / (math.sqrt(v2) + tau)
    path, state = steps(adam(lr, b1, b2, tau), 1.0, [g, h])
    assert path == pytest.approx([w1, w2], rel=1e-12)
    assert (state["m"]["w"][0], state["v"]["w"][0]) == pytest.approx((m2, v2), rel=1e-12)
    assert path[0] == pytest.approx(1 - 0.1 * 0.05 / 0.051, rel=1e-9), "no bias correction"


def test_yogi_by_hand() -> None:
    b1, b2, lr, tau = 0.9, 0.99, 0.1, 1e-3
    w, m, v, expected = 1.0, 0.0, 0.0, []
    grads = [2.0, 0.1, 0.1, -3.0, 0.0]
    for g in grads:
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * g**2 * np.sign(v - g**2)
        w -= lr * m / (math.sqrt(v) + tau)
        expected.append(w)
    path, state = steps(yogi(lr, b1, b2, tau), 1.0, grads)
    assert path == pytest.approx(expected, rel=1e-12)
    assert state["v"]["w"][0] == pytest.approx(v, rel=1e-12)
    assert steps(yogi(lr, b1, b2, tau), 1.0, [2.0, 0.1])[1]["v"]["w"][0] < (1 - b2) * 4, "v shrinks, other than adam's"
    adam_path, _ = steps(adam(lr, b1, b2, tau), 1.0, grads)
    assert path[1:] != pytest.approx(adam_path[1:], rel=1e-6)


def test_yogi_leaves_v_alone_where_it_equals_the_squared_gradient() -> None:
    optimizer = yogi(0.1)
    _, state = optimizer.update(one(0.0), one(3.0), {"m": one(0.0), "v": one(9.0)})
    assert state["v"]["w"][0] == 9.0


def test_adagrad_by_hand() -> None:
    lr, tau, grads = 0.1, 1e-3, [2.0, -1.0, 0.5]
    w, v, expected = 1.0, 0.0, []
    for g in grads:
        v += g**2
        w -= lr * g / (math.sqrt(v) + tau)
        expected.append(w)
    path, state = steps(adagrad(lr, 0.0, tau), 1.0, grads)
    assert path == pytest.approx(expected, rel=1e-12)
    assert state["v"]["w"][0] == 5.25


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad", "momentum"])
def test_a_zero_gradient_leaves_a_fresh_model_alone(name: str) -> None:
    path, _ = steps(ALL[name](), 1.5, [0.0, 0.0])
    assert path == [1.5, 1.5]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (sgd(0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
        (
            adam(1e-2, 0.9, 0.999, 1e-8, weight_decay=0.05, bias_correction=True),
            lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.05),
        ),
        (
            adam(1e-2, 0.0, 0.5, 1e-4, bias_correction=True),
            lambda p: torch.optim.AdamW(p, 1e-2, (0.0, 0.5), 1e-4, weight_decay=0.0),
        ),
        (adagrad(0.1, 0.0, 1e-10), lambda p: torch.optim.Adagrad(p, 0.1)),
    ],
    ids=["sgd", "momentum", "nesterov", "adamw", "adamw without momentum", "adagrad"],
)
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-12)])
def test_against_torch_optimisers(ours: Optimizer, theirs: Any, dtype: str, rtol: float) -> None:
    kind = getattr(torch, dtype)
    parameters = {name: torch.nn.Parameter(leaf) for name, leaf in as_torch(START, kind).items()}
    optimizer = theirs([*parameters.values()])
    grads = GRADS * 5
    for gradient in grads:
        for name, leaf in as_torch(gradient, kind).items():
            parameters[name].grad = leaf
        optimizer.step()
    got, _ = run(ours, as_numpy(START, dtype), [as_numpy(g, dtype) for g in grads])
    for name, leaf in parameters.items():
        np.testing.assert_allclose(got[name], leaf.detach().numpy(), rtol=rtol, atol=rtol)


def test_the_bias_correction_is_right_to_rounding_in_float32() -> None:
    """1 - 0.999^t computed in float32 is off by 6e-5 at t = 1; the running average of ones is not."""
    optimizer = adam(1.0, 0.9, 0.999, 1e-8, bias_correction=True)
    state = optimizer.init({"w": np.ones(1, np.float32)})
    params = {"w": np.ones(1, np.float32)}
    for t in range(1, 2001):
        params, state = optimizer.update(params, {"w": np.ones(1, np.float32)}, state)
        if t in (1, 2, 10, 100, 2000):
            assert float(state["correction"]["v"]) == pytest.approx(1 - 0.999**t, rel=5e-6)


def test_a_rule_runs_under_vmap() -> None:
    """The batched engine trains many sites at once: a state of one site must be an array for each."""
    optimizer = adam(0.05, bias_correction=True)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    grads = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))

    def train(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        params, _ = run(optimizer, {"w": w}, [{"w": g[0]}, {"w": g[1]}])
        return params["w"]

    together = torch.func.vmap(train, in_dims=(0, 1))(start, grads)
    for i in range(4):
        torch.testing.assert_close(together[i], train(start[i], grads[:, i]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: sgd(0),
        lambda: sgd(-1),
        lambda: sgd(math.nan),
        lambda: sgd(math.inf),
        lambda: sgd(1, momentum=1),
        lambda: sgd(1, momentum=-0.1),
        lambda: sgd(1, nesterov=True),
        lambda: adam(beta1=1.0),
        lambda: adam(beta2=1.0),
        lambda: adam(beta2=-0.1),
        lambda: adam(tau=0),
        lambda: adam(weight_decay=-1),
        lambda: adam(weight_decay=math.nan),
        lambda: yogi(beta2=2.0),
        lambda: yogi(lr=0),
        lambda: adagrad(tau=-1),
        lambda: adagrad(beta1=1),
    ],
)
def test_settings_out_of_range_are_job_errors(make: Callable[[], Optimizer]) -> None:
    with pytest.raises(JobError, match=r"must be|needs"):
        make()


def test_only_plain_sgd_says_it_is_plain() -> None:
    """SCAFFOLD's controls are (w - y) / (K lr), which holds for no other step."""
    assert [name for name, make in ALL.items() if make().plain] == ["sgd"]
    assert sgd(0.3).lr == 0.3


def test_every_public_optimiser_is_tested() -> None:
    public = {name for name, value in vars(optimizers).items() if callable(value) and name[0].islower()}
    assert public - {"dataclass"} == {"sgd", "adam", "adagrad", "yogi"}
