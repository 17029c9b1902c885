# SPDX-License-Identifier: Apache-2.0
"""Canaries that are examples of DP-SGD: gradients of their own choice, in the job's own clipped and noised steps.

The site is the one with the fewest examples, whose ε is the largest; its others have gradients of zero. Batches, clip,
noise and optimiser are the job's (:class:`hansa.privacy.steps.NoisySteps`, :func:`hansa.client.clipped.clipped`,
:func:`hansa.client.torch.train_privately`); what is seen is what the optimiser is given in every step. How a recipe
takes an example's gradient is not part of it: that is held by tests against one backward pass an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hansa.audit.canaries import NAME, PUSH, Directions, Played, fewest_examples
from hansa.audit.estimate import Coins
from hansa.audit.subject import Subject
from hansa.client import clipped as bounded
from hansa.client import torch as local
from hansa.core import tree as trees
from hansa.core.ports import Correction
from hansa.privacy.steps import noisy_steps
from hansa.runs.progress import Progress


def play(subject: Subject, directions: Directions, included: Coins, progress: Progress) -> Played:
    """Make the steps of all rounds, the first examples being canaries."""
    begin = noisy_steps(subject.job)
    assert begin is not None, "the job is under dp-sgd"
    section = subject.job.train.model_copy(update={"max_seconds": None})
    trainable = {
        name: torch.zeros(spec.shape, dtype=local.to_tensor(np.zeros(0, trees.dtype_of(spec.dtype))).dtype)
        for name, spec in directions.layout.items()
    }
    signals: list[NDArray[np.float64]] = []

    def sums(rows: NDArray[np.int64]) -> Mapping[str, Tensor]:
        kept = [row for row in rows if row < len(included) and included[row]]
        grads = {
            name: torch.zeros((len(kept), *tensor.shape), dtype=tensor.dtype) for name, tensor in trainable.items()
        }
        for place, row in enumerate(kept):
            for name, push in directions.pushed(row, PUSH * noisy.clip).items():
                grads[name][place] = torch.from_numpy(push)
        return bounded.clipped(grads, noisy.clip)

    def noticed(context: Any, params: Any, grads: Mapping[str, Any]) -> Mapping[str, Any]:
        expected = noisy.terms.rate * noisy.examples
        tree = {name: local.to_array(grad) for name, grad in grads.items()}
        signals.append(directions.along(tree) * (expected / noisy.clip))
        return grads

    progress.stage(f"{NAME}: examples of dp-sgd", subject.job.rounds)
    for _ in range(subject.job.rounds):
        noisy = begin(fewest_examples(subject))
        local.train_privately(trainable, noisy, sums, section, Correction({}, noticed))
        progress.advance()
    seen = np.stack(signals)
    correlation = np.zeros(len(seen))
    correlation[0] = 1.0
    return Played(included, seen, np.ones_like(seen, np.bool_), correlation, directions.size)
