# SPDX-License-Identifier: Apache-2.0
"""What a workflow is: an async generator over the two ports, as a value with its traits; and where its work is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import Cohort, Peers
from hansa.core.strategy import Strategy
from hansa.core.values import RoundRecord, Snapshot

P = ParamSpec("P")
T = TypeVar("T")

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


async def aside(num_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function``; where it moves many bytes, in a thread, so that what waits on the event loop goes on.

    A small one is done at once: to hand it to a thread and be woken by it takes longer than the work.
    """
    if num_bytes <= trees.LARGE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
