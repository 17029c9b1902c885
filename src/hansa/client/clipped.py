# SPDX-License-Identifier: Apache-2.0
"""Sums of per-example gradients, each clipped, in torch: Σ_i g_i · min(1, C / ‖g_i‖), the norm over all tensors.

Two ways to the same sum:

ghost       Opacus: norms from each layer's inputs and output gradients, then one backward pass over losses weighed by
            the clip (Li et al. 2022, arXiv:2110.05679; Goodfellow 2015, arXiv:1510.01799). No gradient of a single
            example is ever held, so it takes the memory of plain training.
one by one  a backward pass an example: right for whatever is a function of the example, and slower.

Ghost clipping has to know every layer that is trained. Before it is used on a model, its norms are held against those
of the other way, on ``PROBES`` examples and moved parameters; where it fails or differs (tied weights, DoRA, layers
that see no batch), examples go one by one. ``torch.func.vmap`` is not among the ways: transformers' masks branch on
their values.

| case | result |
|---|---|
| no examples | zeros |
| an example's gradient is NaN or infinite | it counts as zero |
| dropout | drawn for each example by itself |
| a module that normalises over the batch, or keeps running statistics | ModelError that names it |
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hansa import registry
from hansa.errors import ModelError
from hansa.privacy.plan import SLACK

Batch = Mapping[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]
Sums = dict[str, Tensor]

PROBES = 3
"""Examples that ghost clipping is tried on."""
CLOSE = 1e-3
"""How far a ghost norm may lie from the true one, relatively; it is taken as ``SLACK`` times itself, which is more."""


class _UnservedError(Exception):
    """Ghost clipping does not know a layer of this model."""


def check(model: nn.Module) -> None:
    """Raise ModelError if a part of ``model`` mixes examples."""
    for name, part in model.named_modules():
        batchwise = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if batchwise or getattr(part, "track_running_stats", False):
            raise ModelError(
                f"Layer {name!r} ({type(part).__name__}) mixes the examples of a batch, or keeps statistics of them, "
                "and dp-sgd bounds what one example does. Use GroupNorm or LayerNorm."
            )


def clipped(grads: Mapping[str, Tensor], clip: float) -> Sums:
    """Return the sum over the first axis of gradients that are clipped jointly; a non-finite row counts as zero.

    Args:
        grads: name -> (rows, *shape).
        clip: the largest norm of a row.
    """
    squares = [(g.flatten(1) ** 2).sum(1) for g in grads.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = _factors(norms, clip)
    finite = torch.isfinite(norms)
    found = {}
    for name, g in grads.items():
        shape = (-1, *[1] * (g.ndim - 1))
        kept = torch.where(finite.view(shape), g, torch.zeros_like(g))
        found[name] = (kept * factors.view(shape).to(g.dtype)).sum(0)
    return found


def _factors(norms: Tensor, clip: float) -> Tensor:
    """Return min(1, clip / norm), or 0 where the norm is not finite."""
    factors = (clip / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


class Clipper:
    """The clipped sums of one model.

    Args:
        model: the module.
        trainable: the tensors that are trained, by name.
        losses: ``(model, batch) -> (rows,)``, each row's loss a function of that row; a batch is name -> tensor with
            the rows along its first axis.

    Raises:
        ModelError: see :func:`check`.
    """

    def __init__(self, model: nn.Module, trainable: Mapping[str, Tensor], losses: Losses) -> None:
        check(model)
        self.ghost: bool | None = None
        """Whether ghost clipping serves this model; None until it was tried."""
        self._model = model
        self._trainable = trainable
        self._losses = losses

    @contextlib.contextmanager
    def ready(self, probe: Callable[[], Batch]) -> Iterator[Callable[[Batch, float], Sums]]:
        """Give ``(batch, clip) -> name -> the sum of the rows' clipped gradients`` for the time of the block.

        Args:
            probe: makes a batch of ``PROBES`` rows, on which ghost clipping is tried the first time.
        """
        if self.ghost is None:
            self.ghost = self._ghost_agrees(probe())
        if not self.ghost:
            yield self._one_by_one
            return
        with _Ghost(self._model, self._trainable, self._losses) as ghost:
            yield ghost.sums

    def _one_by_one(self, batch: Batch, clip: float) -> Sums:
        found = {name: torch.zeros_like(tensor) for name, tensor in self._trainable.items()}
        for grads in self._each(batch):
            for name, total in clipped(grads, clip).items():
                found[name] += total
        return found

    def _each(self, batch: Batch) -> Iterator[Sums]:
        """Yield every row's gradient, with a first axis of 1."""
        for row in range(_rows(batch)):
            loss = self._losses(self._model, {name: tensor[row : row + 1] for name, tensor in batch.items()})
            grads = torch.autograd.grad(loss.sum(), list(self._trainable.values()), allow_unused=True)
            yield {
                name: (torch.zeros_like(tensor) if grad is None else grad)[None]
                for (name, tensor), grad in zip(self._trainable.items(), grads, strict=True)
            }

    def _ghost_agrees(self, batch: Batch) -> bool:
        layers = _layers(self._model)
        if layers is None:
            return False
        with _moved(self._model, self._trainable, layers):
            true = [torch.stack([(g**2).sum() for g in grads.values()]).sum().sqrt() for grads in self._each(batch)]
            try:
                with _Ghost(self._model, self._trainable, self._losses) as ghost:
                    _, norms = ghost.norms(batch)
            except (_UnservedError, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
                return False
        return bool(torch.allclose(norms, torch.stack(true).float(), rtol=CLOSE, atol=0.0))


class _Ghost:
    """Opacus' hooks on a model, from entering to leaving."""

    def __init__(self, model: nn.Module, trainable: Mapping[str, Tensor], losses: Losses) -> None:
        self._model = model
        self._trainable = trainable
        self._losses = losses
        self._rows = 0

    def __enter__(self) -> _Ghost:
        self._left = contextlib.ExitStack()
        self._left.enter_context(warnings.catch_warnings())
        # Of an embedding, which is the first layer; its output's gradient is all that Opacus needs there.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        hooks = registry.load_object("opacus.grad_sample:GradSampleHooksFastGradientClipping")
        self._hooks = hooks(self._model, loss_reduction="sum", strict=False, use_ghost_clipping=True)
        self._left.callback(self._hooks.cleanup)
        self._left.callback(self._clear)
        for part in self._model.modules():
            if isinstance(part, nn.Embedding) and part.weight.requires_grad:
                self._left.callback(part.register_forward_pre_hook(self._a_row_each).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.close()

    def _a_row_each(self, _part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give an embedding that is shared by all rows (of positions) its indices once for each, contiguously."""
        if not args or not isinstance(args[0], Tensor):
            return args
        index, *rest = args
        if len(index) == 1:
            index = index.expand(self._rows, *index.shape[1:])
        return index.contiguous(), *rest

    def sums(self, batch: Batch, clip: float) -> Sums:
        """Return the sum of the rows' clipped gradients, by name."""
        while _rows(batch):
            values, norms = self.norms(batch)
            finite = torch.isfinite(norms)
            if bool(finite.all()):
                self._hooks.disable_hooks()
                (values * _factors(norms * SLACK, clip)).sum().backward()  # type: ignore[no-untyped-call]
                break
            batch = {name: tensor[finite] for name, tensor in batch.items()}
        found = {
            name: torch.zeros_like(tensor) if tensor.grad is None or not _rows(batch) else tensor.grad
            for name, tensor in self._trainable.items()
        }
        self._clear()
        return found

    def norms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rows' losses, whose graph is kept, and the norms of their gradients."""
        self._rows = _rows(batch)
        self._clear()
        self._hooks.enable_hooks()
        values = self._losses(self._model, batch)
        values.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        squares = torch.zeros(self._rows, device=values.device)
        for name, tensor in self._trainable.items():
            norm = getattr(tensor, "_norm_sample", None)
            if norm is None and tensor.grad is None:
                continue
            if norm is None or norm.shape != (self._rows,):
                raise _UnservedError(name)
            squares += norm.float() ** 2
        for tensor in self._trainable.values():
            tensor.grad = None
        return values, squares.sqrt()

    def _clear(self) -> None:
        """Forget what a pass left on tensors and layers, so that nothing stale is ever taken for a norm."""
        for tensor in self._trainable.values():
            tensor.grad = None
            tensor.__dict__.pop("_norm_sample", None)
            tensor._forward_counter = 0  # type: ignore[attr-defined]
        for part in self._model.modules():
            part.__dict__.pop("activations", None)
            part.__dict__.pop("max_batch_len", None)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _layers(model: nn.Module) -> list[nn.Module] | None:
    """Return the modules that hold trained tensors; None where one has parts of its own, buffers, or shares a tensor.

    Such modules Opacus would compute a second time, with other dropout, or count twice.
    """
    layers = [part for part in model.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    held = [id(p) for part in layers for p in part.parameters(recurse=False)]
    if len(set(held)) < len(held) or any([*part.children()] or [*part.buffers()] for part in layers):
        return None
    return layers


@contextlib.contextmanager
def _moved(model: nn.Module, trainable: Mapping[str, Tensor], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block, switch dropout off and move all trained tensors away from zeros (LoRA's B).

    ``layers`` stay in training mode, as Opacus wants it: one with dropout inside will then not agree.
    """
    kept = {name: tensor.detach().clone() for name, tensor in trainable.items()}
    drawn = torch.Generator().manual_seed(0)
    try:
        model.eval()
        for part in layers:
            part.train()
        with torch.no_grad():
            for tensor in trainable.values():
                tensor += 0.02 * torch.randn(tensor.shape, generator=drawn, dtype=tensor.dtype).to(tensor.device)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in trainable.items():
                tensor.copy_(kept[name])
        model.train()
