# SPDX-License-Identifier: Apache-2.0
"""One round of a synthetic float32 model of any size through the core, no network: time and peak anonymous memory of
every phase, in the server's process and in a site's (Linux); settings in README.md.

python benchmarks/large.py [--gib 1] [--tensor-mib 256] [--sites 2] [--strategy fedavg] [--dir .]

The tensors are generated a block at a time, and training scales them, so that what is measured is the core. Each
site is a process of its own, one after another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hansa import registry
from hansa.client.work import perform
from hansa.core import settle, wire
from hansa.core import tree as trees
from hansa.core.fold import Fold
from hansa.core.lazy import Leaf
from hansa.core.ports import Correction, Work
from hansa.core.strategy import Steps, Strategy
from hansa.core.tree import Tree
from hansa.core.values import Plan, RoundRecord
from hansa.filters.weigh import weigh
from hansa.sinks.checkpoint import Checkpoints


class Meter:
    """Seconds and peak RssAnon of each phase of this process, sampled every 5 ms."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[float, int]] = {}
        self._peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, anonymous())
            time.sleep(0.005)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._peak = anonymous()
        begun = time.perf_counter()
        yield
        seconds, peak = self.phases.get(name, (0.0, 0))
        self.phases[name] = seconds + time.perf_counter() - begun, max(peak, self._peak)


def anonymous() -> int:
    """Return this process's anonymous resident bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This system does not tell RssAnon.")


class Synthetic:
    """Training that scales every parameter, a block at a time."""

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        moved = trees.Lazy(trees.scale(trees.lazily(plan.params), 1.001))
        return Work(moved, 1024.0, Steps(1, 0.1), {"examples": 1.0})


def initial(gib: float, tensor_mib: int) -> Tree:
    """Return a tree of equal tensors that no memory holds."""
    size = tensor_mib * (1 << 20) // 4
    pattern = np.random.default_rng(0).normal(size=trees.BLOCK).astype(np.float32)
    count = round(gib * 1024 / tensor_mib)
    leaf = Leaf((size,), pattern.dtype, lambda start, stop, memo: pattern[: stop - start])
    return trees.Lazy({f"layer.{i:04d}": leaf for i in range(count)})


def build(strategy: str) -> Strategy:
    """Return a strategy with its defaults."""
    return registry.build("strategies", strategy, {})


def site(folder: Path, name: str, strategy: str) -> None:
    """Carry the plan in ``folder`` out and spool the update there; prints the phases as JSON."""
    meter = Meter()
    with meter.phase("site: train, update, spool"):
        plan = wire.open_plan(folder / "plan.hansa")
        update, memory, _ = perform(Synthetic(), build(strategy), [weigh()], plan, name, {})
        for owner, parts in memory.items():
            with (folder / f"{name}.{owner}.memory").open("wb") as file:
                wire.write(file, "memory", {}, parts)
        wire.spool(update, folder / f"{name}.hansa")
    print(json.dumps(meter.phases))


def server(folder: Path, gib: float, tensor_mib: int, sites: int, strategy: str) -> Mapping[str, tuple[float, int]]:
    """Run one round and return its phases."""
    meter = Meter()
    value = build(strategy)
    checkpoints = Checkpoints(folder / "checkpoints", 1, "loss", "min")
    with meter.phase("server: first model and state"):
        model, state = settle.start(value, initial(gib, tensor_mib), folder)
    with meter.phase("server: plan"):
        plan = Plan("large", 1, "train", 0, model.native(), value.sent(state))
        with (folder / "plan.hansa").open("wb") as file:
            wire.write_plan(file, plan)
    names = [f"s{i:03d}" for i in range(sites)]
    fold = Fold(names, dict.fromkeys(value.weighed, trees.layout_of(plan.params)), value.weighed, sites, folder)
    seen: dict[str, tuple[float, int]] = {}
    for name in names:
        command = [sys.executable, __file__, "--site", name, "--strategy", strategy, "--dir", str(folder)]
        for phase, (seconds, peak) in json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        ).items():
            before = seen.get(phase, (0.0, 0))
            seen[phase] = before[0] + seconds, max(before[1], peak)
        for left in folder.glob("*.memory"):
            left.unlink()
        if name == names[-1]:
            (folder / "plan.hansa").unlink()
        with meter.phase("server: fold"):
            fold.add(wire.Spooled(folder / f"{name}.hansa"))
    with meter.phase("server: fold"):
        aggregate = fold.close()
    with meter.phase("server: step, settle"):
        settled, _ = settle.step(value, model, state, aggregate, folder)
    fold.discard()
    del model, state, aggregate
    with meter.phase("server: checkpoint, durable"):
        record = RoundRecord(
            "large", 1, (), (), (), {}, {}, {}, 0, 0, 0.0, settled.model, settled.state, {}, settled.files
        )
        checkpoints.write(record)
        settled.forget()
    return {**meter.phases, **seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tensor-mib", type=int, default=256)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--dir", type=Path, default=Path())
    parser.add_argument("--site", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.site:
        site(asked.dir, asked.site, asked.strategy)
        return
    with tempfile.TemporaryDirectory(dir=asked.dir) as folder:  # a real disk: /tmp may lie in memory
        phases = server(Path(folder), asked.gib, asked.tensor_mib, asked.sites, asked.strategy)
    print(f"{asked.strategy}, {asked.gib:g} GiB in tensors of {asked.tensor_mib} MiB, {asked.sites} sites")
    print("| phase | seconds | peak anonymous MiB |\n|---|---|---|")
    for name, (seconds, peak) in phases.items():
        print(f"| {name} | {seconds:.2f} | {peak / (1 << 20):.0f} |")


if __name__ == "__main__":
    main()
