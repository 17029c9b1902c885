# SPDX-License-Identifier: Apache-2.0
"""The toy quadratics at sites that need memory: recipe ``hungry:build``; ``bytes`` are taken while a site trains.

``by`` says by what: ``numpy``, ``torch``, or two ``children`` that take so much each.
"""

from __future__ import annotations

import os

import numpy as np

from hansa.core.config import Job
from toys import Quadratics


class Hungry(Quadratics):
    def __init__(self, bytes: int, by: str = "numpy", **options) -> None:
        super().__init__(**options)
        self._bytes = bytes
        self._by = by

    def train(self, site, plan, correction):
        if self._by == "children":
            for _ in range(2):
                child = os.fork()
                if not child:
                    taken = np.ones(self._bytes, np.uint8)
                    os.read(self._never(), int(taken[-1]))
            os.wait()
        elif self._by == "torch":
            import torch

            taken = torch.ones(self._bytes, dtype=torch.uint8)
        else:
            taken = np.ones(self._bytes, np.uint8)
            assert taken[-1]
        return super().train(site, plan, correction)

    def _never(self) -> int:
        """Return a pipe's end of which nothing can be read while this process lives."""
        self._ends = os.pipe()
        return self._ends[0]


def build(job: Job) -> Hungry:
    return Hungry(**job.recipe.options)
