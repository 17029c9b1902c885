# SPDX-License-Identifier: Apache-2.0
"""Seconds a round of many small clients takes, engines local and batched; the settings are in README.md.

python benchmarks/simulation_speed.py [--clients 1000] [--rounds 5] [--strategies fedavg scaffold] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from hansa.client.functional import Examples, FunctionalProgram, of_torch
from hansa.client.torch import seeded
from hansa.core.config import Job, parse
from hansa.core.values import Model, Snapshot
from hansa.simulation.engines import open_engine
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather


def program(job: Job, clients: int) -> FunctionalProgram:
    """Return the 64-32-10 network over 80 to 120 digits a client, drawn with replacement."""
    x, y = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    rng = np.random.default_rng(0)
    data = {}
    for client in range(clients):
        rows = rng.integers(0, len(x), rng.integers(80, 121))
        data[f"c{client:05d}"] = Examples((x[rows], y[rows]))
    with seeded(0, "initial"):
        module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return FunctionalProgram(of_torch(module, nn.functional.cross_entropy), data, job.train)


async def seconds(engine: str, strategy: str, clients: int, rounds: int, threads: int) -> tuple[list[float], float]:
    """Return each round's seconds after a first one that warms up, and the processor seconds a round."""
    job = parse(
        {
            "name": "speed",
            "recipe": "none",
            "rounds": rounds + 1,
            "strategy": strategy,
            "train": {"optimizer": "sgd", "lr": 0.1, "steps": 10, "batch_size": 20},
            "engine": {"name": engine, "threads": threads},
            "evaluation": {"every": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with open_engine(job, directory, program(job, clients)) as running:
            course = Course(job.name, tuple(running.sites), job.strategy)
            value, _ = course.pieces()
            model = Model.start(await running.initial())
            start = Snapshot(0, model, value.init(model))
            taken, used = [], time.process_time()
            async for record in scatter_gather(job, value, running.cohort(course), start, directory):
                assert len(record.accepted) == clients, record.absent
                if record.round == 1:
                    used = time.process_time()
                else:
                    taken.append(record.seconds)
            return taken, (time.process_time() - used) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=["local", "batched"], choices=["local", "batched"])
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "scaffold"])
    asked = parser.parse_args()
    print("| engine | strategy | s a round, median | least | processor s a round |\n|---|---|---|---|---|")
    for engine in asked.engines:
        for strategy in asked.strategies:
            taken, used = asyncio.run(seconds(engine, strategy, asked.clients, asked.rounds, asked.threads))
            print(
                f"| {engine} | {strategy} | {statistics.median(taken):.2f} | {min(taken):.2f} | {used:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
