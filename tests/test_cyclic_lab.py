# SPDX-License-Identifier: Apache-2.0
"""Cyclic weight transfer over the network: the simulation's bits, whoever is killed when, and nothing to be read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

import toys
from federations import loopback
from hansa.core.storage import load_tree
from hansa.simulation.run import run

SITES = ("s0", "s1", "s2")

pytestmark = pytest.mark.timeout(120)


def job(**values):
    recipe = {"name": "toys:build", "size": 40_000, "varied": True, **values.pop("recipe", {})}
    return toys.job(**{"rounds": 2, "workflow": "cyclic", "recipe": recipe, "cohort": {"sites": SITES}, **values})


def weights(folder: Path) -> np.ndarray:
    return load_tree(folder / "model" / "model.safetensors")["w"]


async def simulated(tmp_path: Path, **values) -> np.ndarray:
    asked = job(output={"dir": str(tmp_path / "simulated")}, **values)
    return weights((await asyncio.to_thread(run, asked)).directory)


async def attended(federation) -> None:
    for site in SITES:
        federation.write(site)
    await asyncio.gather(*map(federation.start, SITES))


@pytest.mark.parametrize("size", [4, 400_000])
async def test_the_model_is_that_of_a_simulation(tmp_path, size):
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(recipe={"size": size}))
        assert view.line.state == "finished", view.line.error
        found = weights(federation.made.server / "jobs" / view.line.job)
    assert np.array_equal(found, await simulated(tmp_path, recipe={"size": size}))
    for record in view.records:
        assert record["accepted"] == list(SITES)
