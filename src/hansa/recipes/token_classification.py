# SPDX-License-Identifier: Apache-2.0
"""Words with one tag each, in IOB2: named entities and the like.

Columns: ``words`` and ``tags``, two lists of the same length (CoNLL files have them). ``data.labels`` holds all
tags, or only the types of entity (``PER``, ``LOC``), from which O, B- and I- are made. A word is judged by its first
sub-word; one that the model does not see (cut off, or of no sub-word) counts as O.

An update is weighed by n = the site's training sentences. Sums: ``loss_sum`` (nats) and ``seen`` (words with a
loss); in evaluation ``words``, ``correct`` and hits, predictions and truths of entities and of tags other than O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hansa import registry
from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.errors import DataError, JobError
from hansa.recipes import data, labels, metrics, pretrained
from hansa.recipes.batching import IGNORED, model_inputs, padded
from hansa.recipes.finetune import Batch, Examples, FineTune
from hansa.recipes.tables import Table, TextRows

_ROLES = ("words", "tags")
OUTSIDE = "O"


@dataclass(frozen=True)
class Options:
    """What a job may set beside ``recipe.name``.

    Attributes:
        max_length: tokens of a sentence; longer ones are cut at the end.
    """

    max_length: int = 128


@dataclass(frozen=True)
class Sentence:
    """Model inputs, and for each word its first sub-word's position (-1: not seen) and its tag's index."""

    inputs: Mapping[str, Sequence[int]]
    positions: Sequence[int]
    tags: Sequence[int]


def build(job: Job) -> Program:
    """Return the token-classification program of a job.

    Raises:
        JobError: an option, a role or the label map is missing or wrong.
    """
    options = Options(**registry.checked("recipe.token-classification", Options, job.recipe.options))
    if options.max_length < 3:
        raise JobError(f"recipe.max_length must be at least 3, it is {options.max_length}.")
    return FineTune(job, TokenClassification(_tags(labels.label_map(job, "tags", _ROLES, least=1)), options.max_length))


def _tags(given: Sequence[str]) -> tuple[str, ...]:
    if not any(label == OUTSIDE or label.startswith(("B-", "I-")) for label in given):
        return (OUTSIDE, *(f"{mark}-{kind}" for kind in given for mark in "BI"))
    for label in given:
        kind = label.partition("-")[2]
        if label != OUTSIDE and not (label.startswith(("B-", "I-")) and kind):
            raise JobError(f"data.labels: {label!r} is no IOB2 tag (O, B-type or I-type).")
        if label.startswith("I-") and f"B-{kind}" not in given:
            raise JobError(f"data.labels has {label!r} without 'B-{kind}', which begins it.")
    if OUTSIDE not in given:
        raise JobError("data.labels has no 'O', the tag of words outside of every entity.")
    return tuple(given)


@dataclass(frozen=True)
class TokenClassification:
    """The token-classification task."""

    names: Sequence[str]
    max_length: int

    auto_class = "AutoModelForTokenClassification"
    adapter_task = "TOKEN_CLS"
    roles = _ROLES
    text_rows: TextRows = "file"

    @property
    def fields(self) -> Mapping[str, Any]:
        """The label map."""
        return labels.config_fields(self.names)

    def processor(self, job: Job) -> Any:
        """Return the tokenizer, so set that it takes words (GPT-2's and RoBERTa's want to be told)."""
        return pretrained.load_tokenizer(job, add_prefix_space=True)

    def load(self, job: Job, processor: Any) -> tuple[nn.Module, list[str]]:
        """Return the model."""
        return pretrained.load_text_model(job, self.auto_class, self.fields, processor, self.max_length)

    def labels(self, table: Table) -> Mapping[str, int]:
        """Check words and tags, and count tags."""
        return data.histogram(self.names, (tag for row in self._tagged(table) for tag in row))

    def _tagged(self, table: Table) -> list[list[int]]:
        known = {name: index for index, name in enumerate(self.names)}
        rows = []
        for index, (words, tags) in enumerate(zip(data.word_lists(table, "words"), table.column("tags"), strict=True)):
            if not isinstance(tags, list) or len(tags) != len(words):
                count = len(tags) if isinstance(tags, list) else "no list of"
                raise DataError(f"{table.where(index)}: {len(words)} words have {count} tags; each needs one.")
            rows.append([data.label_index(table, index, tag, known) for tag in tags])
        return rows

    def examples(self, table: Table, processor: Any) -> Examples:
        """Tokenise sentences and align their words with sub-words."""
        tags = self._tagged(table)
        if not tags:
            return []
        words = data.word_lists(table, "words")
        found = processor(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        sentences = []
        for row, own in enumerate(tags):
            positions = [-1] * len(own)
            for position, word in enumerate(found.word_ids(row)):
                if word is not None and positions[word] < 0:
                    positions[word] = position
            sentences.append(Sentence({name: found[name][row] for name in found}, positions, own))
        return sentences

    def size(self, example: Sentence) -> int:
        """Return the number of tokens."""
        return len(example.inputs["input_ids"])

    def num_trained(self, examples: Examples) -> float:
        """Return the number of sentences."""
        return float(len(examples))

    def batch(self, examples: Examples, processor: Any) -> Batch:
        """Stack sentences, padded on the right."""
        return {
            **model_inputs([each.inputs for each in examples], processor),
            "positions": padded([each.positions for each in examples], -1),
            "tags": padded([each.tags for each in examples], IGNORED),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean cross-entropy over words."""
        total, seen, _ = _likelihood(model, batch)
        return total / max(1, seen), {"loss_sum": float(total.detach()), "seen": float(seen)}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each sentence's mean cross-entropy over its words."""
        logits, targets = _words(model, batch)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """Return loss and counts of words, tags and entities."""
        total, seen, logits = _likelihood(model, batch)
        tags = batch["tags"].cpu().numpy()
        predicted = np.where(batch["positions"].cpu().numpy() >= 0, logits.argmax(-1).cpu().numpy(), self._outside)
        return {"loss_sum": float(total), "seen": float(seen), **self._counts(tags, predicted)}

    @property
    def _outside(self) -> int:
        return list(self.names).index(OUTSIDE)

    def _counts(self, tags: Any, predicted: Any) -> dict[str, float]:
        real = tags != IGNORED
        inside, guessed = real & (tags != self._outside), real & (predicted != self._outside)
        truth = [metrics.spans(self._named(row[mask])) for row, mask in zip(tags, real, strict=True)]
        guess = [metrics.spans(self._named(row[mask])) for row, mask in zip(predicted, real, strict=True)]
        counts = {
            "words": real.sum(),
            "correct": (real & (tags == predicted)).sum(),
            "tag_hits": (inside & (tags == predicted)).sum(),
            "tag_predictions": guessed.sum(),
            "tag_truths": inside.sum(),
            "entity_hits": sum(len(a & b) for a, b in zip(truth, guess, strict=True)),
            "entity_predictions": sum(map(len, guess)),
            "entity_truths": sum(map(len, truth)),
        }
        return {name: float(value) for name, value in counts.items()}

    def _named(self, tags: Iterable[int]) -> list[str]:
        return [self.names[tag] for tag in tags]

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss; and entity-level precision, recall, F1, token-level F1 and accuracy where they were summed."""
        if not sums.get("seen", 0.0):
            return {}
        found = {"loss": sums["loss_sum"] / sums["seen"]}
        if "words" not in sums:
            return found
        precision, recall, entity_f1 = metrics.f1(
            sums["entity_hits"], sums["entity_predictions"], sums["entity_truths"]
        )
        _, _, token_f1 = metrics.f1(sums["tag_hits"], sums["tag_predictions"], sums["tag_truths"])
        accuracy = sums["correct"] / sums["words"]
        scores = {"f1": entity_f1, "precision": precision, "recall": recall, "token_f1": token_f1}
        return {**found, **scores, "accuracy": accuracy}

    def show(self, model: Any, processor: Any) -> Mapping[str, str]:
        """Return nothing."""
        return {}


def _likelihood(model: nn.Module, batch: Batch) -> tuple[Tensor, int, Tensor]:
    """Return (summed loss, number of words seen, logits (sentences, words, labels) of first sub-words)."""
    logits, targets = _words(model, batch)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((targets != IGNORED).sum()), logits


def _words(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (sentences, words, labels) of first sub-words, and targets (sentences, words)."""
    positions, tags = batch["positions"], batch["tags"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("positions", "tags")}
    every = model(**inputs).logits.float()
    # Prompt tuning puts virtual tokens before the sentence.
    every = every[:, every.shape[1] - batch["input_ids"].shape[1] :]
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return every[rows, positions.clamp(min=0)], tags.masked_fill(positions < 0, IGNORED)
