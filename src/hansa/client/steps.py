# SPDX-License-Identifier: Apache-2.0
"""A script's own optimiser steps, seen by the federation: ``prepare(model, optimizer, loader)``.

    g ← adjust(context, params, g)      before each ``optimizer.step()``, after whatever clipping the script did
    count, Σ η                          after it

The script's loop stays as it is. A job says ``recipe.steps = "prepared"``, and strategies that act on every step
(FedProx, SCAFFOLD) then work under it; ``adjust`` is found by the strategy's name and options, never unpickled.

| case | result |
|---|---|
| a strategy that needs plain SGD steps (SCAFFOLD) and Adam, momentum, ``maximize`` or several learning rates | |
| | JobError before the first step |
| ``step(closure)`` | the closure's gradients are corrected; L-BFGS is refused |
| a parameter gets no gradient | its gradient counts as zero |
| ``GradScaler`` skips a step | it is not counted |
| gradients accumulated over several batches | one step, corrected once |
| several processes (DDP, FSDP2) | every rank corrects its gradients, or its shards of them, alike |
| the first FSDP, which makes one flat tensor of many, and a strategy that corrects | JobError before the first step |
| a parameter that the shared model lacks | left alone |
| ``prepare`` in every round, or once | the same |
| a job under dp-sgd | as :mod:`hansa.client.private` says |
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hansa import registry
from hansa.client import models, ranks
from hansa.client.private import PrivateSteps, restore
from hansa.client.script import Session, current
from hansa.client.torch import to_tensor
from hansa.core.fit import Trait
from hansa.core.ports import Adjust
from hansa.core.strategy import Strategy
from hansa.errors import JobError


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any = None) -> tuple[Any, ...]:
    """Let the federation see each step of ``optimizer``, and change the gradient where its strategy asks for that.

    Args:
        model: what is trained; its parameters have the shared model's names.
        optimizer: what moves them.
        loader: what the batches come from. If it has a data set of known length, that is the site's weight, unless
            the script says another in ``meta``.

    In a job under ``dp-sgd`` the loader that is returned draws the batches, and gives their examples one by one; the
    loop has to use it (:mod:`hansa.client.private`). Without a task at hand it waits for one, to know what job it is.

    Returns:
        ``(model, optimizer)`` or ``(model, optimizer, loader)``: what was given, but for such a loader.

    Raises:
        JobError: the strategy needs plain SGD steps, and this optimiser takes others.
        PrivacyError: the job is under ``dp-sgd``, and this can't be trained so.
    """
    session = current()
    if session.assignment is None and session.rank == 0 and ranks.world() == 1:
        session.wait()
    restore(optimizer)
    Stepping(session, model, optimizer, _length(loader))
    if session.assignment is not None and session.assignment.private is not None:
        loader = PrivateSteps(session, model, optimizer, loader).loader
    return (model, optimizer) if loader is None else (model, optimizer, loader)


def _length(loader: Any) -> int | None:
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) else None


_hooked: weakref.WeakKeyDictionary[torch.optim.Optimizer, Stepping] = weakref.WeakKeyDictionary()


class Stepping:
    """The hooks on one optimiser: they correct gradients, and count steps and learning rates a task."""

    def __init__(self, session: Session, model: nn.Module, optimizer: Any, num_examples: int | None = None) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's and Lightning's wrappers
            optimizer = optimizer.optimizer
        previous = _hooked.get(optimizer)
        if previous is not None:
            previous.remove()
        _hooked[optimizer] = self
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._all = {name: p for name, p in models.parameters(model).items() if id(p) in moved}
        self._flat = models.is_flat(model)
        self._tensors: Mapping[str, Tensor] = {}
        self._session = session
        self._num_examples = num_examples
        self._adjust: Adjust | None = None
        self._context: dict[str, dict[str, Tensor]] = {}
        self._of: tuple[int, int] | None = None
        self._count, self._lr_sum = 0, 0.0
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )
        session.stepping = self
        if session.assignment is not None and session.task == "train":
            self._check(optimizer, _strategy(session.assignment.correction))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def count(self) -> int:
        """How many steps were made since the last answer."""
        return self._count

    def taken(self) -> dict[str, float | None]:
        """Return what was done since the last call: the count of steps, the sum of learning rates, the rows."""
        told = {"count": self._count, "lr_sum": self._lr_sum, "num_examples": self._num_examples}
        self._count, self._lr_sum = 0, 0.0
        return told

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        session = self._session
        number = session.assignment.number if session.assignment is not None and ranks.world() == 1 else 0
        if self._of != (session.turn, number):
            self._of = (session.turn, number)
            self._begin(optimizer)
        if self._adjust is None:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._correct()
            return None

        def corrected() -> Any:  # Lightning's step() computes gradients inside
            loss = closure()
            self._correct()
            return loss

        return args[:1], {**kwargs, "closure": corrected}

    def _correct(self) -> None:
        assert self._adjust is not None
        with torch.no_grad():
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._tensors.items()}
            params = {name: p.detach() for name, p in self._tensors.items()}
            for name, grad in self._adjust(self._context, params, grads).items():
                self._tensors[name].grad = grad.to(self._tensors[name].dtype)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._count += 1
        self._lr_sum += float(optimizer.param_groups[0]["lr"])

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the correction of a new task."""
        session = self._session
        assignment = session.assignment
        named = ranks.share(assignment.correction if assignment is not None and session.rank == 0 else None)
        strategy = _strategy(named)
        self._check(optimizer, strategy)
        self._adjust = None if strategy is None else strategy.rule.adjust
        trees = ranks.share_trees(session.context) if strategy is not None else {}
        session.context = {}
        shared = {n: p for n, p in self._all.items() if all(n in tree for tree in trees.values())}
        if strategy is not None and not shared:
            raise JobError(
                f"The strategy {strategy.name!r} has no tensor that this optimiser moves: it names "
                f"{next(iter(next(iter(trees.values()), {})), 'none')!r}, the model {next(iter(self._all), 'none')!r}. "
                "Give prepare() the model whose names model.factory gave."
            )
        self._tensors = shared
        self._context = {
            part: {name: _like(to_tensor(tree[name]), p) for name, p in self._tensors.items()}
            for part, tree in trees.items()
        }

    def _check(self, optimizer: torch.optim.Optimizer, strategy: Strategy | None) -> None:
        if strategy is not None and isinstance(optimizer, torch.optim.LBFGS):
            raise JobError(f"The strategy {strategy.name!r} can't correct the gradients of L-BFGS's inner steps.")
        if strategy is not None and self._flat:
            raise JobError(
                f"The strategy {strategy.name!r} corrects the gradient of each tensor, and FullyShardedDataParallel "
                "makes one flat one of them. Use torch.distributed.fsdp.fully_shard (FSDP2), DDP, or one process."
            )
        if strategy is None or Trait.PLAIN_STEPS not in strategy.traits:
            return
        why = ""
        if not isinstance(optimizer, torch.optim.SGD):
            why = f"{type(optimizer).__name__} takes others"
        elif any(group["momentum"] for group in optimizer.param_groups):
            why = "this SGD has momentum"
        elif any(group.get("maximize") for group in optimizer.param_groups):
            why = "this SGD maximises"
        elif len({float(group["lr"]) for group in optimizer.param_groups}) > 1:
            why = "this SGD has several learning rates"
        if why:
            raise JobError(
                f"The strategy {strategy.name!r} needs plain SGD steps (w − ηg), and {why}. Use torch.optim.SGD "
                "without momentum, or another strategy."
            )


def _strategy(named: Mapping[str, Any] | None) -> Strategy | None:
    if named is None:
        return None
    built: Strategy = registry.build("strategies", named["name"], named["options"])
    return built


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return ``tensor`` where, and sharded as, ``parameter`` is."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)
    return tensor.to(parameter.device)
