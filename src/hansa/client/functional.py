# SPDX-License-Identifier: Apache-2.0
"""Training as a pure function of (parameters, batch), for NumPy and for torch.

A batch is a tuple of arrays with the same number of rows; the last one holds the targets, those before it are what
the model is called with. One local step, the same whatever the framework and the engine:

    g ← ∇ mean loss(params, batch);   g ← clip(g);   g ← adjust(context, params, g);   params ← optimizer(params, g)

Guarantees, each held by a test:

- training is a pure function of (parameters, data, seed, round, site): the optimiser starts afresh in each round;
- a federation of one site equals plain training on that site's batches to 1e-6;
- the batches of a site depend on (seed, round, site) alone, so all engines see the same ones.

| case | result |
|---|---|
| the loss becomes NaN or infinite | NonFiniteError that names the step |
| the last batch of an epoch is partial | its mean is over the rows it has |
| ``max_seconds`` runs out | at least one step is made; ``completed`` is the share of the planned steps |
| a torch module that normalises over the batch (BatchNorm) | ModelError: it is no function of its parameters |
| a torch module with dropout | trained one site at a time, from a generator seeded by (seed, round, site) |
| dp-sgd | :mod:`hansa.privacy.steps` in place of the batches above; a NaN loss is not told of |
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hansa.client.batches import num_steps, shuffled
from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.config import TrainSection
from hansa.core.fit import Trait
from hansa.core.optimizer import Optimizer, adam, sgd
from hansa.core.ports import EVERYONE, Adjust, Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Array, Tree
from hansa.core.values import Plan
from hansa.errors import DataError, JobError, ModelError, NonFiniteError, nearest
from hansa.privacy.steps import NoisySteps

if TYPE_CHECKING:
    from torch import nn

AnyTree = Mapping[str, Any]
Batch = tuple[Any, ...]
Context = Mapping[str, AnyTree]
ValueAndGrad = Callable[[AnyTree, Batch], tuple[Any, AnyTree]]
PerRow = Callable[[AnyTree, Batch], Mapping[str, Any]]
Metric = Callable[[Any, Any], Any]

EXAMPLES = "examples"
"""The metric sum that counts rows; every other one is divided by it."""

EACH_BYTES = 256 << 20
"""What the gradients of single rows, held at once, may take, about."""


def _same_arrays(arrays: Sequence[Array]) -> Batch:
    return tuple(arrays)


@dataclass(frozen=True)
class Functional:
    """A model and its loss as pure functions. Build one with :func:`of_numpy` or :func:`of_torch`.

    Attributes:
        params: what training starts from, NumPy arrays in native dtypes.
        gradient: ``(params, batch, mask) -> (sums over rows, gradient of the mean loss)``; ``mask`` is None, or
            one factor a row, 1 or 0, where 0 stands for a row that is padding.
        rows: ``(params, batch) -> metric -> one value a row``, among them ``loss``; for evaluation.
        lift: NumPy arrays to the framework's own, bound to the same memory where that can be.
        lower: the framework's arrays to NumPy.
        feed: what a batch's arrays are turned into once, before they are lifted (dtypes).
        scope: ``(seed, *labels)`` -> a context in which the framework's generator is seeded.
        vectorised: whether ``gradient`` may be mapped over many sites by ``torch.func.vmap``.
        clipped: ``(params, batch, clip) -> the sum of the rows' gradients``, each clipped to a joint norm, and zero
            where it is NaN or infinite; None where a row's gradient can't be had, and dp-sgd is then refused.
    """

    params: Tree
    gradient: Callable[[AnyTree, Batch, Any], tuple[Mapping[str, Any], AnyTree]]
    rows: PerRow
    lift: Callable[[Array], Any] = lambda array: array
    lower: Callable[[Any], Array] = lambda array: array
    feed: Callable[[Sequence[Array]], Sequence[Array]] = _same_arrays
    scope: Callable[..., contextlib.AbstractContextManager[None]] = lambda *labels: contextlib.nullcontext()
    vectorised: bool = False
    clipped: Callable[[AnyTree, Batch, float], AnyTree] | None = None


def of_numpy(params: Tree, value_and_grad: ValueAndGrad, rows: PerRow | None = None) -> Functional:
    """Return a model whose gradient is given by hand.

    Args:
        params: name -> array, what training starts from.
        value_and_grad: ``(params, batch) -> (mean loss over the batch, name -> its gradient)``.
        rows: for evaluation, ``(params, batch) -> {"loss": (rows,), other metrics: (rows,)}``; the loss of
            ``value_and_grad`` alone by default.

    >>> def square(params, batch):
    ...     error = params["w"] - batch[-1].mean()
    ...     return float(error**2) / 2, {"w": error}
    >>> of_numpy({"w": np.zeros(())}, square).vectorised
    False
    """

    def gradient(params: AnyTree, batch: Batch, mask: Any) -> tuple[Mapping[str, Any], AnyTree]:
        assert mask is None, "a hand-written gradient knows no padding"
        value, grads = value_and_grad(params, batch)
        return {"loss": value * len(batch[-1])}, grads

    def whole(params: AnyTree, batch: Batch) -> Mapping[str, Any]:
        return {"loss": np.full(len(batch[-1]), value_and_grad(params, batch)[0])}

    def clipped(params: AnyTree, batch: Batch, clip: float) -> AnyTree:
        found = {name: np.zeros_like(leaf) for name, leaf in params.items()}
        for row in range(len(batch[-1])):
            _, grads = value_and_grad(params, tuple(array[row : row + 1] for array in batch))
            norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grads.values()))
            if math.isfinite(norm):
                factor = min(1.0, clip / norm) if norm else 1.0
                found = {name: total + grads[name] * factor for name, total in found.items()}
        return found

    start = {name: np.array(leaf) for name, leaf in params.items()}
    return Functional(start, gradient, rows or whole, clipped=clipped)


def of_torch(
    module: nn.Module, loss: Callable[[Any, Any], Any], metrics: Mapping[str, Metric] | None = None
) -> Functional:
    """Return a torch module and its loss as pure functions of the module's parameters.

    Rows must not affect each other in the forward pass. Floating arrays of a batch are cast to the parameters'
    dtype. Buffers are constants; the module given is never changed.

    Args:
        module: called with all arrays of a batch but the last.
        loss: ``(outputs, targets) -> one value a row``; a loss with torch's own ``reduction`` (``F.cross_entropy``,
            ``nn.MSELoss()``) is asked for that by itself.
        metrics: further ``(outputs, targets) -> one value a row``.

    Raises:
        ModelError: the module has no parameters, or normalises over the batch.
        MissingExtraError: torch is not installed.
    """
    torch = _torch()
    from hansa.client import clipped as bounded
    from hansa.client import torch as bridge

    module = copy.deepcopy(module)
    named = dict(module.named_parameters())
    if not named:
        raise ModelError("The model has no parameters to train.")
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"Layer {name!r} ({type(part).__name__}) normalises over the batch and changes its buffers, so "
                "training is no function of (params, batch). Use GroupNorm or LayerNorm."
            )
    first = next(iter(named.values()))
    dropout = any(isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0 for part in module.modules())
    recurrent = any(isinstance(part, torch.nn.RNNBase) for part in module.modules())  # vmap knows LSTM alone
    training, judging = module.train(), copy.deepcopy(module).eval()
    losses = _per_row(loss)

    def rows_of(model: nn.Module, params: AnyTree, batch: Batch) -> dict[str, Any]:
        outputs = torch.func.functional_call(model, dict(params), batch[:-1])
        found = {name: metric(outputs, batch[-1]) for name, metric in (metrics or {}).items()}
        return {"loss": losses(outputs, batch[-1]), **found}

    def gradient(params: AnyTree, batch: Batch, mask: Any) -> tuple[Mapping[str, Any], AnyTree]:
        def mean(params: AnyTree) -> tuple[Any, Mapping[str, Any]]:
            found = rows_of(training, params, batch)
            if mask is None:
                return found["loss"].mean(), {name: values.sum() for name, values in found.items()}
            sums = {name: (values * mask).sum() for name, values in found.items()}
            return sums["loss"] / mask.sum(), sums

        grads, (_, sums) = torch.func.grad_and_value(mean, has_aux=True)(dict(params))
        return sums, grads

    def clipped(params: AnyTree, batch: Batch, clip: float) -> AnyTree:
        def one(params: AnyTree, *row: Any) -> Any:
            *inputs, targets = (array[None] for array in row)
            return losses(torch.func.functional_call(training, dict(params), tuple(inputs)), targets).sum()

        alone = torch.func.grad(one)
        mapped = torch.func.vmap(alone, (None, *[0] * len(batch)), randomness="different")

        def each(params: AnyTree, *rows: Any) -> Mapping[str, Any]:
            if not recurrent:
                found: Mapping[str, Any] = mapped(params, *rows)
                return found
            grads = [alone(params, *row) for row in zip(*rows, strict=True)]
            return {name: torch.stack([grad[name] for grad in grads]) for name in params}

        size = sum(leaf.nbytes for leaf in params.values())
        taken = max(1, EACH_BYTES // size)
        found = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        for start in range(0, len(batch[-1]), taken):
            grads = each(dict(params), *(array[start : start + taken] for array in batch))
            for name, total in bounded.clipped(grads, clip).items():
                found[name] += total
        return found

    def rows(params: AnyTree, batch: Batch) -> Mapping[str, Any]:
        with torch.inference_mode():
            return {name: bridge.to_array(values) for name, values in rows_of(judging, params, batch).items()}

    def lift(array: Array) -> Any:
        return bridge.to_tensor(array).to(first.device)

    floating = bridge.to_array(first[:0]).dtype if first.ndim else bridge.to_array(first).dtype

    def feed(arrays: Sequence[Array]) -> Sequence[Array]:
        return [a.astype(floating, copy=False) if trees.is_floating(a.dtype) else a for a in arrays]

    return Functional(
        params=bridge.copy_out(named),
        gradient=gradient,
        rows=rows,
        lift=lift,
        lower=bridge.to_array,
        feed=feed,
        scope=bridge.seeded,
        vectorised=not dropout,
        clipped=clipped,
    )


def accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1 for each row whose highest output is the target's, else 0."""
    return (outputs.argmax(-1) == targets) * 1.0


