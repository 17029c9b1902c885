# SPDX-License-Identifier: Apache-2.0
"""From ``engine.name`` in the job to the engine. Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.errors import JobError
from hansa.runs.engine import Engine

_ENGINES = {
    "local": "hansa.simulation.local:Local",
    "processes": "hansa.simulation.processes:Processes",
    "batched": "hansa.simulation.batched:Batched",
}


def open_engine(job: Job, directory: Path, program: Program | None = None) -> Engine:
    """Return the engine that the job names, not yet entered.

    Args:
        job: the resolved job.
        directory: the run's folder, for memories, mail, spooled updates and logs.
        program: the training code as a value; built from the job's recipe by default.

    Raises:
        JobError: a program was given as a value to an engine whose workers have to build it themselves.
    """
    if job.engine.name == "processes" and program is not None:
        raise JobError(
            "Engine 'processes' builds the program anew in every worker, so it takes no finished one. "
            "Name it in the job as recipe = 'module:builder', or use engine.name = 'local'.",
            job=job.name,
        )
    module, _, name = _ENGINES[job.engine.name].partition(":")
    kind = getattr(importlib.import_module(module), name)
    engine: Engine = kind(job, directory) if program is None else kind(job, directory, program)
    return engine
