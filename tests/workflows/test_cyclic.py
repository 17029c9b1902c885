# SPDX-License-Identifier: Apache-2.0
"""The cyclic workflow: the model goes from site to site through their mailboxes."""

import numpy as np
import pytest

import toys
from hansa.core.storage import load_tree
from hansa.core.values import Model, Snapshot
from hansa.errors import FitError, QuorumError
from hansa.simulation.local import Local
from hansa.simulation.run import run
from hansa.workers.runner import Course
from hansa.workflows.cyclic import cyclic


async def records(job, directory):
    async with Local(job, directory, toys.build(job)) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy)
        strategy, _ = course.pieces()
        model = Model.start(await engine.initial())
        start = Snapshot(0, model, strategy.init(model))
        return [r async for r in cyclic(job, strategy, engine.cohort(course), engine.peers, start)]


def by_hand(rounds, skipped=()):
    """Return where the model is after going through all sites, ``skipped`` (site, round) pairs left out."""
    w = 0.0
    for number in range(1, rounds + 1):
        for site in toys.SITES:
            if (site, number) not in skipped:
                shrink = (1 - toys.LR * toys.CURVATURES[site]) ** toys.STEPS
                w = toys.TARGETS[site] + shrink * (w - toys.TARGETS[site])
    return w


async def test_the_model_goes_round(tmp_path):
    done = await records(toys.job(), tmp_path)
    assert [r.round for r in done] == [1, 2, 3, 4]
    np.testing.assert_allclose(done[-1].model.params["w"], by_hand(4), rtol=1e-12)
    assert set(done[-1].site_metrics) == set(toys.SITES)


async def test_a_site_that_fails_is_passed_over(tmp_path):
    done = await records(toys.job(recipe={"faults": {"s1:2": "raise", "s2:3": "nan"}}), tmp_path)
    assert done[1].absent[0].site == "s1"
    assert done[2].absent[0].site == "s2"
    np.testing.assert_allclose(done[-1].model.params["w"], by_hand(4, {("s1", 2), ("s2", 3)}), rtol=1e-12)


async def test_below_quorum_it_ends(tmp_path):
    faults = {"s0:1": "raise", "s1:1": "data"}
    with pytest.raises(QuorumError, match="s1: The site has lost its data"):
        await records(toys.job(recipe={"faults": faults}), tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"strategy": "scaffold"}, "scaffold"),
        ({"strategy": "fedadam"}, "fedadam"),
        ({"filters": [{"name": "clip", "max_norm": 1.0}]}, "clip"),
        ({"cohort": {"deadline_s": 1.0}}, "deadline"),
        ({"cohort": {"deadline_s": 1.0, "late": "accept", "sample": 2}}, "late"),
    ],
)
def test_what_a_relay_would_drop_is_refused(tmp_path, change, named):
    with pytest.raises(FitError, match=named):
        run(toys.job(workflow="cyclic", output={"dir": str(tmp_path)}, **change))


def test_a_relay_runs_from_a_job(tmp_path):
    done = run(toys.job(workflow="cyclic", output={"dir": str(tmp_path)}))
    params = load_tree(done.model_directory / "model.safetensors")
    np.testing.assert_allclose(params["w"], by_hand(4), rtol=1e-12)


async def test_mail_does_not_pile_up_over_rounds(tmp_path):
    sizes = []
    for rounds in (2, 8):
        folder = tmp_path / str(rounds)
        await records(toys.job(rounds=rounds), folder)
        sizes.append(len(list((folder / "mail").rglob("*.hansa"))))
    assert sizes[0] == sizes[1] > 0
