# SPDX-License-Identifier: Apache-2.0
"""Recipe ``synthetic:build``: a float32 model of any size whose training costs next to nothing, so that what is
measured is the federation. Tensors are generated a block at a time, and no memory holds them.

    recipe = { name = "synthetic:build", sites = 4, mib = 256, tensor_mib = 64 }

``numbers`` says how many random numbers there are before they repeat: with a few, a disk that compresses holds a model
that it would else have no room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hansa import registry
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.lazy import Leaf
from hansa.core.ports import Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Tree
from hansa.core.values import Plan


class Synthetic:
    """Training that multiplies every parameter by a constant."""

    traits = frozenset({Trait.STEPWISE})

    def __init__(self, sites: int, mib: float, tensor_mib: float = 64, numbers: int = trees.BLOCK) -> None:
        width = len(str(sites))
        self.sites = tuple(f"site-{i:0{width}d}" for i in range(1, sites + 1))
        self._mib = mib
        self._tensor_mib = min(tensor_mib, mib)
        self._numbers = numbers

    def initial(self) -> Tree:
        size = round(self._tensor_mib * (1 << 20)) // 4
        pattern = np.resize(np.random.default_rng(0).normal(size=self._numbers).astype(np.float32), trees.BLOCK)
        leaf = Leaf((size,), pattern.dtype, lambda start, stop, memo: pattern[: stop - start])
        return trees.Lazy({f"layer.{i:04d}": leaf for i in range(max(1, round(self._mib / self._tensor_mib)))})

    def inspect(self, site: str) -> SiteReport:
        return SiteReport(site, {"train": 1024})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        moved = trees.Lazy(trees.scale(trees.lazily(plan.params), 1.001))
        return Work(moved, 1024.0, Steps(1, 0.1), {"examples": 1.0})

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        return {"examples": 1.0}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return dict(sums)

    def export(self, params: Tree, directory: Path) -> None:
        pass

    def show(self, params: Tree) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        pass


def build(job: Job) -> Synthetic:
    return Synthetic(**registry.checked("recipes.synthetic", Synthetic, job.recipe.options))
