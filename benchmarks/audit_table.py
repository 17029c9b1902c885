# SPDX-License-Identifier: Apache-2.0
"""What the audit's attacks find where the answer is known.

    python benchmarks/audit_table.py --row canaries        # an empirical ε beside the analytic one
    python benchmarks/audit_table.py --row inversion       # digits read off updates: plain, noised, masked
    python benchmarks/audit_table.py --row lira            # who was trained on, without and with dp-sgd

Settings are in README.md; nothing is left on disk.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from hansa.audit import canaries, estimate, inversion, membership
from hansa.audit.finding import Finding, Measure
from hansa.audit.subject import opened
from hansa.core.config import Job, parse
from hansa.runs.progress import Silent

PARAMETERS, DELTA, COINS = 50_000, 1e-5, 800
NOISES = (8.0, 4.0, 2.0, 1.0)
BAR = 0.15
"""How far the mean of all estimates may lie from the analytic ε."""


def _canaries(repeats: int) -> bool:
    """One round of central noise over 800 canaries, about half of them in; the model has 50 000 parameters."""
    print("| noise | ε, analytic | estimate | off | its deviation | bounds, median | above ε | ½ noise caught |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for noise in NOISES:
        job: dict[str, Any] = {
            "name": "canaries",
            "rounds": 1,
            "recipe": {"name": "synthetic:build", "sites": 3, "mib": PARAMETERS * 4 / 2**20},
            "privacy": {"mechanism": "central", "clip": 1.0, "noise_multiplier": noise, "delta": DELTA},
        }
        with opened(parse(job)) as subject:
            true = subject.promised("the public")
            assert true is not None, "central noise promises the public an ε"
            guesses, bounds = [], []
            for seed in range(repeats):
                played = canaries.play(subject, COINS, np.random.default_rng(seed), Silent())
                assert played.parameters == PARAMETERS
                scores = played.scores(cohorts=True)
                guess = estimate.estimate(scores, played.included, DELTA)
                guesses.append(guess.epsilon)
                bounds.append((estimate.lower_bound(scores, played.included, DELTA).epsilon, guess.least))
        mean, off = np.mean(guesses), np.mean(guesses) / true - 1
        proved, normal = np.median(bounds, axis=0)
        above, also = (np.array(bounds) > true).sum(0)
        good &= abs(off) <= BAR and not above
        print(
            f"| {noise:g} | {true:.2f} | {mean:.2f} | {off:+.1%} | {np.std(guesses):.2f} | "
            f"{proved:.2f}, {normal:.2f} | {above}, {also} of {repeats} | {_caught(noise / 2, true):.0%} |",
            flush=True,
        )
    return good


def _caught(noise: float, promised: float, games: int = 100) -> float:
    """Return how often a whole audit's bounds of a Gaussian mechanism with so little noise are above the promise."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(games):
        included = generator.random(canaries.CANARIES) < 0.5
        scores = included + noise * generator.normal(size=canaries.CANARIES)
        found += (
            max(estimate.lower_bound(scores, included, DELTA).epsilon, estimate.estimate(scores, included, DELTA).least)
            > promised
        )
    return found / games


def _digits(folder: Path, sites: int, rows: int, wrong: float, **more: Any) -> Job:
    """Return a job on digits: 64-32-10, ``rows`` to train on at each site, a share of whose labels is drawn by lot."""
    x, y = load_digits(return_X_y=True)
    drawn = np.random.default_rng(0)
    order, files = drawn.permutation(len(x)), {}
    for site in range(sites):
        own, path = order[site * rows : (site + 1) * rows], folder / f"site-{site}.npz"
        labels = np.where(drawn.random(rows) < wrong, drawn.integers(0, 10, rows), y[own])
        np.savez(path, features=x[own], label=labels.astype(str))
        files[f"site-{site}"] = str(path)
    values: dict[str, Any] = {
        "name": "digits",
        "recipe": {"name": "tabular-classification", "inputs": 64, "offset": 8.0, "scale": 8.0, "hidden": [32]},
        "data": {"train": files, "test_fraction": 0.0, "labels": [str(digit) for digit in range(10)]},
        "baselines": {"base": False, "local": False},
    }
    return parse({**values, **more})