def _torch() -> Any:
    from hansa.registry import load_object

    try:
        import torch
    except ModuleNotFoundError:
        return load_object("torch:nn")  # raises the error that says which extra to install
    return torch


def _per_row(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return ``loss`` as one value a row."""
    if getattr(loss, "reduction", None) in ("mean", "sum"):
        loss = copy.copy(loss)
        loss.reduction = "none"  # type: ignore[attr-defined]
    asked = {}
    with contextlib.suppress(TypeError, ValueError):
        if "reduction" in inspect.signature(loss).parameters:
            asked = {"reduction": "none"}

    def losses(outputs: Any, targets: Any) -> Any:
        found = loss(outputs, targets, **asked)
        if found.ndim == 0:
            raise JobError("The loss must give one value a row, not their mean. Give it reduction='none'.")
        return found if found.ndim == 1 else found.flatten(1).mean(1)

    return losses


def optimizer_of(section: TrainSection) -> Optimizer:
    """Return the local optimiser that the job names: SGD (weight decay as in torch), or AdamW."""
    if section.optimizer == "adamw":
        return adam(section.lr, 0.9, 0.999, 1e-8, section.weight_decay, bias_correction=True)
    plain = sgd(section.lr, section.momentum)
    decay = section.weight_decay
    if not decay:
        return plain

    def update(params: AnyTree, grads: AnyTree, state: Any) -> tuple[AnyTree, Any]:
        return plain.update(params, {n: g + decay * params[n] for n, g in grads.items()}, state)

    return replace(plain, update=update)


@dataclass(frozen=True)
class Examples:
    """A site's rows: arrays with the same first axis, targets last."""

    train: tuple[Array, ...]
    test: tuple[Array, ...] | None = None


@dataclass(frozen=True)
class FunctionalProgram:
    """A :class:`Functional` over data in memory, as a program that any engine can run.

    Attributes:
        functional: the model and its loss.
        data: site -> its rows; looked up when the site is first asked for anything.
        section: steps or epochs, batch size, clipping, time limit; and the optimiser, where none is given.
        optimizer: the local optimiser.
        labels: the names of integer targets, for the report.
        write: ``(params, directory)``; one safetensors file by default.
        noisy: ``examples -> the draws of a round`` of DP-SGD, in place of plain steps.
    """

    functional: Functional
    data: Mapping[str, Examples]
    section: TrainSection = field(default_factory=TrainSection)
    optimizer: Optimizer | None = None
    labels: Sequence[str] | None = None
    write: Callable[[Tree, Path], None] | None = None
    noisy: Callable[[int], NoisySteps] | None = None
    _kept: dict[str, Examples] = field(default_factory=dict, repr=False, compare=False)

    @property
    def traits(self) -> frozenset[Trait]:
        """Functional; stepwise only where the gradient can't be mapped over sites, as with secret draws."""
        private = self.noisy is not None
        found = {
            Trait.STEPWISE: private or not self.functional.vectorised,
            Trait.TIMED: bool(self.section.max_seconds),
            Trait.BOUNDS_EXAMPLES: private and self.functional.clipped is not None,
        }
        return frozenset(trait for trait, holds in found.items() if holds)

    @property
    def sites(self) -> Sequence[str]:
        """The names of all sites, sorted."""
        return sorted(self.data)

    @property
    def local_optimizer(self) -> Optimizer:
        """The optimiser of local steps."""
        return self.optimizer or optimizer_of(self.section)

    def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        return self.functional.params

    def examples(self, site: str) -> Examples:
        """Return a site's rows, checked, floating arrays as the model takes them.

        Raises:
            DataError: there are none, arrays differ in length, or a value is NaN or infinite.
        """
        if site not in self._kept:
            self._kept[site] = self._everyones() if site == EVERYONE else self._checked(site)
        return self._kept[site]

    def _checked(self, site: str) -> Examples:
        if site not in self.data:
            raise DataError(f"There is no site {site!r}.{nearest(site, self.data)}")
        given = self.data[site]
        train = self._arrays(site, "training", given.train)
        if not len(train[-1]):
            raise DataError("The site has no examples to train on.", site=site)
        return Examples(train, None if given.test is None else self._arrays(site, "held-out", given.test))

    def _arrays(self, site: str, kind: str, arrays: Sequence[Any]) -> tuple[Array, ...]:
        found = [np.asarray(array) for array in arrays]
        if len(found) < 2 or any(a.ndim == 0 or len(a) != len(found[-1]) for a in found):
            shapes = ", ".join(str(list(a.shape)) for a in found)
            raise DataError(f"The {kind} arrays are {shapes}; inputs and targets need as many rows each.", site=site)
        for place, array in enumerate(found):
            if trees.is_floating(array.dtype) and not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0])
                raise DataError(f"Row {row} of the {kind} data's array {place} is NaN or infinite.", site=site)
        return tuple(self.functional.feed(found))

    def _everyones(self) -> Examples:
        every = [self.examples(site) for site in self.sites]
        tests = [each.test for each in every if each.test is not None]
        joined = tuple(np.concatenate(arrays) for arrays in zip(*tests, strict=True)) if tests else None
        return Examples(tuple(map(np.concatenate, zip(*(each.train for each in every), strict=True))), joined)

    def inspect(self, site: str) -> SiteReport:
        """Check the site's rows and count them.

        Raises:
            DataError: see :meth:`examples`.
        """
        rows = self.examples(site)
        counts = {"train": len(rows.train[-1]), "test": len(rows.test[-1]) if rows.test else 0}
        if self.labels is None:
            return SiteReport(site, counts)
        found = np.bincount(rows.train[-1], minlength=len(self.labels))
        return SiteReport(site, counts, dict(zip(self.labels, map(int, found), strict=True)))

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        """Make the planned steps from ``plan.params``.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        f = self.functional
        data = self.examples(site).train
        if self.noisy is not None:
            return self._privately(self.noisy(len(data[-1])), data, plan, correction)
        planned = num_steps(self.section, len(data[-1]))
        params: AnyTree = self.lifted(trees.floating(plan.params))
        context = {part: self.lifted(tree) for part, tree in correction.context.items()} if correction else {}
        adjust = correction.adjust if correction else None
        optimizer = self.local_optimizer
        state = optimizer.init(params)
        sums: dict[str, float] = {}
        seen = count = 0
        begun = time.monotonic()
        with f.scope(plan.seed, plan.round, site, "steps"):
            for rows in self.batches(site, plan):
                batch = tuple(f.lift(array[rows]) for array in data)
                params, state, part = self.step(optimizer, adjust, params, state, context, batch, None)
                count += 1
                seen += len(rows)
                for name, value in part.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                if not math.isfinite(sums["loss"]):
                    raise NonFiniteError(
                        f"The loss of step {count} is {float(part['loss']) / len(rows)}. Lower train.lr, set "
                        "train.clip_grad, or look for broken examples at this site.",
                        site=site,
                        round=plan.round,
                    )
                limit = self.section.max_seconds
                if count == planned or (limit is not None and time.monotonic() - begun >= limit):
                    break
        trained = {name: f.lower(leaf) for name, leaf in params.items()}
        steps = Steps(count, count * optimizer.lr)
        return Work({**plan.params, **trained}, len(data[-1]), steps, {**sums, EXAMPLES: seen}, count / planned)

    def _privately(self, noisy: NoisySteps, data: tuple[Array, ...], plan: Plan, correction: Correction | None) -> Work:
        """Make a round of DP-SGD; metrics of its batches are not kept."""
        f = self.functional
        assert f.clipped is not None, "the fit check refuses it"
        params: AnyTree = self.lifted(trees.floating(plan.params))
        context = {part: self.lifted(tree) for part, tree in correction.context.items()} if correction else {}
        optimizer = self.local_optimizer
        state = optimizer.init(params)
        count = 0
        begun = time.monotonic()
        with f.scope(noisy.seed):
            for step, rows in enumerate(noisy.batches()):
                sums = f.clipped(params, tuple(f.lift(array[rows]) for array in data), noisy.clip)
                grads: AnyTree = self.lifted(noisy.noised(step, {name: f.lower(leaf) for name, leaf in sums.items()}))
                if correction:
                    grads = correction.adjust(context, params, grads)
                params, state = optimizer.update(params, grads, state)
                count += 1
                limit = self.section.max_seconds
                if limit is not None and time.monotonic() - begun >= limit:
                    break
        trained = {name: f.lower(leaf) for name, leaf in params.items()}
        steps = Steps(count, count * optimizer.lr)
        return Work({**plan.params, **trained}, len(data[-1]), steps, {}, count / noisy.count)

    def batches(self, site: str, plan: Plan) -> Any:
        """Return the endless batches of row numbers of a site in a round."""
        count = len(self.examples(site).train[-1])
        return shuffled(count, self.section.batch_size, plan.seed, plan.round, site, "batches")

    def lifted(self, tree: Tree) -> AnyTree:
        """Return the tree as the framework's arrays."""
        return {name: self.functional.lift(leaf) for name, leaf in tree.items()}

    def step(
        self,
        optimizer: Optimizer,
        adjust: Adjust | None,
        params: AnyTree,
        state: Any,
        context: Context,
        batch: Batch,
        mask: Any,
    ) -> tuple[AnyTree, Any, Mapping[str, Any]]:
        """Make one local step; return parameters, optimiser state, and sums over the rows before the step."""
        sums, grads = self.functional.gradient(params, batch, mask)
        if self.section.clip_grad is not None:
            grads = _clipped(grads, self.section.clip_grad)
        if adjust:
            grads = adjust(context, params, grads)
        params, state = optimizer.update(params, grads, state)
        return params, state, sums

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        """Return metric sums over the site's held-out rows; nothing where it has none."""
        data = self.examples(site).test
        if data is None or not len(data[-1]):
            return {}
        return self.judged(self.lifted(trees.floating(plan.params)), data)

    def judged(self, params: AnyTree, data: Sequence[Array]) -> dict[str, float]:
        """Return metric sums of ``params``, already lifted, over ``data``."""
        sums: dict[str, float] = {}
        for start in range(0, len(data[-1]), self.section.eval_batch_size):
            batch = tuple(self.functional.lift(a[start : start + self.section.eval_batch_size]) for a in data)
            for name, values in self.functional.rows(params, batch).items():
                sums[name] = sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
        return {**sums, EXAMPLES: float(len(data[-1]))}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return each metric's mean over rows."""
        count = sums.get(EXAMPLES, 0)
        return {name: value / count for name, value in sums.items() if name != EXAMPLES} if count else {}

    def export(self, params: Tree, directory: Path) -> None:
        """Write ``params`` to ``directory``: ``model/model.safetensors``, unless the recipe has its own form."""
        if self.write:
            self.write(params, directory)
        else:
            (directory / "model").mkdir(parents=True, exist_ok=True)
            storage.save_tree(directory / "model" / "model.safetensors", params)

    def show(self, params: Tree) -> Mapping[str, str]:
        """Return nothing: there is no text to look at."""
        return {}

    def count(self, site: str) -> int:
        """Return how many training rows a site has."""
        return len(self.examples(site).train[-1])

    def batch(self, site: str, rows: NDArray[np.int64]) -> dict[str, Array]:
        """Return training rows of a site: ``inputs``, ``inputs_1`` and so on where there are several, ``targets``."""
        *inputs, targets = (array[rows] for array in self.examples(site).train)
        named = {f"inputs_{place}" if place else "inputs": array for place, array in enumerate(inputs)}
        return {**named, "targets": targets}

    def losses(self, params: Tree, site: str, rows: NDArray[np.int64]) -> Array:
        """Return the loss of a model with ``params`` on each of these training rows, float64."""
        lifted, data = self.lifted(trees.floating(params)), self.examples(site).train
        size = self.section.eval_batch_size
        found = [
            self.functional.rows(lifted, tuple(self.functional.lift(a[rows[start : start + size]]) for a in data))
            for start in range(0, len(rows), size)
        ]
        return np.concatenate([np.asarray(values["loss"], np.float64) for values in found])

    def holding(self, rows: Mapping[str, NDArray[np.int64]]) -> FunctionalProgram:
        """Return the same program where each site named here has only these of its training rows."""
        kept = {site: self.examples(site) for site in self.sites}
        for site, chosen in rows.items():
            kept[site] = Examples(tuple(array[chosen] for array in kept[site].train), kept[site].test)
        return replace(self, data=kept, _kept=dict(kept))

    def gradient(self, params: Tree) -> Callable[[Mapping[str, Any]], AnyTree]:
        """Return ``batch, named as by batch() -> the gradient of its mean loss`` at ``params``, in the framework's own
        arrays, so that torch can differentiate it again."""
        lifted = self.lifted(trees.floating(params))
        return lambda batch: self.functional.gradient(lifted, tuple(batch.values()), None)[1]

    def close(self) -> None:
        """Forget what was loaded."""
        self._kept.clear()


def _clipped(grads: AnyTree, limit: float) -> AnyTree:
    """Return the gradient scaled down to a joint norm of ``limit``, as torch's clip_grad_norm_ does."""
    factor = limit / (sum((g * g).sum() for g in grads.values()) ** 0.5 + 1e-6)
    factor = factor * (factor < 1) + (factor >= 1) * 1.0
    return {name: g * factor for name, g in grads.items()}
