# SPDX-License-Identifier: Apache-2.0
"""A site's local steps in torch, and trees as torch tensors.

Guarantees, each held by a test:

- training is a pure function of (parameters, batches, seed): the optimiser starts afresh, and torch's generator
  is seeded for the time of the call and then put back as it was;
- a strategy's correction sees the gradient last, after clipping, so what it adds is never clipped away;
- tensors and arrays share memory where both sides allow it, bfloat16 included.

| case | result |
|---|---|
| the loss becomes NaN or infinite | NonFiniteError that names the step; the parameters are to be thrown away |
| a parameter gets no gradient | left alone; under a correction its gradient counts as zero |
| ``max_seconds`` runs out | at least one step is made; ``completed`` is the share of the planned steps |
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hansa.core import rng
from hansa.core.config import TrainSection
from hansa.core.ports import Correction
from hansa.core.strategy import Steps
from hansa.core.tree import Array, Tree
from hansa.errors import ModelError, NonFiniteError
from hansa.privacy.steps import NoisySteps

Sums = dict[str, float]
Loss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]
Score = Callable[[nn.Module, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Trained:
    """What local steps leave behind: their count and learning rates' sum, metric sums, the share of the plan."""

    steps: Steps
    sums: Sums
    completed: float


def to_tensor(array: Array) -> Tensor:
    """Return ``array`` as a CPU tensor on the same memory; copied only where NumPy must not write to it."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> Array:
    """Return ``tensor`` as an array, on the same memory if it lies on the CPU and is contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def copy_out(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return a tree with copies of ``tensors``."""
    return {name: to_array(tensor).copy() for name, tensor in tensors.items()}


def copy_in(tensors: Mapping[str, Tensor], tree: Tree) -> None:
    """Overwrite ``tensors`` with the leaves of ``tree``.

    Raises:
        ModelError: their names or shapes differ.
    """
    odd = sorted(tensors.keys() ^ tree.keys())
    if odd:
        side = "lacks" if odd[0] in tensors else "has an unknown"
        raise ModelError(f"The shared model {side} tensor {odd[0]!r}: it was made by another job or release.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            leaf = tree[name]
            if tuple(leaf.shape) != tuple(tensor.shape):
                raise ModelError(
                    f"Tensor {name!r} is {list(leaf.shape)} in the shared model and {list(tensor.shape)} in this one."
                )
            tensor.copy_(to_tensor(leaf))


@contextlib.contextmanager
def seeded(seed: int, *labels: int | str) -> Iterator[None]:
    """Seed torch's generators from (seed, labels) inside the ``with`` block; they are put back after it."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(rng.derive(seed, *labels))
        yield


def optimizer(section: TrainSection, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimiser that the job names, over ``params``."""
    if section.optimizer == "sgd":
        return torch.optim.SGD(params, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    return torch.optim.AdamW(params, lr=section.lr, weight_decay=section.weight_decay)


def train(
    model: nn.Module,
    trainable: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Loss,
    section: TrainSection,
    planned: int,
    correction: Correction | None = None,
) -> Trained:
    """Make up to ``planned`` optimiser steps in place.

    Args:
        model: the module; it is put in training mode.
        trainable: the parameters that the optimiser moves, by their names in the shared tree.
        batches: what ``loss`` is given, one item a step; steps end early if it does.
        loss: ``(model, batch) -> (scalar tensor to minimise, metric sums)``.
        section: optimiser, learning rate, clipping, time limit (seconds).
        planned: number of steps.
        correction: what the strategy does to each gradient.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    model.train()
    stepper = optimizer(section, trainable.values())
    adjust = _lifted(correction, trainable) if correction else None
    sums: Sums = {}
    count = 0
    begun = time.monotonic()
    for batch in _at_most(planned, batches):
        stepper.zero_grad(set_to_none=True)
        value, part = loss(model, batch)
        if not math.isfinite(value.item()):
            raise NonFiniteError(
                f"The loss of step {count + 1} is {value.item()}. Lower train.lr, set train.clip_grad, "
                "or look for broken examples at this site."
            )
        value.backward()  # type: ignore[no-untyped-call]
        if section.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(trainable.values(), section.clip_grad)
        if adjust:
            adjust()
        stepper.step()
        count += 1
        add(sums, part)
        if section.max_seconds is not None and time.monotonic() - begun >= section.max_seconds:
            break
    return Trained(Steps(count, count * section.lr), sums, count / planned)


def train_privately(
    trainable: Mapping[str, Tensor],
    noisy: NoisySteps,
    sums: Callable[[NDArray[np.int64]], Mapping[str, Tensor]],
    section: TrainSection,
    correction: Correction | None = None,
) -> Trained:
    """Make the optimiser steps of a round of DP-SGD in place; metrics of the batches are not kept.

    Args:
        trainable: the parameters that the optimiser moves, by their names in the shared tree.
        noisy: the round's draws.
        sums: ``row numbers -> name -> the sum of their clipped gradients``, on float32 tensors; it is given at most
            ``section.batch_size`` rows at once.
        section: optimiser, learning rate, time limit (seconds).
        correction: what the strategy does to each gradient, after the noise.
    """
    stepper = optimizer(section, trainable.values())
    adjust = _lifted(correction, trainable) if correction else None
    count = 0
    begun = time.monotonic()
    for step, rows in enumerate(noisy.batches()):
        total = {name: torch.zeros_like(tensor) for name, tensor in trainable.items()}
        for start in range(0, len(rows), section.batch_size):
            for name, part in sums(rows[start : start + section.batch_size]).items():
                total[name] += part
        noised = noisy.noised(step, {name: to_array(tensor) for name, tensor in total.items()})
        for name, tensor in trainable.items():
            tensor.grad = to_tensor(noised[name]).to(tensor.device)
        if adjust:
            adjust()
        stepper.step()
        count += 1
        if section.max_seconds is not None and time.monotonic() - begun >= section.max_seconds:
            break
    return Trained(Steps(count, count * section.lr), {}, count / noisy.count)


def _at_most(count: int, items: Iterable[Any]) -> Iterator[Any]:
    iterator = iter(items)
    for _ in range(count):
        try:
            yield next(iterator)
        except StopIteration:
            return


def _lifted(correction: Correction, trainable: Mapping[str, Tensor]) -> Callable[[], None]:
    first = next(iter(trainable.values()), None)
    device = first.device if first is not None else None
    context = {
        part: {name: to_tensor(leaf).to(device) for name, leaf in tree.items()}
        for part, tree in correction.context.items()
    }

    def apply() -> None:
        with torch.no_grad():
            params = {name: tensor.detach() for name, tensor in trainable.items()}
            grads = {
                name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                for name, tensor in trainable.items()
            }
            for name, grad in correction.adjust(context, params, grads).items():
                trainable[name].grad = grad.to(trainable[name].dtype)

    return apply


def evaluate(model: nn.Module, batches: Iterable[Any], score: Score) -> Sums:
    """Return the sums of ``score(model, batch)`` over ``batches``, in evaluation mode and without gradients."""
    model.eval()
    sums: Sums = {}
    with torch.inference_mode():
        for batch in batches:
            add(sums, score(model, batch))
    return sums


def add(sums: Sums, part: Mapping[str, float]) -> None:
    """Add ``part`` to ``sums`` in place."""
    for name, value in part.items():
        sums[name] = sums.get(name, 0.0) + value
