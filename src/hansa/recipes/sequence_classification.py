# SPDX-License-Identifier: Apache-2.0
"""Texts (or pairs of texts) with one label each.

Columns: ``text``, ``label``, and ``text_pair`` where ``data.columns`` names it. An update is weighed by n = the
site's training examples. Sums: ``loss_sum`` (nats), ``count``, ``correct``, and in evaluation a confusion count
for each label (see :mod:`hansa.recipes.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hansa import registry
from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.errors import JobError
from hansa.recipes import data, labels, metrics, pretrained
from hansa.recipes.batching import model_inputs
from hansa.recipes.finetune import Batch, Examples, FineTune
from hansa.recipes.tables import Table, TextRows

_ROLES = ("text", "text_pair", "label")


@dataclass(frozen=True)
class Options:
    """What a job may set beside ``recipe.name``.

    Attributes:
        max_length: tokens of an example; longer ones are cut at the end.
    """

    max_length: int = 128


def build(job: Job) -> Program:
    """Return the sequence-classification program of a job.

    Raises:
        JobError: an option, a role or the label map is missing or wrong.
    """
    options = Options(**registry.checked("recipe.sequence-classification", Options, job.recipe.options))
    if options.max_length < 2:
        raise JobError(f"recipe.max_length must be at least 2, it is {options.max_length}.")
    paired = job.data is not None and "text_pair" in job.data.columns
    return FineTune(job, SequenceClassification(labels.label_map(job, "label", _ROLES), options.max_length, paired))


@dataclass(frozen=True)
class SequenceClassification:
    """The sequence-classification task."""

    names: Sequence[str]
    max_length: int
    paired: bool

    auto_class = "AutoModelForSequenceClassification"
    adapter_task = "SEQ_CLS"
    roles = _ROLES
    text_rows: TextRows = "file"

    @property
    def fields(self) -> Mapping[str, Any]:
        """The label map."""
        return labels.config_fields(self.names)

    def processor(self, job: Job) -> Any:
        """Return the tokenizer."""
        return pretrained.load_tokenizer(job)

    def load(self, job: Job, processor: Any) -> tuple[nn.Module, list[str]]:
        """Return the model; one that reads the last token is told what padding is."""
        model, fresh = pretrained.load_text_model(job, self.auto_class, self.fields, processor, self.max_length)
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = processor.pad_token_id
        return model, fresh

    def labels(self, table: Table) -> Mapping[str, int]:
        """Check texts and labels, and count labels."""
        for role in ("text", "text_pair") if self.paired else ("text",):
            data.texts(table, role)
        return data.histogram(self.names, data.label_indices(table, "label", self.names))

    def examples(self, table: Table, processor: Any) -> Examples:
        """Tokenise rows: (model inputs, label index) each."""
        indices = data.label_indices(table, "label", self.names)
        if not indices:
            return []
        columns = [data.texts(table, role) for role in (("text", "text_pair") if self.paired else ("text",))]
        found = processor(*columns, truncation=True, max_length=self.max_length)
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        return list(zip(rows, indices, strict=True))

    def size(self, example: Any) -> int:
        """Return the number of tokens."""
        return len(example[0]["input_ids"])

    def num_trained(self, examples: Examples) -> float:
        """Return the number of examples."""
        return float(len(examples))

    def batch(self, examples: Examples, processor: Any) -> Batch:
        """Stack examples, padded on the right."""
        inputs = model_inputs([row for row, _ in examples], processor)
        return {**inputs, "targets": torch.tensor([label for _, label in examples])}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean cross-entropy."""
        return trained(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each text's cross-entropy."""
        return separate(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """Return loss and confusion counts."""
        return judged(model, batch, len(self.names))

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss, accuracy, and macro-F1 where it was summed."""
        return summarise(sums)

    def show(self, model: Any, processor: Any) -> Mapping[str, str]:
        """Return nothing."""
        return {}


def trained(model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
    """Return mean cross-entropy and training sums of a model with one output a label."""
    value, logits, targets = _cross_entropy(model, batch)
    count = float(len(targets))
    correct = float((logits.argmax(-1) == targets).sum())
    return value, {"loss_sum": float(value.detach()) * count, "count": count, "correct": correct}


def separate(model: nn.Module, batch: Batch) -> Tensor:
    """Return each row's cross-entropy (rows,) of a model with one output a label."""
    return _cross_entropy(model, batch, reduction="none")[0]


def judged(model: nn.Module, batch: Batch, num_labels: int) -> Mapping[str, float]:
    """Return loss and confusion counts of a model with one output a label."""
    value, logits, targets = _cross_entropy(model, batch)
    counts = metrics.confusion(targets.cpu().numpy(), logits.argmax(-1).cpu().numpy(), num_labels)
    return {"loss_sum": float(value) * len(targets), **counts}


def _cross_entropy(model: nn.Module, batch: Batch, reduction: str = "mean") -> tuple[Tensor, Tensor, Tensor]:
    targets = batch["targets"]
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "targets"}).logits.float()
    return nn.functional.cross_entropy(logits, targets, reduction=reduction), logits, targets


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Return loss (nats an example), accuracy, and macro-F1 where confusion was summed."""
    count = sums.get("count", 0.0)
    if not count:
        return {}
    found = {"loss": sums["loss_sum"] / count, "accuracy": sums["correct"] / count}
    return {**found, "macro_f1": metrics.macro_f1(sums)} if "tp_0" in sums else found
