# SPDX-License-Identifier: Apache-2.0
"""What the audit's attacks find where the answer is known.

    python benchmarks/audit_table.py --row canaries        # an empirical ε beside the analytic one

Settings are in README.md; nothing is left on disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hansa.audit import canaries, estimate
from hansa.audit.subject import opened
from hansa.core.config import parse
from hansa.runs.progress import Silent

PARAMETERS, DELTA, COINS = 50_000, 1e-5, 800
NOISES = (8.0, 4.0, 2.0, 1.0)
BAR = 0.15
"""How far the mean of all estimates may lie from the analytic ε."""


def _canaries(repeats: int) -> bool:
    """One round of central noise over 800 canaries, about half of them in; the model has 50 000 parameters."""
    print(
        "| noise | ε, analytic | estimate | off | its deviation | bound, median | largest | above ε | ¼ noise caught |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
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
                guesses.append(estimate.estimate(scores, played.included, DELTA).epsilon)
                bounds.append(estimate.lower_bound(scores, played.included, DELTA).epsilon)
        mean, off = np.mean(guesses), np.mean(guesses) / true - 1
        above = sum(bound > true for bound in bounds)
        good &= abs(off) <= BAR and not above
        print(
            f"| {noise:g} | {true:.2f} | {mean:.2f} | {off:+.1%} | {np.std(guesses):.2f} | {np.median(bounds):.2f} | "
            f"{max(bounds):.2f} | {above} of {repeats} | {_caught(noise / 4, true):.0%} |",
            flush=True,
        )
    return good


def _caught(noise: float, promised: float, games: int = 100) -> float:
    """Return how often a whole audit's bound of a Gaussian mechanism with so little noise is above what is promised."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(games):
        included = generator.random(canaries.CANARIES) < 0.5
        scores = included + noise * generator.normal(size=canaries.CANARIES)
        found += estimate.lower_bound(scores, included, DELTA).epsilon > promised
    return found / games


ROWS: Mapping[str, Callable[[int], bool]] = {"canaries": _canaries}
"""Name -> what prints the row's table and says whether it meets its bar."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="all by default")
    parser.add_argument("--repeats", type=int, default=20, help="seeds that are averaged")
    words = parser.parse_args()
    met = [ROWS[row](words.repeats) for row in words.row or ROWS]
    if not all(met):
        raise SystemExit("A bar was missed.")


if __name__ == "__main__":
    main()
