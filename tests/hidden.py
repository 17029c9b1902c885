# SPDX-License-Identifier: Apache-2.0
"""What tests of secret sums over the network share: four sites, their job's model, and a server that meddles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from federations import Loopback
from hansa.core.config import Job
from hansa.core.storage import load_tree
from hansa.server import remote
from hansa.simulation.run import run
from hansa.transport.messages import JobView

SITES = ("s00", "s01", "s02", "s03")
METRICS = {"loss_sum": 1e6, "examples": 1e6}

Letters = Mapping[str, bytes]


def weights(folder: Path) -> np.ndarray:
    """Return what was trained, from a run's folder."""
    return load_tree(folder / "model" / "model.safetensors")["w"]


async def simulated(job: Job) -> np.ndarray:
    """Return what a simulation of a job trains."""
    return weights((await asyncio.to_thread(run, job)).directory)


async def equals_a_simulation(federation: Loopback, view: JobView, job: Job, within: float = 0.0) -> None:
    """Check that a job finished with a simulation's model: the same bits, or ``within`` of it."""
    assert view.line.state == "finished", view.line.error
    found = weights(federation.made.server / "jobs" / view.line.job)
    expected = await simulated(job)
    assert np.array_equal(found, expected) if not within else np.abs(found - expected).max() < within


async def attended(federation: Loopback, **rules: object) -> None:
    """Start all sites."""
    for site in SITES:
        federation.write(site, recipes=["toys:many"], **rules)
    await asyncio.gather(*map(federation.start, SITES))


def meddling(monkeypatch, change: Callable[[str, Letters], Letters]) -> None:
    """Have the server send ``change(phase, letters)`` in place of its letters."""
    exchange = remote.RemoteLine.exchange

    async def changed(self, plan, phase, letters):
        return await exchange(self, plan, phase, change(phase, letters))

    monkeypatch.setattr(remote.RemoteLine, "exchange", changed)
