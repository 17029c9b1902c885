# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of an empty round: every site answers at once with a tiny update; settings in README.md.

python benchmarks/empty_round.py [--engines local processes] [--clients 10 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hansa.core.config import Job, parse
from hansa.core.fit import Trait
from hansa.core.ports import Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Tree
from hansa.core.values import Model, Plan, Snapshot
from hansa.simulation.engines import open_engine
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather


class Empty:
    """Training that returns the model as it came, one number."""

    traits = frozenset({Trait.STEPWISE})

    def __init__(self, sites: int) -> None:
        self.sites: Sequence[str] = [f"c{i:05d}" for i in range(sites)]

    def initial(self) -> Tree:
        return {"w": np.zeros(1, np.float32)}

    def inspect(self, site: str) -> SiteReport:
        return SiteReport(site, {"train": 1})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        return Work(plan.params, 1.0, Steps(1, 0.1), {"examples": 1.0})

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        return {}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {}

    def export(self, params: Tree, directory: Path) -> None:
        raise NotImplementedError

    def show(self, params: Tree) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        pass


def build(job: Job) -> Empty:
    """Return the program; the job names it, as workers build their own."""
    return Empty(int(job.recipe.options["sites"]))


async def milliseconds(engine: str, clients: int, rounds: int) -> list[float]:
    """Return each round's milliseconds after a first one, which starts what has to be started."""
    job = parse(
        {
            "name": "empty",
            "recipe": {"name": "empty_round:build", "sites": clients},
            "rounds": rounds + 2,
            "engine": {"name": engine, **({"workers": 2} if engine == "processes" else {})},
            "evaluation": {"every": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with open_engine(job, directory) as running:
            course = Course(job.name, tuple(running.sites), job.strategy)
            value, _ = course.pieces()
            model = Model.start(await running.initial())
            start = Snapshot(0, model, value.init(model))
            taken = []
            async for record in scatter_gather(job, value, running.cohort(course), start, directory):
                assert len(record.accepted) == clients, record.absent
                taken.append(record.seconds * 1e3)
            return taken[1:-1]  # the last round evaluates too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engines", nargs="+", default=["local", "processes"], choices=["local", "processes"])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    sys.modules["empty_round"] = sys.modules["__main__"]
    print("| engine | clients | ms a round, median | least | ms a client |\n|---|---|---|---|---|")
    for engine in asked.engines:
        for clients in asked.clients:
            taken = asyncio.run(milliseconds(engine, clients, asked.rounds))
            middle = statistics.median(taken)
            row = f"{middle:.1f} | {min(taken):.1f} | {middle / clients:.2f}"
            print(f"| {engine} | {clients} | {row} |", flush=True)


if __name__ == "__main__":
    main()
