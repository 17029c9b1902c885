# SPDX-License-Identifier: Apache-2.0
"""A site that did part of its work: averaged in where the algorithm allows it, left out by name where it does not."""

import contextlib

import numpy as np
import pytest

import toys
from hansa.core.values import Model, Snapshot
from hansa.simulation.local import Local
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather


async def first_record(name, directory):
    job = toys.job(rounds=1, strategy=name, evaluation={"every": 0}, recipe={"faults": {"s1:1": "partial"}})
    async with Local(job, directory) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy)
        strategy, _ = course.pieces()
        model = Model.start(await engine.initial())
        start = Snapshot(0, model, strategy.init(model))
        async with contextlib.aclosing(scatter_gather(job, strategy, engine.cohort(course), start)) as rounds:
            return await anext(rounds)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
async def test_a_mean_of_whole_work_leaves_the_site_out_and_says_why(name, tmp_path):
    record = await first_record(name, tmp_path)
    assert record.accepted == ("s0", "s2")
    assert [(a.site, a.kind) for a in record.absent] == [("s1", "rejected")]
    assert "40%" in record.absent[0].reason
    assert name in record.absent[0].reason


def moved(site, steps, mu):
    """Return where ``steps`` proximal steps from 0 end."""
    a, b = toys.CURVATURES[site], toys.TARGETS[site]
    return a * b / (a + mu) * (1 - (1 - toys.LR * (a + mu)) ** steps)


async def test_fedprox_averages_it_in(tmp_path):
    record = await first_record({"name": "fedprox", "mu": 0.5}, tmp_path)
    assert record.accepted == toys.SITES
    steps = {"s0": toys.STEPS, "s1": 2, "s2": toys.STEPS}
    n = toys.EXAMPLES
    expected = sum(n[s] * moved(s, steps[s], 0.5) for s in steps) / sum(n.values())
    np.testing.assert_allclose(record.model.params["w"], expected, rtol=1e-12)


async def test_scaffold_computes_the_control_from_the_steps_made(tmp_path):
    record = await first_record("scaffold", tmp_path)
    assert record.accepted == toys.SITES
    steps = {"s0": toys.STEPS, "s1": 2, "s2": toys.STEPS}
    n = toys.EXAMPLES
    control = sum(n[s] * -moved(s, steps[s], 0.0) / (steps[s] * toys.LR) for s in steps) / sum(n.values())
    np.testing.assert_allclose(record.state["control"]["w"], control, rtol=1e-12)
