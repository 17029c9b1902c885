# SPDX-License-Identifier: Apache-2.0
"""A federated LoRA fine-tune under secure aggregation, beside the plain sum; three of ten sites drop out in each phase.

python benchmarks/secure_lora.py [--rounds 2]

The job is examples/quickstart.toml with a LoRA adapter and ten sites. "Drop out" is a site's silence from that phase on
in the first round. Up to the upload its update is not in the sum, and the plain run that is compared leaves it out too;
from the vote on it is, and the others unmask it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

import hansa
from hansa.core.values import Absence, Plan, Update
from hansa.runs.run import Run
from hansa.sinks.checkpoint import Checkpoints
from hansa.workers.runner import Course, SecureSites, SiteRunner

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.toml"
GONE = ("site-02", "site-05", "site-09")
PHASES = ("nobody", "advertise", "share", "receive", "train", "vote", "reveal")


@contextmanager
def silent(phase: str) -> Iterator[None]:
    """Have the sites of GONE fall silent in ``phase`` of the first round."""
    exchange, carry_out = SecureSites.exchange, SiteRunner.run
    begun: set[str] = set()

    def fewer(self: SecureSites, course: Course, now: str, letters: dict[str, bytes]) -> dict[str, bytes | Absence]:
        answers = exchange(self, course, now, letters)
        if now == phase and phase not in begun:
            begun.add(phase)
            answers |= {site: Absence(site, "lost", "silent") for site in GONE if site in answers}
        return answers

    def none(self: SiteRunner, course: Course, plan: Plan, site: str) -> Update | Absence:
        if phase == "train" and site in GONE and plan.round == 1 and plan.task == "train":
            return Absence(site, "lost", "silent")
        return carry_out(self, course, plan, site)

    with mock.patch.object(SecureSites, "exchange", fewer), mock.patch.object(SiteRunner, "run", none):
        yield


def adapter(run: Run) -> np.ndarray:
    params = Checkpoints(run.directory / "checkpoints", 2, "loss", "min").load().model.params
    return np.concatenate([np.asarray(params[name], np.float64).reshape(-1) for name in sorted(params)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "partition.sites=10",
            "train.steps=5",
            f"rounds={arguments.rounds}",
            "cohort.quorum=0.5",
            "evaluation.every=0",
            "baselines.base=false",
            "baselines.local=false",
            'model.adapter={method="lora", r=8}',
        ]
        masks = "secure_aggregation={weight_cap=1e5, metrics={}}"
        plain: dict[bool, np.ndarray] = {}
        print("| who drops out | largest difference to the plain sum | over the largest element | seconds a round |")
        print("|---|---|---|---|")
        for phase in PHASES:
            left_out = phase in ("advertise", "share", "receive", "train")
            if left_out not in plain:
                job = hansa.load(
                    EXAMPLE, [*common, "secure_aggregation=false", f"output.dir={folder}/plain-{left_out}"]
                )
                with silent("train" if left_out else "nobody"):
                    plain[left_out] = adapter(hansa.run(job))
            job = hansa.load(EXAMPLE, [*common, masks, f"output.dir={folder}/{phase}"])
            with silent(phase):
                done = hansa.run(job)
            apart = np.abs(adapter(done) - plain[left_out]).max()
            seconds = np.median([record["seconds"] for record in done.records])
            who = "nobody" if phase == "nobody" else f"3 of 10 in {phase}"
            share = apart / np.abs(plain[left_out]).max()
            print(f"| {who} | {apart:.2g} | {share:.1g} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
