# SPDX-License-Identifier: Apache-2.0
"""Canaries that are examples of DP-SGD: gradients of their own choice, in the job's own clipped and noised steps.

The site is the one with the fewest examples, whose ε is the largest; its others have gradients of zero. Batches, clip,
noise and optimiser are the job's (:class:`hansa.privacy.steps.NoisySteps`, :func:`hansa.client.clipped.clipped`), in
the recipe's own loop (a script's is taken for that of a recipe); what is seen is what the optimiser is given in every
step. How an example's gradient is taken is not part of it: tests hold that against one backward pass an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from hansa.client.functional import Examples, FunctionalProgram
from hansa.core import tree as trees
from hansa.core.config import TrainSection
from hansa.core.ports import Correction
from hansa.core.tree import Tree
from hansa.core.values import Plan
from hansa.privacy.steps import noisy_steps
from hansa.runs.progress import Progress

SITE = "canaries"

Sums = Callable[[NDArray[np.int64]], Mapping[str, Tensor]]
"""From the numbers of examples to the sum of their clipped gradients."""


def play(subject: Subject, directions: Directions, included: Coins, progress: Progress) -> Played:
    """Make the steps of all rounds, the first examples being canaries."""
    begin = noisy_steps(subject.job)
    assert begin is not None, "the job is under dp-sgd"
    count = fewest_examples(subject)
    terms = begin(count).terms
    zeros = {name: np.zeros(spec.shape, trees.dtype_of(spec.dtype)) for name, spec in directions.layout.items()}
    signals: list[NDArray[np.float64]] = []

    def sums(rows: NDArray[np.int64]) -> Mapping[str, Tensor]:
        kept = [row for row in rows if row < len(included) and included[row]]
        grads = {name: torch.from_numpy(np.zeros((len(kept), *leaf.shape), leaf.dtype)) for name, leaf in zeros.items()}
        for place, row in enumerate(kept):
            for name, push in directions.pushed(row, PUSH * terms.section.clip).items():
                grads[name][place] = torch.from_numpy(push)
        return bounded.clipped(grads, terms.section.clip)

    def noticed(context: Any, params: Any, grads: Mapping[str, Any]) -> Mapping[str, Any]:
        tree = {name: np.asarray(grad) for name, grad in grads.items()}
        signals.append(directions.along(tree) * (terms.rate * count / terms.section.clip))
        return grads

    progress.stage(f"{NAME}: examples of dp-sgd", subject.job.rounds)
    make = _functional if isinstance(subject.program, FunctionalProgram) else _stepwise
    train = make(subject, count, zeros, sums, Correction({}, noticed))
    for number in range(1, subject.job.rounds + 1):
        train(number)
        progress.advance()
    seen = np.stack(signals)
    correlation = np.zeros(len(seen))
    correlation[0] = 1.0
    return Played(included, seen, np.ones_like(seen, np.bool_), correlation, directions.size)


def _functional(
    subject: Subject, count: int, zeros: Tree, sums: Sums, correction: Correction
) -> Callable[[int], object]:
    """Return what makes a round in the loop of a program of functions, its examples being their numbers."""
    assert isinstance(subject.program, FunctionalProgram), "that is what it is for"
    functional, ids = subject.program.functional, np.arange(count)

    def clipped(params: Any, batch: Any, clip: float) -> dict[str, Any]:
        found = sums(np.asarray(functional.lower(batch[0])))
        return {name: functional.lift(local.to_array(total)) for name, total in found.items()}

    program = replace(
        subject.program,
        functional=replace(functional, clipped=clipped),
        data={SITE: Examples((ids, ids))},
        section=_untimed(subject),
        _kept={},
    )
    return lambda number: program.train(SITE, Plan(subject.job.name, number, "train", 0, zeros), correction)


def _stepwise(subject: Subject, count: int, zeros: Tree, sums: Sums, correction: Correction) -> Callable[[int], object]:
    """Return what makes a round in the loop of recipes that fine-tune."""
    begin = noisy_steps(subject.job)
    assert begin is not None, "the job is under dp-sgd"
    tensors = {name: local.to_tensor(leaf) for name, leaf in zeros.items()}
    section = _untimed(subject)
    return lambda number: local.train_privately(tensors, begin(count), sums, section, correction)


def _untimed(subject: Subject) -> TrainSection:
    return subject.job.train.model_copy(update={"max_seconds": None})
