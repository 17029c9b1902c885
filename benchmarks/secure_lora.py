# SPDX-License-Identifier: Apache-2.0
"""A federated LoRA fine-tune under secure aggregation, beside the plain sum; three of ten sites drop out in each phase.

python benchmarks/secure_lora.py [--rounds 2]     in simulation: "drop out" is a site's silence from that phase on
python benchmarks/secure_lora.py --lab [--json]   deployed: a server and ten agents, each with its worker, mutual TLS

The job is examples/quickstart.toml with a LoRA adapter and ten sites. Up to the upload a site that drops out in the
first round is not in the sum, and the plain run that is compared leaves it out too; from the vote on it is, and the
others unmask it.

Deployed, there is a job of one round for each phase. Three agents and their workers are killed (SIGKILL) once the
server's database says that all others have answered in that phase and these three have not: each is held by the lock of
the state that it is about to write (tests/phases.py). The adapter is compared with those of two simulations over the
same survivors: the plain float32 sum, and the ring's elements added up without masks, which must give the same bits.
The bound is of the ring's rounding, and of float32's in both. Exit code 1 where a round is not what it has to be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import hansa
from hansa.core.config import Job, SecureAggregationSection
from hansa.core.values import Absence, Plan, Update
from hansa.lab import SERVER, Lab, lab
from hansa.secagg.ranges import bounds_of, ring_of
from hansa.sinks.checkpoint import Checkpoints
from hansa.workers.runner import Course, SecureSites, SiteRunner

ROOT = Path(__file__).parent.parent
NUM_SITES = 10
GONE = ("site-02", "site-05", "site-09")
PHASES = ("nobody", "advertise", "share", "receive", "train", "vote", "reveal")
LEFT_OUT = PHASES[1:5]
"""Who drops out in these is not in the sum."""
MASKS: dict[str, Any] = {"weight_cap": 1e5, "metrics": {}}


def job_of(root: Path, name: str, masks: Any, rounds: int = 1) -> Job:
    """Return the job whose runs go to ``root/name``; its text is in ``root/text``, as the checkout may change."""
    options = [
        f"partition.sites={NUM_SITES}",
        "train.steps=5",
        f"rounds={rounds}",
        "cohort.quorum=0.5",
        "evaluation.every=0",
        "baselines.base=false",
        "baselines.local=false",
        'model.adapter={method="lora", r=8}',
        f"data.train={root / 'text'}/*.md",
    ]
    job = hansa.load(ROOT / "examples" / "quickstart.toml", options)
    section = SecureAggregationSection.model_validate(masks)
    output = job.output.model_copy(update={"dir": str(root / name)})
    return job.model_copy(update={"secure_aggregation": section, "output": output})


def adapter(directory: Path) -> dict[str, np.ndarray]:
    """Return the adapter after the last round."""
    params = Checkpoints(directory / "checkpoints", 2, "loss", "min").load().model.params  # type: ignore[union-attr]
    return {name: np.asarray(params[name]) for name in sorted(params)}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in other)


@contextmanager
def silent(phase: str) -> Iterator[list[float]]:
    """Have the sites of GONE fall silent in ``phase`` of the first round; note the weights of trained updates."""
    exchange, carry_out = SecureSites.exchange, SiteRunner.run
    begun: set[str] = set()
    weights: list[float] = []

    def fewer(self: SecureSites, course: Course, now: str, letters: dict[str, bytes]) -> dict[str, bytes | Absence]:
        answers = exchange(self, course, now, letters)  # type: ignore[arg-type]
        if now == phase and phase not in begun:
            begun.add(phase)
            answers |= {site: Absence(site, "lost", "silent") for site in GONE if site in answers}
        return answers

    def none(self: SiteRunner, course: Course, plan: Plan, site: str) -> Update | Absence:
        if phase == "train" and site in GONE and plan.round == 1 and plan.task == "train":
            return Absence(site, "lost", "silent")
        update = carry_out(self, course, plan, site)
        if isinstance(update, Update) and plan.task == "train":
            weights.append(update.weight)
        return update

    with mock.patch.object(SecureSites, "exchange", fewer), mock.patch.object(SiteRunner, "run", none):
        yield weights


def simulated(root: Path, rounds: int) -> None:
    plain: dict[bool, dict[str, np.ndarray]] = {}
    print("| who drops out | largest difference to the plain sum | over the largest element | seconds a round |")
    print("|---|---|---|---|")
    for phase in PHASES:
        left_out = phase in LEFT_OUT
        if left_out not in plain:
            with silent("train" if left_out else "nobody"):
                plain[left_out] = adapter(hansa.run(job_of(root, f"plain-{left_out}", False, rounds)).directory)
        with silent(phase):
            done = hansa.run(job_of(root, phase, MASKS, rounds))
        difference = apart(adapter(done.directory), plain[left_out])
        seconds = np.median([record["seconds"] for record in done.records])
        who = "nobody" if phase == "nobody" else f"3 of 10 in {phase}"
        largest = max(np.abs(values).max() for values in plain[left_out].values())
        print(f"| {who} | {difference:.2g} | {difference / largest:.1g} | {seconds:.2f} |", flush=True)


@dataclass(frozen=True)
class Expected:
    """What the survivors' sum has to be.

    Attributes:
        plain: the adapter by a plain sum.
        ring: by the ring's elements, added up without masks.
        step: of the ring.
        bound: how far the plain sum and a sum in the ring can be apart in an element of the adapter.
    """

    plain: dict[str, np.ndarray]
    ring: dict[str, np.ndarray]
    step: float
    bound: float

    @classmethod
    def of(cls, root: Path, left_out: bool) -> Expected:
        """Work it out by two simulations, whose sites of GONE are silent if they are to be left out."""
        with silent("train" if left_out else "nobody") as weights:
            plain = adapter(hansa.run(job_of(root, f"plain-{left_out}", False)).directory)
        with silent("train" if left_out else "nobody"):
            open_job = job_of(root, f"ring-{left_out}", {**MASKS, "by_default": True})
            ring = adapter(hansa.run(open_job).directory)
        section = open_job.secure_aggregation
        assert section is not None, "the job has masks"
        shapes = {"delta": {name: values.shape for name, values in plain.items()}}
        fields = ring_of(section, bounds_of(section), NUM_SITES, shapes, {"delta": True}).fields
        step = max(2.0**-field.exponent for field in fields if field.part == "delta")
        largest = max(float(np.abs(values).max()) for values in plain.values())
        rounding = len(weights) * step / 2 / sum(weights) + (len(weights) + 4) * largest * 2.0**-24
        return cls(plain, ring, step, rounding)


@dataclass(frozen=True)
class Row:
    """What became of one deployed round."""

    phase: str
    killed: int
    survivors: int
    difference: float
    bound: float
    step: float
    same_bits: bool
    seconds: float
    problem: str


def deployed(root: Path, lease_s: float, told: bool) -> list[Row]:
    expected = {left_out: Expected.of(root, left_out) for left_out in (False, True)}
    job = job_of(root, "runs", MASKS)
    rows = []
    if told:
        print(
            "| phase | killed | in the sum | greatest difference to the plain sum | its bound | step of the ring | "
            "bits of the sum without masks | seconds |\n|---|---|---|---|---|---|---|---|"
        )
    with lab(job, directory=root / "lab", settings={"lease_s": lease_s}) as federation:
        for phase in PHASES:
            rows.append(row := round_of(federation, phase, expected[phase in LEFT_OUT]))
            if told:
                print(
                    f"| {row.phase} | {row.killed} | {row.survivors} | {row.difference:.2g} | {row.bound:.2g} | "
                    f"{row.step:.2g} | {'the same' if row.same_bits else 'others'} | {row.seconds:.1f} |",
                    flush=True,
                )
    return rows


def round_of(federation: Lab, phase: str, expected: Expected) -> Row:
    """Carry out one round, its three sites killed in ``phase``; they are started again after it."""
    from phases import Led, kill

    killed = () if phase == "nobody" else GONE
    id = federation.federation.submit(federation.job)
    if killed:
        others = [site for site in federation.sites if site not in GONE]
        with closing(Led(federation, id, phase, GONE, others[:2])) as led:
            led.lead()
            kill(federation, *GONE)
    view = federation.federation.wait(id)
    if view.line.state != "finished":
        raise SystemExit(f"{phase}: the job {view.line.state}: {view.line.error}")
    for site in killed:
        federation.start(site)
    (record,) = view.records
    survivors = sorted(set(federation.sites) - (set(GONE) if phase in LEFT_OUT else set()))
    found = adapter(federation.folder(SERVER) / "jobs" / id)
    difference = apart(found, expected.plain)
    same_bits = all(np.array_equal(found[name], expected.ring[name]) for name in expected.ring)
    problems = {
        f"in the sum are {record['accepted']}": record["accepted"] != survivors,
        f"absent are {record['absent']}": {absence["site"] for absence in record["absent"]} != set(killed),
        "the difference is above its bound": not difference <= expected.bound,
        "the bits are not those of the sum without masks": not same_bits,
    }
    problem = "; ".join(text for text, holds in problems.items() if holds)
    return Row(
        phase,
        len(killed),
        len(record["accepted"]),
        difference,
        expected.bound,
        expected.step,
        same_bits,
        record["seconds"],
        problem,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lab", action="store_true")
    parser.add_argument("--lease-s", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "text").mkdir()
        for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
            shutil.copy(path, root / "text")
        if not arguments.lab:
            simulated(root, arguments.rounds)
            return
        sys.path.append(str(ROOT / "tests"))
        rows = deployed(root, arguments.lease_s, not arguments.json)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    for row in rows:
        if row.problem:
            print(f"{row.phase}: {row.problem}", file=sys.stderr)
    sys.exit(any(row.problem for row in rows))


if __name__ == "__main__":
    main()
