# SPDX-License-Identifier: Apache-2.0
"""The participation policy of scatter-gather, on the local engine."""

import contextlib
import dataclasses

import numpy as np
import pytest

import toys
from hansa.core.values import Model, Snapshot
from hansa.errors import QuorumError
from hansa.simulation.local import Local
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import sample, scatter_gather, wanted


async def records(job, directory, program=None, start=None):
    """Run ``job`` and return all records."""
    directory.mkdir(exist_ok=True)
    async with Local(job, directory, program or toys.build(job)) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy, tuple(job.filters))
        strategy, _ = course.pieces()
        if start is None:
            model = Model.start(await engine.initial())
            start = Snapshot(0, model, strategy.init(model))
        rounds = scatter_gather(job, strategy, engine.cohort(course), start, directory)
        async with contextlib.aclosing(rounds):
            return [record async for record in rounds]


async def test_fedavg_ends_at_its_closed_form(tmp_path):
    done = await records(toys.job(rounds=200, evaluation={"every": 0}), tmp_path)
    np.testing.assert_allclose(done[-1].model.params["w"], toys.fixed_point_fedavg(), rtol=1e-12)
    assert abs(toys.fixed_point_fedavg() - 45 / 17) > 0.05, "the bias must be there to be found"


async def test_integer_buffers_stay_what_they_were(tmp_path):
    done = await records(toys.job(), tmp_path)
    assert done[-1].model.params["count"].dtype == np.int64
    assert done[-1].model.params["count"].tolist() == [0]


@pytest.mark.parametrize(("fault", "kind"), [("raise", "lost"), ("data", "refused"), ("nan", "refused")])
async def test_a_site_that_fails_is_named_and_outlived(tmp_path, fault, kind):
    job = toys.job(recipe={"faults": {"s1:2": fault}})
    done = await records(job, tmp_path)
    assert [len(record.accepted) for record in done] == [3, 2, 3, 3]
    (absence,) = done[1].absent
    assert (absence.site, absence.kind) == ("s1", kind)
    assert absence.reason
    only_two = await records(toys.job(rounds=2), tmp_path / "two", toys.Quadratics(faults={("s1", 2): "data"}))
    np.testing.assert_array_equal(done[1].model.params["w"], only_two[1].model.params["w"])


async def test_below_quorum_the_job_ends_and_names_everyone(tmp_path):
    job = toys.job(recipe={"faults": {"s1:2": "raise", "s2:2": "nan"}}, cohort={"quorum": 2})
    with pytest.raises(QuorumError) as caught:
        await records(job, tmp_path)
    message = str(caught.value)
    assert "s1" in message
    assert "s2" in message
    assert "on fire" in message
    assert caught.value.round == 2


async def test_partial_work_is_rejected_by_fedavg_and_taken_by_fedprox(tmp_path):
    faults = {"s0:1": "partial"}
    averaged = await records(toys.job(rounds=1, recipe={"faults": faults}), tmp_path / "a")
    proximal = await records(
        toys.job(rounds=1, strategy={"name": "fedprox", "mu": 0.1}, recipe={"faults": faults}), tmp_path / "b"
    )
    assert averaged[0].accepted == ("s1", "s2")
    assert averaged[0].absent[0].kind == "rejected"
    assert "40%" in averaged[0].absent[0].reason
    assert proximal[0].accepted == toys.SITES


