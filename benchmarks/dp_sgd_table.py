# SPDX-License-Identifier: Apache-2.0
"""Accuracy against ε: record-level DP-SGD on scikit-learn's digits, as a federation trains under it.

    python benchmarks/dp_sgd_table.py                 # one site, as the claim has it
    python benchmarks/dp_sgd_table.py --sites 4       # four, each with its own noise
    python benchmarks/dp_sgd_table.py --sites 4 --rate 0.5 --rounds 80 --steps 2 --clip 2 --tail 0.5 --accountant pld

A multilayer perceptron, 64-32-10, trained by ``tabular-classification`` for 20 rounds of 20 local steps; an example
is in a step's batch with probability 0.1; δ is 1e-4, by Rényi accounting. The row ∞ has the same clip and no noise to
speak of. What is judged is the last round's model, or the mean of those of the last rounds (``--tail``): everybody has
them, so it costs no ε. Nothing is left on disk.
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
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from hansa.core.config import Job, parse
from hansa.simulation.run import run

DELTA = 1e-4
EPSILONS = (math.inf, 8.0, 4.0, 2.0, 1.0, 0.5)
SILENT = 1e-6
"""The noise multiplier of the row ∞."""
BAR = 0.02
"""How far ε = 4 may lie below ∞."""


def split(seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return the digits, their labels, and the rows of one seed's split, a fifth held out."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    return x, y, {"train": order[len(x) // 5 :], "test": order[: len(x) // 5]}


def job(folder: Path, epsilon: float, seed: int, asked: argparse.Namespace) -> Job:
    """Write the digits of one seed's split, and return the job that trains on them."""
    x, y, parts = split(seed)
    files: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for site in range(asked.sites):
        for kind, rows in parts.items():
            own = rows[site :: asked.sites]
            path = folder / f"{kind}-{site}.npz"
            np.savez(path, features=x[own], label=y[own].astype(str))
            files[kind][f"site-{site}"] = str(path)
    amount = {"noise_multiplier": SILENT} if math.isinf(epsilon) else {"epsilon": epsilon}
    values: dict[str, Any] = {
        "name": "digits",
        "seed": seed,
        "rounds": asked.rounds,
        "recipe": {"name": "tabular-classification", "inputs": 64, "offset": 8.0, "scale": 8.0, "hidden": [32]},
        "data": {**files, "labels": [str(digit) for digit in range(10)]},
        "train": {
            "optimizer": "sgd",
            "lr": asked.lr,
            "steps": asked.steps,
            "batch_size": round(asked.rate * len(parts["train"]) / asked.sites),
        },
        "privacy": {
            "mechanism": "dp-sgd",
            "clip": asked.clip,
            "delta": DELTA,
            "accountant": asked.accountant,
            **amount,
        },
        "baselines": {"local": False},
        "evaluation": {"every": 0},
        "output": {"dir": str(folder / "runs"), "keep": averaged(asked)},
    }
    return parse(values)


def averaged(asked: argparse.Namespace) -> int:
    """Return how many rounds' models are averaged."""
    return max(1, round(asked.tail * asked.rounds))


def accuracy(epsilon: float, seed: int, asked: argparse.Namespace) -> tuple[float, float]:
    """Return the averaged model's accuracy on the held-out digits, and the largest noise multiplier of a site."""
    with tempfile.TemporaryDirectory(prefix="hansa-dp-sgd-") as folder:
        finished = run(job(Path(folder), epsilon, seed, asked))
        report = json.loads((finished.directory / "report.json").read_text(encoding="utf-8"))
        rounds = range(asked.rounds - averaged(asked) + 1, asked.rounds + 1)
        models = [load_file(finished.directory / "checkpoints" / f"{n:06d}" / "model.safetensors") for n in rounds]
    params = {name: np.mean([model[name] for model in models], axis=0) for name in models[0]}
    x, y, parts = split(seed)
    hidden = np.maximum((x[parts["test"]] - 8) / 8 @ params["0.weight"].T + params["0.bias"], 0)
    found = (hidden @ params["2.weight"].T + params["2.bias"]).argmax(1)
    return float((found == y[parts["test"]]).mean()), float(report["privacy"]["noise_multiplier"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tail", type=float, default=0.0, help="average the models of this share of the rounds")
    parser.add_argument("--accountant", default="rdp")
    asked = parser.parse_args()
    print("| ε | noise multiplier | accuracy, mean ± std | each seed |")
    print("|---|---|---|---|")
    means = []
    for epsilon in EPSILONS:
        found = [accuracy(epsilon, seed, asked) for seed in range(asked.seeds)]
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
