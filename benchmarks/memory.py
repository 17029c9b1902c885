# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a federation of a synthetic float32 model, by number of sites (Linux); settings in README.md.

python benchmarks/memory.py [--mib 1024] [--sites 2 32] [--rounds 1] [--strategy fedavg]

A child process runs server and sites (engine ``local``); this one samples /proc/PID/status every 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from hansa.core.config import parse
from hansa.core.fit import Trait
from hansa.core.ports import Correction, SiteReport, Work
from hansa.core.strategy import Steps
from hansa.core.tree import Tree
from hansa.core.values import Model, Plan, Snapshot
from hansa.simulation.local import Local
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather

TENSORS = 32


class Synthetic:
    """Training that adds a constant to every parameter: it holds the plan's model and the trained one."""

    traits = frozenset({Trait.STEPWISE})

    def __init__(self, mib: int, sites: int) -> None:
        self.sites: Sequence[str] = [f"s{i:03d}" for i in range(sites)]
        self._size = mib * (1 << 20) // 4 // TENSORS

    def initial(self) -> Tree:
        return {f"layer.{i:02d}": np.full(self._size, 0.5, np.float32) for i in range(TENSORS)}

    def inspect(self, site: str) -> SiteReport:
        return SiteReport(site, {"train": 1})

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        trained = {name: leaf + np.float32(1e-3) for name, leaf in plan.params.items()}
        return Work(trained, 1024.0, Steps(1, 0.1), {"examples": 1.0})

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


async def federate(mib: int, sites: int, rounds: int, strategy: str) -> None:
    """Run ``rounds`` rounds; each model but the last is let go."""
    job = parse(
        {"name": "memory", "recipe": "none", "rounds": rounds, "strategy": strategy, "evaluation": {"every": 0}}
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a real disk: /tmp may lie in memory
        directory = Path(folder)
        async with Local(job, directory, Synthetic(mib, sites)) as engine:
            course = Course(job.name, tuple(engine.sites), job.strategy)
            value, _ = course.pieces()
            model = Model.start(await engine.initial())
            start = Snapshot(0, model, value.init(model))
            del model
            records = scatter_gather(job, value, engine.cohort(course), start, directory)
            del start
            async for record in records:
                assert len(record.accepted) == sites, record.absent


def sampled(command: Sequence[str]) -> tuple[dict[str, int], float]:
    """Run ``command``; return its peak RSS, RssAnon and RssFile (with RssShmem) in bytes, less what it began with."""
    begun = time.monotonic()
    child = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n", "the child tells when its libraries are loaded"
    first = rss(child.pid)
    peak = dict.fromkeys(first, 0)
    while child.poll() is None:
        for name, value in rss(child.pid).items():
            peak[name] = max(peak[name], value)
        time.sleep(0.01)
    if child.returncode:
        raise SystemExit(child.returncode)
    return {name: peak[name] - first[name] for name in peak}, time.monotonic() - begun


def rss(pid: int) -> dict[str, int]:
    """Return the resident bytes of a process, in all and by kind; zeros once it has ended."""
    found = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    shared = found["RssFile"] + found["RssShmem"]
    return {"RSS": found["RssAnon"] + shared, "RssAnon": found["RssAnon"], "RssFile": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print("ready", flush=True)
        asyncio.run(federate(asked.mib, asked.sites[0], asked.rounds, asked.strategy))
        return
    print(
        "| sites | peak RSS, GiB | of it anonymous | mapped files | model copies | seconds |\n|---|---|---|---|---|---|"
    )
    for sites in asked.sites:
        given = ["--mib", asked.mib, "--sites", sites, "--rounds", asked.rounds, "--strategy", asked.strategy]
        peak, taken = sampled([sys.executable, __file__, "--child", *map(str, given)])
        columns = " | ".join(f"{peak[name] / (1 << 30):.2f}" for name in ("RSS", "RssAnon", "RssFile"))
        print(f"| {sites} | {columns} | {peak['RSS'] / (asked.mib << 20):.2f} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
