# SPDX-License-Identifier: Apache-2.0
"""Robust rules in jobs: with every strategy of one part, in every engine, with bounds, quorums and refusals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import toys
from hansa.cli import checking
from hansa.core import tree as trees
from hansa.core.fit import Piece, Trait, conflicts
from hansa.core.values import Model, Snapshot, Update
from hansa.errors import FitError, JobError, QuorumError
from hansa.robust.coordinates import median
from hansa.robust.defend import robust
from hansa.simulation.local import Local
from hansa.simulation.run import run
from hansa.strategies.fedavg import fedavg
from hansa.workers.runner import Course
from hansa.workflows.scatter_gather import scatter_gather
from quadratics import data, federation

MEDIAN = {"rule": "median", "malicious": 1}


def job(strategy="fedavg", rule=MEDIAN, **values):
    options = strategy if isinstance(strategy, dict) else {"name": strategy}
    return toys.job(strategy={**options, "robust": rule}, **values)


def step(site, start=0.0):
    """Return the update of one site of ``toys`` after its local steps, unweighed."""
    shrink = (1 - toys.LR * toys.CURVATURES[site]) ** toys.STEPS
    return (toys.TARGETS[site] - start) * (1 - shrink)


class Liar:
    """A cohort whose site s1 sends its update times a factor."""

    def __init__(self, cohort, factor):
        self._cohort, self._factor = cohort, factor
        self.sites, self.late, self.summarise = cohort.sites, cohort.late, cohort.summarise

    async def ask(self, plan, sites):
        async for reply in self._cohort.ask(plan, sites):
            if plan.task == "train" and reply.site == "s1" and isinstance(reply, Update):
                delta = {name: leaf * self._factor for name, leaf in reply.parts["delta"].items()}
                reply = dataclasses.replace(reply, parts={"delta": delta})
            yield reply


async def records(job, directory, factor=1.0):
    directory.mkdir(exist_ok=True)
    async with Local(job, directory, toys.build(job)) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy, tuple(job.filters))
        strategy, _ = course.pieces()
        model = Model.start(await engine.initial())
        start = Snapshot(0, model, strategy.init(model))
        cohort = Liar(engine.cohort(course), factor)
        return [record async for record in scatter_gather(job, strategy, cohort, start, directory)]


async def test_one_round_is_the_rule_of_updates_that_nobody_weighed(tmp_path):
    (done,) = await records(job(rounds=1), tmp_path)
    expected = float(np.median([step(site) for site in toys.SITES]))
    np.testing.assert_allclose(done.model.params["w"], expected, rtol=1e-12)
    (mean,) = await records(job(rule={"rule": "mean", "malicious": 1, "max_norm": 1e3}, rounds=1), tmp_path / "mean")
    expected = float(np.mean([step(site) for site in toys.SITES]))
    np.testing.assert_allclose(mean.model.params["w"], expected, rtol=1e-12)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
async def test_every_strategy_of_one_part_stands_a_lie(tmp_path, strategy):
    ends = {}
    for factor in (1.0, -1e6):
        done = await records(job(strategy, rounds=5), tmp_path / str(factor), factor)
        ends[factor] = float(done[-1].model.params["w"][0])
        assert all(record.accepted == toys.SITES for record in done)
    assert abs(ends[1.0] - ends[-1e6]) < 2
    assert abs(ends[-1e6]) < 5


async def test_a_large_model_takes_the_same_steps_to_the_bit(tmp_path, monkeypatch):
    rule = {"rule": "geometric-median", "malicious": 1, "max_norm": 0.5}
    small = await records(job("fedadam", rule, rounds=3), tmp_path / "small")
    monkeypatch.setattr(trees, "LARGE", 0)
    large = await records(job("fedadam", rule, rounds=3), tmp_path / "large")
    for one, other in zip(small, large, strict=True):
        assert np.asarray(one.model.params["w"]).tobytes() == np.asarray(other.model.params["w"]).tobytes()


async def test_sites_clip_and_the_server_rejects_who_does_not(tmp_path):
    rule = {**MEDIAN, "malicious": 0, "max_norm": 0.25}
    (honest,) = await records(job(rule=rule, rounds=1), tmp_path / "honest")
    assert honest.accepted == toys.SITES
    np.testing.assert_allclose(np.linalg.norm(honest.model.params["w"]), 0.25, rtol=1e-6)
    (done,) = await records(job(rule=rule, rounds=1), tmp_path / "lying", factor=3.0)
    assert done.accepted == ("s0", "s2")
    (absence,) = done.absent
    assert (absence.site, absence.kind) == ("s1", "rejected")
    assert "norm is 0.75; no site's may exceed 0.25" in absence.reason


async def test_half_precision_does_not_push_a_clipped_update_over_the_bound(tmp_path):
    rule = {**MEDIAN, "max_norm": 0.25}
    (done,) = await records(job(rule=rule, rounds=1, filters=["cast"]), tmp_path)
    assert done.accepted == toys.SITES


async def test_a_round_with_fewer_updates_than_the_rule_needs_ends_the_job(tmp_path):
    broken = job(rounds=2, recipe={"faults": {"s1:2": "raise"}}, cohort={"quorum": 1})
    with pytest.raises(QuorumError, match=r"2 of 3 sites answered, the quorum is 3.*(?s:.)*'median' needs so many"):
        await records(broken, tmp_path)


def test_a_run_notes_whom_krum_took_and_processes_give_the_same_bits(tmp_path, monkeypatch):
    """Of s0 and s1, which are each other's nearest, it is the first."""
    monkeypatch.chdir(tmp_path)
    rule = {"rule": "krum", "malicious": 0}
    digests = set()
    for engine in ("local", "processes"):
        finished = run(job(rule=rule, rounds=2, engine={"name": engine}, output={"dir": str(tmp_path / engine)}))
        report = json.loads((finished.directory / "report.json").read_text(encoding="utf-8"))
        assert [record["notes"] for record in report["rounds"]] == [{"kept": "s0"}, {"kept": "s0"}]
        assert "kept: s0" in (finished.directory / "report.html").read_text(encoding="utf-8")
        digests.add(report["model"]["sha256"])
    assert len(digests) == 1