async def test_a_late_update_is_dropped_or_discounted(tmp_path):
    slow = {"delay_s": {"s2": 0.05}}
    dropped = await records(toys.job(rounds=2, recipe=slow, cohort={"deadline_s": 0.2}), tmp_path / "a")
    assert [record.accepted for record in dropped] == [("s0", "s1")] * 2
    assert [a.kind for a in dropped[0].absent] == ["late"]
    # s2 answers round 1 late and is not asked in round 2: then its update is folded in, with 1/sqrt(2).
    seed = next(
        seed
        for seed in range(500)
        if "s2" in sample(toys.SITES, 2, seed, 1) and "s2" not in sample(toys.SITES, 2, seed, 2)
    )
    taken = await records(
        toys.job(
            rounds=2,
            seed=seed,
            recipe=slow,
            cohort={"deadline_s": 0.2, "sample": 2, "quorum": 1, "late": "accept"},
        ),
        tmp_path / "b",
    )
    assert "s2" not in taken[0].accepted
    assert "s2" in taken[1].accepted
    start = taken[0].model.params["w"][0]
    moved, weights = 0.0, 0.0
    for site in taken[1].accepted:
        stale = site == "s2"
        began = 0.0 if stale else start
        shrink = (1 - toys.LR * toys.CURVATURES[site]) ** toys.STEPS
        step = (toys.TARGETS[site] - began) * (1 - shrink)
        weight = toys.EXAMPLES[site] * (2**-0.5 if stale else 1.0)
        moved += weight * step
        weights += weight
    np.testing.assert_allclose(taken[1].model.params["w"], start + moved / weights, rtol=1e-12)


async def test_each_round_asks_a_sample_that_depends_on_the_seed_alone(tmp_path):
    job = toys.job(rounds=8, cohort={"sample": 2})
    first = [record.asked for record in await records(job, tmp_path / "a")]
    second = [record.asked for record in await records(job, tmp_path / "b")]
    assert first == second
    assert all(len(asked) == 2 for asked in first)
    assert len(set(first)) > 1
    other = [record.asked for record in await records(toys.job(rounds=8, cohort={"sample": 2}, seed=1), tmp_path / "c")]
    assert other != first


def test_sampling_is_uniform():
    counts = dict.fromkeys("abcdefghij", 0)
    for number in range(2000):
        for site in sample(list(counts), 0.3, 0, number):
            counts[site] += 1
    # 600 expected each, standard deviation 20.5
    assert all(520 < count < 680 for count in counts.values())


def test_an_amount_is_a_fraction_or_a_number():
    assert [wanted(x, 10) for x in (0.01, 0.25, 1.0, 1, 2, 10)] == [1, 3, 10, 1, 2, 10]


async def test_scaffold_forgets_what_was_not_accepted(tmp_path):
    # s1's round-2 work never reaches the server: in round 3 it must go on from its control of round 1.
    program = toys.Quadratics(faults={("s1", 2): "nan"})
    job = toys.job(rounds=3, strategy="scaffold")
    done = await records(job, tmp_path, program)
    assert done[1].acknowledged == {"s0": 2, "s1": 1, "s2": 2}
    assert done[2].acknowledged == {"s0": 3, "s1": 3, "s2": 3}


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "fedadam", "fedavgm"])
async def test_going_on_from_a_snapshot_gives_the_same_bits(tmp_path, strategy):
    job = toys.job(rounds=6, strategy=strategy)
    whole = await records(job, tmp_path / "whole")
    half = await records(toys.job(rounds=3, strategy=strategy), tmp_path / "half")
    last = half[-1]
    snapshot = Snapshot(3, last.model, last.state, last.acknowledged)
    rest = await records(job, tmp_path / "half", start=snapshot)
    assert [record.round for record in rest] == [4, 5, 6]
    np.testing.assert_array_equal(rest[-1].model.params["w"], whole[-1].model.params["w"])


class Forger:
    """A cohort whose site s1 claims to have started from a model that doesn't exist yet."""

    def __init__(self, cohort):
        self._cohort = cohort
        self.sites = cohort.sites
        self.late = cohort.late
        self.summarise = cohort.summarise

    async def ask(self, plan, sites):
        async for reply in self._cohort.ask(plan, sites):
            forged = plan.task == "train" and getattr(reply, "site", "") == "s1"
            yield dataclasses.replace(reply, version=plan.version + 1) if forged else reply


async def test_an_update_from_the_future_is_rejected(tmp_path):
    job = toys.job(rounds=1)
    async with Local(job, tmp_path, toys.build(job)) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy)
        strategy, _ = course.pieces()
        model = Model.start(await engine.initial())
        start = Snapshot(0, model, strategy.init(model))
        done = [r async for r in scatter_gather(job, strategy, Forger(engine.cohort(course)), start, tmp_path)]
    assert done[0].accepted == ("s0", "s2")
    assert done[0].absent[0].kind == "rejected"
    assert "version 1" in done[0].absent[0].reason
