# SPDX-License-Identifier: Apache-2.0
"""A job carried out in simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.core.strategy import Strategy
from hansa.runs import carrier
from hansa.runs.carrier import Sink
from hansa.runs.progress import Progress, Silent
from hansa.runs.run import Run, create, resume_from
from hansa.simulation.engines import open_engine


def run(
    job: Job,
    *,
    resume: bool | str = False,
    progress: Progress | None = None,
    program: Program | None = None,
    strategy: Strategy | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """Carry ``job`` out and return the finished run.

    Args:
        job: what to do.
        resume: go on with the last unfinished run of the same job (True), or with the run of that name.
        progress: shows what happens; nothing by default.
        program: training code in place of the job's recipe (engines in this process only).
        strategy: an algorithm in place of the job's.
        sinks: further observers of rounds.

    Raises:
        HansaError: of the kind that says what went wrong; finished rounds are on disk.
    """
    return asyncio.run(carry_out(job, resume, progress or Silent(), program, strategy, sinks))


async def carry_out(
    job: Job,
    resume: bool | str,
    progress: Progress,
    program: Program | None = None,
    strategy: Strategy | None = None,
    sinks: Sequence[Sink] = (),
) -> Run:
    """Do what :func:`run` does, inside a running event loop."""
    run = Run(resume_from(job, resume) if resume else create(job))
    progress.say(f"Run {run.id} in {run.directory}")
    engine = partial(open_engine, job, program=program)
    await carrier.carry_out(run, engine, progress, strategy, sinks, simulated=True)
    return run
