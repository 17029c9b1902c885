# SPDX-License-Identifier: Apache-2.0
"""How many local steps a round has, and which rows each of them sees; the same in every engine and framework."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hansa.core import rng
from hansa.core.config import TrainSection


def num_steps(section: TrainSection, num_examples: int) -> int:
    """Return how many steps a round has: ``steps``, or ``epochs`` (1 by default) over the site's examples."""
    if section.steps is not None:
        return section.steps
    per_epoch = math.ceil(num_examples / section.batch_size)
    return max(1, math.ceil((section.epochs or 1.0) * per_epoch))


def shuffled(num_examples: int, batch_size: int, seed: int, *labels: int | str) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices without end: each epoch is a new permutation from (seed, labels), and its last
    batch is what is left over.

    >>> [len(batch) for batch, _ in zip(shuffled(5, 2, 0, "site"), range(4))]
    [2, 2, 1, 2]
    """
    generator = rng.generator(seed, *labels)
    while True:
        order = generator.permutation(num_examples)
        for start in range(0, num_examples, batch_size):
            yield order[start : start + batch_size]
