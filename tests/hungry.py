# SPDX-License-Identifier: Apache-2.0
"""The toy quadratics at sites that need memory: recipe ``hungry:build``; ``bytes`` are taken while a site trains."""

from __future__ import annotations

import numpy as np

from hansa.core.config import Job
from toys import Quadratics


class Hungry(Quadratics):
    def __init__(self, bytes: int, **options) -> None:
        super().__init__(**options)
        self._bytes = bytes

    def train(self, site, plan, correction):
        taken = np.ones(self._bytes, np.uint8)
        assert taken[-1]
        return super().train(site, plan, correction)


def build(job: Job) -> Hungry:
    return Hungry(**job.recipe.options)