def _measure(finding: Finding, name: str) -> Measure:
    return next(measure for measure in finding.measures if measure.name.startswith(name))


def _inversion(repeats: int) -> bool:
    """Uploads of one digit and one step at each of three sites, 32 a row and repeat."""
    print("| protection | relative error, median | cosine | cosine, noise | label read off | right one named of 64 |")
    print("|---|---|---|---|---|---|")
    local = {"mechanism": "local", "clip": 1.0, "noise_multiplier": 0.1, "delta": 1e-5}
    rows: Mapping[str, dict[str, Any]] = {
        "none": {},
        "clip 1, noise .1 at the site": {"privacy": local},
        "masks": {"secure_aggregation": {"minimum": 3}},
    }
    good, repeats = True, max(1, repeats // 5)
    for name, section in rows.items():
        train = {"optimizer": "sgd", "lr": 0.5, "batch_size": 8}
        with tempfile.TemporaryDirectory() as folder:
            job = _digits(Path(folder), 3, 100, 0.0, rounds=1, train=train, **section)
            with opened(job) as subject:
                found = []
                for seed in range(repeats):
                    finding = inversion.attack(subject, np.random.default_rng(seed), Silent())
                    assert isinstance(finding, Finding)
                    found.append(finding)
        kinds = ("one example: relative error", "one example: cosine", "label read off", "right example named")
        error, cosine, label, named = (np.mean([_measure(f, kind).value for f in found]) for kind in kinds)
        noise = np.mean([_measure(f, kinds[1]).baseline or 0.0 for f in found])
        if name == "none":
            good &= bool(error < 1e-6 and label == 1.0)
        if name == "masks":
            good &= all(f.verdict != "fails" for f in found)
        print(f"| {name} | {error:.2g} | {cosine:.3f} | {noise:.3f} | {label:.0%} | {named:.0%} |", flush=True)
    return good


def _lira(repeats: int) -> bool:
    """48 models on halves of 400 digits with 15 % of labels by lot: 10 rounds of 20 steps."""
    print("| privacy | AUC | TPR at 1 % FPR | ε promised | ε proved |")
    print("|---|---|---|---|---|")
    private = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 2.5, "delta": 1e-5}
    good = True
    for name, section in {"none": {}, "clip 1, noise 2.5": {"privacy": private}}.items():
        train = {"optimizer": "sgd", "lr": 0.5, "batch_size": 40, "steps": 20}
        with tempfile.TemporaryDirectory() as folder:
            job = _digits(Path(folder), 1, 400, 0.15, rounds=10, train=train, **section)
            with opened(job) as subject:
                finding = membership.attack(subject, np.random.default_rng(repeats), Silent())
        assert isinstance(finding, Finding)
        area, rate, proved = finding.measures
        good &= finding.verdict != "fails" and (not section or rate.value <= 3 * membership.LOW)
        cells = [f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in (area, rate)]
        bound = "-" if proved.bound is None else f"{proved.bound:.2f}"
        print(f"| {name} | {' | '.join(cells)} | {bound} | {proved.value:.2f} |", flush=True)
    return good


ROWS: Mapping[str, Callable[[int], bool]] = {"canaries": _canaries, "inversion": _inversion, "lira": _lira}
"""Name -> what prints the row's table and says whether it meets its bar."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="all by default")
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="seeds that are averaged; for inversion a fifth of them, for lira it is the seed",
    )
    words = parser.parse_args()
    met = [ROWS[row](words.repeats) for row in words.row or ROWS]
    if not all(met):
        raise SystemExit("A bar was missed.")


if __name__ == "__main__":
    main()
