# SPDX-License-Identifier: Apache-2.0
"""The training program behind the model recipes: any ``transformers`` model, whole or by a ``peft`` adapter.

What differs between tasks (columns, examples, loss, metrics) is a :class:`Task`; everything else is here, once.
Metrics travel as sums, which a server only adds up; ``summarise`` turns them into metrics.

Training is a pure function of the plan and the site's data: order and dropout come from (seed, round, site), and
whatever a forward pass may change beside the shared tensors is put back first. Under dp-sgd order, dropout and noise
come from a secret instead, an update is weighed by the number of examples, and it brings no training metrics.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hansa.client import torch as local
from hansa.client.batches import num_steps, shuffled
from hansa.client.clipped import PROBES, Clipper
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import EVERYONE, Correction, SiteReport, Work
from hansa.core.tree import Array, Tree
from hansa.core.values import Plan
from hansa.errors import DataError, HansaError, ModelError
from hansa.privacy.steps import NoisySteps, noisy_steps
from hansa.recipes import pretrained
from hansa.recipes.data import SiteData, Split
from hansa.recipes.tables import Table, TextRows

Examples = Sequence[Any]
Batch = Mapping[str, Tensor]


class Task(Protocol):
    """What one recipe knows: its columns, examples, loss and metrics."""

    @property
    def auto_class(self) -> str:
        """The ``transformers`` class that loads its models."""
        ...

    @property
    def adapter_task(self) -> str | None:
        """peft's name of the task; None where peft has none."""
        ...

    @property
    def roles(self) -> Sequence[str]:
        """What ``data.columns`` may name."""
        ...

    @property
    def text_rows(self) -> TextRows:
        """What a row of a text file is."""
        ...

    @property
    def fields(self) -> Mapping[str, Any]:
        """Config fields it sets; a task that sets any (labels) has a head of its own, which is always trained."""
        ...

    def processor(self, job: Job) -> Any:
        """Return the tokenizer or image processor; it has ``save_pretrained(directory)``."""
        ...

    def load(self, job: Job, processor: Any) -> tuple[nn.Module, list[str]]:
        """Return the model, checked against the processor, and the modules that the base has no weights for."""
        ...

    def labels(self, table: Table) -> Mapping[str, int]:
        """Check every row's columns and return the label histogram."""
        ...

    def examples(self, table: Table, processor: Any) -> Examples:
        """Turn rows into what batches are made of."""
        ...

    def size(self, example: Any) -> int:
        """Return an example's length; held-out examples are judged in its order, so that little is padded."""
        ...

    def num_trained(self, examples: Examples) -> float:
        """Return n, what an update from these examples is weighed by."""
        ...

    def batch(self, examples: Examples, processor: Any) -> Batch:
        """Stack some examples."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean loss, and sums for training metrics."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's loss (rows,), a function of that example alone, for dp-sgd."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """Return sums for all metrics."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums into metrics; no metrics where nothing was summed."""
        ...

    def show(self, model: Any, processor: Any) -> Mapping[str, str]:
        """Return something to look at, prompt -> answer; or nothing."""
        ...


@dataclass(frozen=True)
class _Site:
    train: Examples
    test: Examples


class _Tuned:
    """A model on its device with the tensors that are shared, and the rest as it was when it was loaded."""

    def __init__(self, job: Job, task: Task, processor: Any) -> None:
        model, fresh = task.load(job, processor)
        adapter = job.model.adapter
        if adapter is not None:
            heads = _heads(model, fresh) if task.fields else []
            model = pretrained.add_adapter(model, adapter, task.adapter_task, heads, job.seed)
        self.model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.shared = pretrained.shared_tensors(self.model, adapted=adapter is not None)
        self.trainable = {n: t for n, t in self.shared.items() if t.requires_grad}
        if not self.trainable:
            raise ModelError("The model has nothing to train: set model.adapter.target_modules or modules_to_save.")
        moving = {id(tensor) for tensor in self.shared.values()}
        self.touched = False
        self.clipper: Clipper | None = None
        self._still = {n: b.clone() for n, b in self.model.named_buffers() if id(b) not in moving}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set(self, params: Tree) -> None:
        self.touched = True
        local.copy_in(self.shared, params)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self._still:
                    buffer.copy_(self._still[name])


def _heads(model: nn.Module, fresh: Sequence[str]) -> list[str]:
    base = getattr(model, "base_model_prefix", "")
    tops = [n for n, child in model.named_children() if n != base and any(True for _ in child.parameters())]
    return [*tops, *(name for name in fresh if name.partition(".")[0] not in tops)]


