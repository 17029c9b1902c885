# SPDX-License-Identifier: Apache-2.0
"""Rounds to 90 % test accuracy on label-skewed digits, for every strategy; the settings are in README.md.

python benchmarks/scaffold_table.py [--seeds 5] [--rounds 60] [--strategies fedavg scaffold]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from hansa.client.functional import accuracy
from hansa.core.optimizer import sgd
from hansa.core.strategy import Strategy
from hansa.loop import process
from hansa.partition.shards import shards
from hansa.strategies.fedavg import fedavg
from hansa.strategies.fedavgm import fedavgm
from hansa.strategies.fedopt import fedadagrad, fedadam, fedyogi
from hansa.strategies.fedprox import fedprox
from hansa.strategies.scaffold import scaffold

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "fedavg": fedavg,
    "fedprox": lambda: fedprox(mu=0.1),
    "fedavgm": lambda: fedavgm(momentum=0.9),
    "fedadam": lambda: fedadam(lr=0.03),
    "fedyogi": lambda: fedyogi(lr=0.03),
    "fedadagrad": lambda: fedadagrad(lr=0.1),
    "scaffold": scaffold,
}
TARGET = 0.9
Data = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Labelled:
    """Rows with a label, as a partition sees them."""

    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, name: str) -> list[int]:
        return self.labels

    @property
    def sources(self) -> list[str]:
        return ["digits"] * len(self.labels)


def digits(seed: int, sites: int = 10, per_site: int = 2) -> tuple[Data, Data]:
    """Return the sites' training rows (``per_site`` label shards each), and one site with the test rows."""
    x, y = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    held_out = len(x) // 5
    parts = shards(sites, per_site)(Labelled(y[held_out:].tolist()), seed)
    rows = {site: np.asarray(part) + held_out for site, part in parts.items()}
    return {site: (x[r], y[r]) for site, r in rows.items()}, {"test": (x[:held_out], y[:held_out])}


def model() -> nn.Module:
    """Return the 64-32-10 network, with He's initial weights and no biases to start from."""
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return layers


def accuracies(strategy: Callable[[], Strategy], seed: int, rounds: int, stop: float = 2.0) -> list[float]:
    """Return the test accuracy after each round, up to the first that reaches ``stop``."""
    train, test = digits(seed)
    loop = process(
        model,
        strategy,
        client_optimizer=sgd(0.1),
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        steps=20,
        batch_size=32,
        seed=seed,
        engine="batched",
    )
    state = loop.initialize()
    seen: list[float] = []
    while len(seen) < rounds and not (seen and seen[-1] >= stop):
        state, _ = loop.next(state, train)
        seen.append(loop.evaluate(state, test)["accuracy"])
    return seen


def rounds_to(target: float, seen: list[float]) -> int | None:
    """Return the first round that reached ``target``."""
    return next((number for number, value in enumerate(seen, start=1) if value >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| strategy | rounds to {TARGET:.0%}, mean | each seed | accuracy after {asked.rounds} rounds |")
    print("|---|---|---|---|")
    for name in asked.strategies:
        runs = [accuracies(STRATEGIES[name], seed, asked.rounds) for seed in range(asked.seeds)]
        reached = [rounds_to(TARGET, run) for run in runs]
        counted = [r for r in reached if r is not None]
        mean = f"{np.mean(counted):.1f}" if len(counted) == len(reached) else f"{len(counted)} of {len(reached)} did"
        final = [run[-1] for run in runs]
        each = ", ".join(str(r) for r in reached)
        print(f"| {name} | {mean} | {each} | {np.mean(final):.3f} ± {np.std(final):.3f} |", flush=True)


if __name__ == "__main__":
    main()