REFUSED = {
    "scaffold": ({"strategy": {"name": "scaffold", "robust": MEDIAN}}, "a strategy whose only part is the update"),
    "masks": ({"secure_aggregation": {}}, "leave strategy.robust out, or set secure_aggregation = false"),
    "noise": (
        {"privacy": {"mechanism": "central", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}},
        "privacy.clip bounds what each site does already",
    ),
    "local noise": (
        {"privacy": {"mechanism": "local", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}},
        "most of what it would compare",
    ),
    "late": ({"cohort": {"late": "accept", "deadline_s": 9.0}}, "use cohort.late = 'discard'"),
    "relays": ({"workflow": "cyclic"}, "use workflow 'scatter-gather'"),
    "few sites": ({"strategy": {"name": "fedavg", "robust": {**MEDIAN, "malicious": 2}}}, "needs at least 5 updates"),
    "few asked": ({"cohort": {"sample": 2}}, "a round asks 2 sites"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unsound_beside_a_rule_is_refused_before_anybody_trains(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    values, said = REFUSED[case]
    trained = tmp_path / "trained"
    values = {"strategy": {"name": "fedavg", "robust": MEDIAN}, "recipe": {"trained": str(trained)}, **values}
    with pytest.raises(FitError) as caught:
        run(toys.job(**values))
    assert said in str(caught.value)
    assert not trained.exists()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"rule": "mean", "malicious": 1}, "give max_norm"),
        ({"rule": "median"}, "strategy.robust.malicious: this key is needed"),
        ({"rule": "median", "malicious": -1}, "strategy.robust.malicious"),
        ({"rule": "median", "malicious": 1, "max_norm": 0}, "strategy.robust.max_norm"),
        ({"rule": "mediam", "malicious": 1}, "strategy.robust.rule"),
        ({"rule": "median", "malicious": 1, "max_nrm": 1}, "Did you mean 'max_norm'?"),
    ],
)
def test_a_rule_that_is_not_well_written_is_refused_with_its_key(rule, said):
    with pytest.raises(JobError) as caught:
        job(rule=rule)
    assert said in str(caught.value)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_check_shows_the_rule_and_says_when_too_few_are_asked(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.json").write_text(job(rule={**MEDIAN, "max_norm": 2.0}).to_json())
    checking.check(tmp_path / "job.json", (), as_json=bool(options))
    shown = capsys.readouterr().out
    assert "median" in shown
    assert ("needs_each" if options else "looks at each site's update") in shown
    with pytest.raises(FitError, match="needs at least 5 updates, and a round asks 3 sites"):
        checking.check(tmp_path / "job.json", ("strategy.robust.malicious=2",), as_json=bool(options))


def test_dp_sgd_composes_with_a_rule():
    """Its noise is in what a site sends, and a rule is only what is made of that."""
    noisy = Piece("privacy", "dp-sgd", frozenset({Trait.PER_EXAMPLE}))
    assert conflicts([Piece("rule", "median", frozenset({Trait.NEEDS_EACH})), noisy]) == []


def test_the_loop_stands_a_lie_too():
    """Site s2 has data of its own kind: the mean follows it, the median does not."""
    far = {**data(), "s2": (np.full(7, 4.0), np.full(7, 1e6))}
    ends = {}
    for name, strategy in {"mean": fedavg(), "median": robust(fedavg(), median(1))}.items():
        loop = federation(strategy)
        state = loop.initialize()
        for _ in range(3):
            state, _ = loop.next(state, far)
        ends[name] = float(state.params["w"])
    assert ends["mean"] > 1e3
    assert 0 < ends["median"] < 3


def test_a_rule_of_your_own_is_a_value():
    strategy = robust(fedavg(), median(1))
    assert strategy.combine is not None
    assert strategy.combine.name == "median"
    assert strategy.weighed == {"delta": False}
