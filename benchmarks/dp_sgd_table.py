# SPDX-License-Identifier: Apache-2.0
"""Accuracy against ε: record-level DP-SGD on scikit-learn's digits, as a federation trains under it.

    python benchmarks/dp_sgd_table.py                 # one site, as the claim has it
    python benchmarks/dp_sgd_table.py --sites 4       # four, each with its own noise

A multilayer perceptron, 64-32-10, trained by ``tabular-classification`` for 20 rounds of 20 local steps; an example
is in a step's batch with probability 0.1; δ is 1e-4, by Rényi accounting. The row ∞ has the same clip and no noise to
speak of. Nothing is left on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from hansa.core.config import Job, parse
from hansa.simulation.run import run

RATE, ROUNDS, STEPS, DELTA = 0.1, 20, 20, 1e-4
EPSILONS = (math.inf, 8.0, 4.0, 2.0, 1.0, 0.5)
SILENT = 1e-6
"""The noise multiplier of the row ∞."""
BAR = 0.02
"""How far ε = 4 may lie below ∞."""


def job(folder: Path, epsilon: float, seed: int, sites: int, lr: float, clip: float) -> Job:
    """Write the digits of one seed's split, a fifth held out, and return the job that trains on them."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    held_out = len(x) // 5
    files: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for site in range(sites):
        for kind, rows in (("train", order[held_out:]), ("test", order[:held_out])):
            own = rows[site::sites]
            path = folder / f"{kind}-{site}.npz"
            np.savez(path, features=x[own], label=y[own].astype(str))
            files[kind][f"site-{site}"] = str(path)
    amount = {"noise_multiplier": SILENT} if math.isinf(epsilon) else {"epsilon": epsilon}
    values: dict[str, Any] = {
        "name": "digits",
        "seed": seed,
        "rounds": ROUNDS,
        "recipe": {"name": "tabular-classification", "inputs": 64, "offset": 8.0, "scale": 8.0, "hidden": [32]},
        "data": {**files, "labels": [str(digit) for digit in range(10)]},
        "train": {
            "optimizer": "sgd",
            "lr": lr,
            "steps": STEPS,
            "batch_size": round(RATE * (len(x) - held_out) / sites),
        },
        "privacy": {"mechanism": "dp-sgd", "clip": clip, "delta": DELTA, "accountant": "rdp", **amount},
        "baselines": {"local": False},
        "evaluation": {"every": ROUNDS},
        "output": {"dir": str(folder / "runs")},
    }
    return parse(values)


def accuracy(epsilon: float, seed: int, sites: int, lr: float, clip: float) -> tuple[float, float]:
    """Return the final model's accuracy on the held-out digits, and the noise multiplier."""
    with tempfile.TemporaryDirectory(prefix="hansa-dp-sgd-") as folder:
        finished = run(job(Path(folder), epsilon, seed, sites, lr, clip))
        report = json.loads((finished.directory / "report.json").read_text(encoding="utf-8"))
    return float(report["rounds"][-1]["metrics"]["accuracy"]), float(report["privacy"]["noise_multiplier"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--clip", type=float, default=1.0)
    asked = parser.parse_args()
    print("| ε | noise multiplier | accuracy, mean ± std | each seed |")
    print("|---|---|---|---|")
    means = []
    for epsilon in EPSILONS:
        found = [accuracy(epsilon, seed, asked.sites, asked.lr, asked.clip) for seed in range(asked.seeds)]
        scores = [score for score, _ in found]
        means.append(float(np.mean(scores)))
        noise = f"{found[0][1]:.3g}"
        shown = "∞" if math.isinf(epsilon) else f"{epsilon:g}"
        each = ", ".join(f"{score:.3f}" for score in scores)
        print(f"| {shown} | {noise} | {means[-1]:.3f} ± {np.std(scores):.3f} | {each} |", flush=True)
    falls = all(a >= b for a, b in itertools.pairwise(means))
    close = means[0] - means[EPSILONS.index(4.0)]
    print(f"monotone: {'yes' if falls else 'no'}; ε = 4 lies {100 * close:.1f} points below ∞ (bar: {100 * BAR:g})")
    if not falls or close > BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
