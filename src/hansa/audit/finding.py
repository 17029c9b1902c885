# SPDX-License-Identifier: Apache-2.0
"""What an attack is, and what it found.

An attack is a function ``attack(subject, generator, progress) -> Finding | Skipped``, named in the table ``attacks`` of
:mod:`hansa.registry`. It gets at what an adversary sees through :class:`hansa.audit.subject.Subject` alone, which
carries the job out with its own filters, clip, noise and masks, and it draws from ``generator`` alone, so that a seed
repeats it but for protective draws.

========  ==============================================================================================================
holds     the attack does no better than its baseline, or within what was promised
leaks     it does better than its baseline, and nothing was promised against this adversary
fails     a promise is broken: a measure is above its bound; ``hansa audit privacy`` then ends with AuditError's code
========  ==============================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hansa.runs.progress import Progress

if TYPE_CHECKING:
    from hansa.audit.subject import Subject

Verdict = Literal["holds", "leaks", "fails"]


@dataclass(frozen=True)
class Measure:
    """One number that an attack gives.

    Attributes:
        name: what is measured.
        value: what the attack reached.
        baseline: what guessing gives, without anything seen; None where that has no meaning.
        low, high: the value's confidence interval, 95 %; None where none was made.
        bound: what it must not exceed, by what the job promises; None where nothing is promised.
        unit: of all these numbers; empty for none.
    """

    name: str
    value: float
    baseline: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    unit: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether the value is above its bound."""
        return self.bound is not None and self.value > self.bound


@dataclass(frozen=True)
class Picture:
    """A plot of the report.

    Attributes:
        title: what it shows.
        note: how to read it, in a sentence.
        draw: draws into matplotlib axes; series in :data:`hansa.sinks.plots.HUES`, which fit light and dark pages.
        height: inches; the width is 5.6.
    """

    title: str
    note: str
    draw: Callable[[Any], None]
    height: float = 2.9


@dataclass(frozen=True)
class Finding:
    """What an attack found.

    Attributes:
        attack: its name, as in the report.
        adversary: who could carry it out: the server, another site, whoever gets the model.
        setting: one line: what was attacked, and how it was protected.
        measures: the numbers, the telling one first.
        verdict: see the module.
        says: one or two plain sentences for a data-protection officer.
        pictures: plots.
        seconds: how long it took.
    """

    attack: str
    adversary: str
    setting: str
    measures: tuple[Measure, ...]
    verdict: Verdict
    says: str
    pictures: tuple[Picture, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        broken = any(measure.is_broken for measure in self.measures)
        assert broken == (self.verdict == "fails"), "it fails if a measure is above its bound, and only then"


@dataclass(frozen=True)
class Skipped:
    """An attack that does not apply to the job, and why; reports show it beside the findings."""

    attack: str
    because: str


Attack = Callable[["Subject", np.random.Generator, Progress], "Finding | Skipped"]
