# SPDX-License-Identifier: Apache-2.0
"""What a workflow is: an async generator over the two ports, as a value with its traits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import Cohort, Peers
from hansa.core.strategy import Strategy
from hansa.core.values import RoundRecord, Snapshot

Rounds = Callable[[Job, Strategy, Cohort, Peers, Snapshot, Path | None], AsyncGenerator[RoundRecord, None]]


@dataclass(frozen=True)
class Workflow:
    """Who talks to whom.

    Attributes:
        name: as in the job.
        traits: what the fit check needs to know.
        rounds: yields a record of each round after the snapshot's, up to the job's last.
    """

    name: str
    traits: frozenset[Trait]
    rounds: Rounds
