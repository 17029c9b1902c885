# SPDX-License-Identifier: Apache-2.0
"""A ``transformers`` trainer in a federation. Only the five lines with ``flare`` make it federated.

    hansa run examples/patched_trainer/job.toml
    hansa lab up examples/patched_trainer/job.toml --sites 2

Each site has half of scikit-learn's handwritten digits (they come with the library, nothing is downloaded), and most of
them are of five of the ten classes. The job asks for FedProx, of which this script knows nothing.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, Trainer, TrainingArguments

import hansa.client as flare


class Classifier(nn.Module):
    """Two layers; what a Trainer needs is that ``forward`` returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the logits, (rows, 10), of ``inputs``, (rows, 64)."""
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_site(number: int) -> tuple[TensorDataset, TensorDataset]:
    """Return the training rows of site 1 or 2, and everyone's test rows."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    test = rows % 5 == 0
    mine = np.where(rows % 10 == 1, rows // 10 % 2 == number - 1, digits.target // 5 == number - 1) & ~test
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return TensorDataset(inputs[mine], labels[mine]), TensorDataset(inputs[test], labels[test])


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch under the names that ``forward`` takes."""
    inputs, labels = zip(*rows, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Return the share of test rows that are right."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main() -> None:
    """Train with a Trainer, as ever; the rounds come from the federation."""
    flare.init()
    train, test = load_site(int(flare.get_site_name().removeprefix("site-")))
    arguments = TrainingArguments(
        learning_rate=0.005,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        Classifier(),
        arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()
        trainer.train()


if __name__ == "__main__":
    main()
