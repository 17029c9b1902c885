# SPDX-License-Identifier: Apache-2.0
"""The torch loop against plain arithmetic: steps, corrections, purity, partial work, trees as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hansa.client import torch as local
from hansa.core import tree as trees
from hansa.core.config import TrainSection
from hansa.core.ports import Correction
from hansa.errors import ModelError, NonFiniteError

TARGETS = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 3.0])]


class Point(nn.Module):
    """Two parameters, one of which no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.unused = nn.Parameter(torch.ones(1))


def half_square(model: Any, target: Tensor) -> tuple[Tensor, Mapping[str, float]]:
    value = 0.5 * ((model.w - target) ** 2).sum()
    return value, {"loss_sum": float(value.detach()), "count": 1.0}


def run(section: TrainSection, correction: Correction | None = None, planned: int = 3) -> tuple[Point, local.Trained]:
    model = Point()
    trained = local.train(model, dict(model.named_parameters()), TARGETS, half_square, section, planned, correction)
    return model, trained


def test_sgd_steps_are_w_minus_lr_times_gradient() -> None:
    model, trained = run(TrainSection(optimizer="sgd", lr=0.1))
    w, losses = np.zeros(2), []
    for target in TARGETS:
        losses.append(0.5 * ((w - target.numpy()) ** 2).sum())
        w = w - 0.1 * (w - target.numpy())
    assert model.w.tolist() == pytest.approx(w.tolist())
    assert trained.sums == {"loss_sum": pytest.approx(sum(losses)), "count": 3.0}
    assert (trained.steps.count, trained.steps.lr_sum, trained.completed) == (3, pytest.approx(0.3), 1.0)


def test_adamw_equals_torch_own_loop() -> None:
    model, _ = run(TrainSection(optimizer="adamw", lr=0.01, weight_decay=0.1))
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1)
    for target in TARGETS:
        optimizer.zero_grad()
        (0.5 * ((w - target) ** 2).sum()).backward()
        optimizer.step()
    assert torch.equal(model.w, w)


def test_momentum_and_weight_decay_reach_the_optimiser() -> None:
    plain, _ = run(TrainSection(optimizer="sgd", lr=0.1))
    for extra in ({"momentum": 0.9}, {"weight_decay": 0.5}):
        other, _ = run(TrainSection(optimizer="sgd", lr=0.1, **extra))
        assert not torch.equal(plain.w, other.w)


def test_a_correction_sees_params_and_clipped_gradients_and_has_the_last_word() -> None:
    seen: list[tuple[list[float], float, list[float]]] = []

    def adjust(context: Any, params: Any, grads: Any) -> Any:
        assert set(grads) == set(params) == {"w", "unused"}
        seen.append((params["w"].tolist(), float(grads["w"].norm()), grads["unused"].tolist()))
        return {name: g + 10 * (params[name] - context["start"][name]) for name, g in grads.items()}

    start = {"w": np.array([1.0, 1.0], np.float32), "unused": np.array([1.0], np.float32)}
    section = TrainSection(optimizer="sgd", lr=0.1, clip_grad=0.5)
    model, _ = run(section, Correction({"start": start}, adjust))
    w = np.zeros(2)
    for target in TARGETS:
        g = w - target.numpy()
        g = g * min(1.0, 0.5 / np.linalg.norm(g)) + 10 * (w - 1)
        w = w - 0.1 * g
    assert model.w.tolist() == pytest.approx(w.tolist(), rel=1e-4)
    assert model.unused.tolist() == [1.0]
    assert seen[0] == ([0.0, 0.0], pytest.approx(0.5, rel=1e-4), [0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_step(bad: float) -> None:
    batches = [torch.zeros(2), torch.tensor([bad, 0.0])]
    model = Point()
    with pytest.raises(NonFiniteError, match=r"loss of step 2 is (nan|inf)"):
        local.train(model, {"w": model.w}, batches, half_square, TrainSection(), 2)


def test_time_runs_out_after_at_least_one_step() -> None:
    _, trained = run(TrainSection(max_seconds=1e-9), planned=4)
    assert (trained.steps.count, trained.completed) == (1, 0.25)


def test_evaluation_sums_without_gradients_and_in_evaluation_mode() -> None:
    model = Point()

    def score(module: nn.Module, batch: Tensor) -> Mapping[str, float]:
        assert not module.training
        assert not torch.is_grad_enabled()
        return {"sum": float(batch.sum())}

    assert local.evaluate(model, TARGETS, score) == {"sum": 5.5}
    assert local.evaluate(model, [], score) == {}


def test_seeds_depend_on_every_label_and_leave_no_trace() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = []
    for labels in ((0, 1, "a"), (0, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 1, "a")):
        with local.seeded(*labels):
            draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4
    assert torch.equal(torch.get_rng_state(), before)


@given(st.sampled_from(trees.dtype_names()), st.lists(st.integers(0, 3), max_size=3))
def test_arrays_and_tensors_share_memory_in_every_dtype(name: str, shape: list[int]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(trees.dtype_of(name))
    tensor = local.to_tensor(array)
    assert str(tensor.dtype) == f"torch.{name}"
    back = local.to_array(tensor)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not array.size or np.shares_memory(back, array)


def test_bfloat16_bits_survive() -> None:
    bits = np.array([0x7F80, 0x0001, 0xC0DE], np.uint16)
    array = bits.view(ml_dtypes.bfloat16)
    assert local.to_array(local.to_tensor(array)).view(np.uint16).tolist() == bits.tolist()
    assert local.to_tensor(array)[0].item() == math.inf


def test_arrays_that_must_not_be_written_are_copied() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    local.to_tensor(array).add_(1)
    assert array.tolist() == [0, 0, 0]


def test_copies_do_not_follow_the_model_and_foreign_trees_are_refused() -> None:
    model = Point()
    tensors = dict(model.named_parameters())
    tree = local.copy_out(tensors)
    local.copy_in(tensors, {**tree, "w": np.array([5, 6], np.float32)})
    assert model.w.tolist() == [5, 6]
    assert tree["w"].tolist() == [0, 0]
    with pytest.raises(ModelError, match="lacks tensor 'w'"):
        local.copy_in(tensors, {"unused": tree["unused"]})
    with pytest.raises(ModelError, match="has an unknown tensor 'x'"):
        local.copy_in(tensors, {**tree, "x": tree["w"]})
    with pytest.raises(ModelError, match=r"'w' is \[3\] in the shared model and \[2\] in this one"):
        local.copy_in(tensors, {**tree, "w": np.zeros(3)})
