# SPDX-License-Identifier: Apache-2.0
"""An audit: attacks on one job, one after another, and what they come to together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hansa.version
from hansa import registry
from hansa.audit.finding import Attack, Finding, Skipped, Verdict
from hansa.audit.subject import Subject
from hansa.core import rng
from hansa.runs.progress import Progress
from hansa.runs.run import now

FORMAT = 1


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        subject: what was attacked.
        seed: what the attacks' own draws come from; protective ones never do.
        findings: of the attacks that apply, in order.
        skipped: those that don't.
        seconds: how long all took.
    """

    subject: Subject
    seed: int
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict | None:
        """The worst one; None where no attack applied."""
        found = {finding.verdict for finding in self.findings}
        worst: tuple[Verdict, ...] = ("fails", "leaks", "holds")
        return next((verdict for verdict in worst if verdict in found), None)

    @property
    def broken(self) -> list[str]:
        """A line for every measure that is above its bound."""
        return [
            f"{finding.attack}: {measure.name} {measure.value:.3g}{measure.unit}, promised {measure.bound:.3g}"
            for finding in self.findings
            for measure in finding.measures
            if measure.is_broken
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all but the pictures, as JSON types; a number that is not finite is null."""
        subject = self.subject
        return {
            "format": FORMAT,
            "run": None if subject.run is None else subject.run.id,
            "job": subject.job.model_dump(mode="json"),
            "hansa": hansa.version.VERSION,
            "created": now(),
            "seed": self.seed,
            "seconds": self.seconds,
            "verdict": self.verdict,
            "privacy": None if subject.plan is None else subject.plan.as_json(),
            "findings": [
                {
                    "attack": finding.attack,
                    "adversary": finding.adversary,
                    "setting": finding.setting,
                    "verdict": finding.verdict,
                    "says": finding.says,
                    "seconds": finding.seconds,
                    "measures": [asdict(measure) for measure in finding.measures],
                }
                for finding in self.findings
            ],
            "skipped": [asdict(item) for item in self.skipped],
        }


def carry_out(subject: Subject, attacks: Sequence[str], seed: int, progress: Progress) -> Audit:
    """Carry attacks out, by their names in the registry.

    Raises:
        JobError: no attack has such a name.
        HansaError: an attack could not be carried out to its end.
    """
    begun = time.perf_counter()
    chosen: list[tuple[str, Attack]] = [(name, registry.load("attacks", name)) for name in attacks]
    results = [attack(subject, rng.generator(seed, "audit", name), progress) for name, attack in chosen]
    return Audit(
        subject,
        seed,
        tuple(found for found in results if isinstance(found, Finding)),
        tuple(found for found in results if isinstance(found, Skipped)),
        time.perf_counter() - begun,
    )
