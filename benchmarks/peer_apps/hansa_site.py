# SPDX-License-Identifier: Apache-2.0
"""Recipe ``hansa_site:build``: the model of ``synthetic.py``, trained as the peers' sites train it: every parameter
is held and multiplied by a constant. When a site gets a model is written to ``STAMPS/SITE``.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from hansa import registry
from hansa.core.config import Job
from hansa.core.ports import Correction, Work
from hansa.core.strategy import Steps
from hansa.core.values import Plan
from synthetic import Synthetic


class Stamped(Synthetic):
    def __init__(self, sites: int, mib: float, tensor_mib: float, stamps: str) -> None:
        super().__init__(sites, mib, tensor_mib)
        self._stamps = Path(stamps)

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        with (self._stamps / site).open("a") as stamps:
            stamps.write(f"{time.time()}\n")
        trained = {name: np.asarray(leaf) * np.float32(1.001) for name, leaf in plan.params.items()}
        return Work(trained, 1024.0, Steps(1, 0.1), {"examples": 1.0})


def build(job: Job) -> Stamped:
    return Stamped(**registry.checked("recipes.hansa_site", Stamped, job.recipe.options))