class FineTune:
    """A :class:`hansa.core.ports.Program` for one task. Models and data are loaded when first needed, and kept.

    Args:
        job: the job.
        task: what the recipe knows.
    """

    def __init__(self, job: Job, task: Task) -> None:
        self._job = job
        self._task = task
        self._data = SiteData(job, task.roles, task.text_rows)
        self._noisy = noisy_steps(job)
        self._splits: dict[str, Split] = {}
        self._sites: dict[str, _Site] = {}

    @property
    def traits(self) -> frozenset[Trait]:
        """One site at a time, examples bounded; adaptive steps unless plain SGD; timed if seconds are limited."""
        train = self._job.train
        adaptive = train.optimizer != "sgd" or bool(train.momentum)
        found = {Trait.ADAPTIVE_STEPS: adaptive, Trait.TIMED: train.max_seconds is not None}
        return frozenset({Trait.STEPWISE, Trait.BOUNDS_EXAMPLES, *(trait for trait, holds in found.items() if holds)})

    @property
    def sites(self) -> Sequence[str]:
        """The names of all sites, sorted."""
        return self._data.names

    @cached_property
    def _processor(self) -> Any:
        return self._task.processor(self._job)

    @cached_property
    def _tuned(self) -> _Tuned:
        return _Tuned(self._job, self._task, self._processor)

    def initial(self) -> dict[str, Array]:
        """Return the shared tensors as the base, or the seed, gives them."""
        tuned = _Tuned(self._job, self._task, self._processor) if self._tuned.touched else self._tuned
        return local.copy_out(tuned.shared)

    def inspect(self, site: str) -> SiteReport:
        """Load a site's rows and check every one against the job.

        Under dp-sgd the training count is n, of the examples that rows give: batches are drawn, and ε is stated, by it.
        """
        with _at(site):
            split = self._split(site)
            labels = self._task.labels(split.train)
            self._task.labels(split.test)
            count = len(split.train if self._noisy is None else self._examples(site).train)
        return SiteReport(site, {"train": count, "test": len(split.test)}, labels)

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        """Train from ``plan.params`` on the training examples of the site, or of all for ``EVERYONE``."""
        section, labels = self._job.train, (plan.round, site)
        with _at(site, plan.round), local.seeded(plan.seed, "train", *labels):
            each = self.sites if site == EVERYONE else [site]
            examples = list(itertools.chain.from_iterable(self._examples(name).train for name in each))
            tuned = self._tuned
            tuned.set(plan.params)
            if self._noisy is not None:
                return self._privately(self._noisy(len(examples)), examples, plan, correction)
            order = shuffled(len(examples), section.batch_size, plan.seed, "order", *labels)
            done = local.train(
                tuned.model,
                tuned.trainable,
                (self._batch([examples[i] for i in rows]) for rows in order),
                self._task.loss,
                section,
                num_steps(section, len(examples)),
                correction,
            )
        params = local.copy_out(tuned.shared)
        return Work(params, self._task.num_trained(examples), done.steps, done.sums, done.completed)

    def _privately(self, noisy: NoisySteps, examples: Examples, plan: Plan, correction: Correction | None) -> Work:
        """Make a round of DP-SGD. Only what was noised leaves: no training metrics, no buffers; n counts examples."""
        tuned = self._tuned
        if tuned.clipper is None:
            tuned.clipper = Clipper(tuned.model, tuned.trainable, self._task.losses)
        clip = noisy.clip
        with (
            local.seeded(noisy.seed),
            tuned.clipper.ready(lambda: self._batch([examples[i % len(examples)] for i in range(PROBES)])) as sums,
        ):
            tuned.model.train()
            done = local.train_privately(
                tuned.trainable,
                noisy,
                lambda rows: sums(self._batch([examples[i] for i in rows]), clip),
                self._job.train,
                correction,
            )
        params = {**plan.params, **local.copy_out(tuned.trainable)}
        return Work(params, len(examples), done.steps, done.sums, done.completed)

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        """Return sums over the site's held-out examples."""
        size = self._job.train.eval_batch_size
        with _at(site, plan.round):
            examples = self._examples(site).test
            batches = (self._batch(examples[i : i + size]) for i in range(0, len(examples), size))
            self._tuned.set(plan.params)
            return local.evaluate(self._tuned.model, batches, self._task.score)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums, of one site or of many, into metrics."""
        return self._task.summarise(sums)

    def export(self, params: Tree, directory: Path) -> None:
        """Write ``directory/model`` for ``from_pretrained``, and ``directory/adapter`` for ``peft``.

        An adapter is merged into the model; where its method can't be (prompt tuning, ...), only the adapter is
        written, and ``peft`` loads it onto the base.

        Raises:
            StorageError: the disk is full or the folder can't be written.
        """
        tuned = _Tuned(self._job, self._task, self._processor)
        tuned.set(params)
        model: Any = tuned.model.cpu()
        with pretrained.saving(directory):
            if self._job.model.adapter is not None:
                model.save_pretrained(directory / "adapter")
                self._processor.save_pretrained(directory / "adapter")
                if not hasattr(model.base_model, "merge_and_unload"):
                    return
                model = model.merge_and_unload()
            model.save_pretrained(directory / "model")
            self._processor.save_pretrained(directory / "model")

    def show(self, params: Tree) -> Mapping[str, str]:
        """Return prompt -> what the model makes of it, for recipes that generate."""
        self._tuned.set(params)
        self._tuned.model.eval()
        with torch.inference_mode(), pretrained.quiet():
            return self._task.show(self._tuned.model, self._processor)

    def count(self, site: str) -> int:
        """Return how many training examples a site has."""
        return len(self._examples(site).train)

    def batch(self, site: str, rows: NDArray[np.int64]) -> dict[str, Array]:
        """Return training examples of a site as the model takes them."""
        train = self._examples(site).train
        return {name: local.to_array(tensor) for name, tensor in self._batch([train[i] for i in rows]).items()}

    def losses(self, params: Tree, site: str, rows: NDArray[np.int64]) -> Array:
        """Return the loss of a model with ``params`` on each of these training examples, float64."""
        train, size = self._examples(site).train, self._job.train.eval_batch_size
        self._tuned.set(params)
        self._tuned.model.eval()
        with torch.inference_mode():
            found = [
                self._task.losses(self._tuned.model, self._batch([train[i] for i in rows[start : start + size]]))
                for start in range(0, len(rows), size)
            ]
        return np.concatenate([np.asarray(values.double().cpu()) for values in found])

    def holding(self, rows: Mapping[str, NDArray[np.int64]]) -> FineTune:
        """Return the same program where each site named here has only these of its training examples."""
        other = FineTune(self._job, self._task)
        other._splits, other._sites = self._splits, {name: self._examples(name) for name in self.sites}
        for name, kept in rows.items():
            whole = self._examples(name)
            other._sites[name] = _Site([whole.train[i] for i in kept], whole.test)
        other.__dict__.update(_processor=self._processor, _tuned=self._tuned)
        return other

    def gradient(self, params: Tree) -> Callable[[Batch], dict[str, Tensor]]:
        """Return ``batch, named as by batch() -> the gradient of its mean loss`` at ``params``, which torch can
        differentiate again; dropout is off."""
        model, shared, _ = self.opened(params)
        trainable = {name: tensor for name, tensor in shared.items() if tensor.requires_grad}

        def gradient(batch: Batch) -> dict[str, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):  # the others can't be differentiated twice
                loss, _ = self._task.loss(model, batch)
                found = torch.autograd.grad(loss, list(trainable.values()), create_graph=True, allow_unused=True)
            return {
                name: torch.zeros_like(tensor) if grad is None else grad
                for (name, tensor), grad in zip(trainable.items(), found, strict=True)
            }

        return gradient

    def opened(self, params: Tree) -> tuple[nn.Module, Mapping[str, Tensor], Any]:
        """Return the model at ``params`` (without dropout), its shared tensors by name, and its processor, for those
        who look inside. They are the program's own, and hold until its next call."""
        self._tuned.set(params)
        return self._tuned.model.eval(), self._tuned.shared, self._processor

    def close(self) -> None:
        """Free models and data; they are loaded again if they are needed again."""
        self._splits.clear()
        self._sites.clear()
        for name in ("_tuned", "_processor"):
            self.__dict__.pop(name, None)
        gc.collect()

    def _split(self, site: str) -> Split:
        if site not in self._splits:
            self._splits[site] = self._data.load(site)
        return self._splits[site]

    def _examples(self, site: str) -> _Site:
        if site not in self._sites:
            split = self._split(site)
            train, test = (self._task.examples(table, self._processor) for table in (split.train, split.test))
            if not len(train):
                raise DataError(
                    "The site's rows give no examples to train on: they hold no text, or what is to be trained lies "
                    "beyond recipe.max_length.",
                    site=site,
                )
            self._sites[site] = _Site(train, sorted(test, key=self._task.size))
        return self._sites[site]

    def _batch(self, examples: Examples) -> dict[str, Tensor]:
        device = self._tuned.device
        return {n: tensor.to(device) for n, tensor in self._task.batch(examples, self._processor).items()}


@contextlib.contextmanager
def _at(site: str, round: int | None = None) -> Iterator[None]:
    """Add site and round to errors that don't know them."""
    try:
        yield
    except HansaError as error:
        error.site = error.site or site
        error.round = round if error.round is None else error.round
        raise
