# SPDX-License-Identifier: Apache-2.0
"""Images with one label each, by a vision model such as ViT.

Columns: ``image`` and ``label``; a folder of images has them (the label is the name of an image's folder). Pixels
are made once and kept as bytes. An update is weighed by n = the site's training images. Sums as in
:mod:`hansa.recipes.sequence_classification`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hansa import registry
from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.recipes import data, images, labels, pretrained
from hansa.recipes.finetune import Batch, Examples, FineTune
from hansa.recipes.images import ImageProcessor
from hansa.recipes.sequence_classification import judged, separate, summarise, trained
from hansa.recipes.tables import Table, TextRows

_ROLES = ("image", "label")


def build(job: Job) -> Program:
    """Return the image-classification program of a job.

    Raises:
        JobError: an option, a role or the label map is missing or wrong.
    """
    registry.checked("recipe.image-classification", _no_options, job.recipe.options)
    return FineTune(job, ImageClassification(labels.label_map(job, "label", _ROLES)))


def _no_options() -> None:
    """Take no options."""


@dataclass(frozen=True)
class ImageClassification:
    """The image-classification task."""

    names: Sequence[str]

    auto_class = "AutoModelForImageClassification"
    adapter_task = None
    roles = _ROLES
    text_rows: TextRows = "file"

    @property
    def fields(self) -> Mapping[str, Any]:
        """The label map."""
        return labels.config_fields(self.names)

    def processor(self, job: Job) -> ImageProcessor:
        """Return how images become pixels."""
        return images.load_processor(job)

    def load(self, job: Job, processor: ImageProcessor) -> tuple[nn.Module, list[str]]:
        """Return the model."""
        return pretrained.load_model(job, self.auto_class, self.fields, None)

    def labels(self, table: Table) -> Mapping[str, int]:
        """Check and count labels."""
        return data.histogram(self.names, data.label_indices(table, "label", self.names))

    def examples(self, table: Table, processor: ImageProcessor) -> Examples:
        """Make pixels: (uint8 (channels, height, width), label index) each."""
        indices = data.label_indices(table, "label", self.names)
        cells = enumerate(table.column("image"))
        pixels = [processor.pixels(images.open_image(table, index, cell)) for index, cell in cells]
        return list(zip(pixels, indices, strict=True))

    def size(self, example: Any) -> int:
        """Return 0: all images are alike."""
        return 0

    def num_trained(self, examples: Examples) -> float:
        """Return the number of images."""
        return float(len(examples))

    def batch(self, examples: Examples, processor: ImageProcessor) -> Batch:
        """Stack and normalise pixels: ``pixel_values`` float32 (n, channels, height, width)."""
        pixels = np.stack([each for each, _ in examples]).astype(np.float32) / 255
        mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (processor.mean, processor.std))
        return {
            "pixel_values": torch.from_numpy((pixels - mean) / std),
            "targets": torch.tensor([label for _, label in examples]),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean cross-entropy."""
        return trained(model, _cast(model, batch))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each image's cross-entropy."""
        return separate(model, _cast(model, batch))

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """Return loss and confusion counts."""
        return judged(model, _cast(model, batch), len(self.names))

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss, accuracy, and macro-F1 where it was summed."""
        return summarise(sums)

    def show(self, model: Any, processor: ImageProcessor) -> Mapping[str, str]:
        """Return nothing."""
        return {}


def _cast(model: nn.Module, batch: Batch) -> Batch:
    dtype: Any = getattr(model, "dtype", torch.float32)
    return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
