# SPDX-License-Identifier: Apache-2.0
"""Masks by default: when a job has them, and that a simulation without keys gives the bits of the whole protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toys
from hansa.core import config
from hansa.errors import JobError, QuorumError
from hansa.recipes import sums
from hansa.runs.masking import settled, told
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints
from hansa.strategies.fedavg import fedavg

METRICS = {"loss_sum": 2.0**31, "examples": 2.0**26}


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """The toys' sums stand in the table, as those of Hansa's recipes do."""
    monkeypatch.setitem(sums._DECLARED, "toys:many", lambda job: METRICS)


def job(folder: Path | None = None, **values):
    recipe = {"name": "toys:many", "num_sites": 4, **values.pop("recipe", {})}
    output = {} if folder is None else {"output": {"dir": str(folder)}}
    return toys.job(recipe=recipe, **{"rounds": 2, **output, **values})


def final(done) -> np.ndarray:
    return np.array(Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load().model.params["w"])


def test_more_than_two_sites_are_masked_where_a_job_does_not_say():
    found = settled(job(), 4)
    assert found.masks == config.SecureAggregationSection(by_default=True, metrics=METRICS)
    assert settled(found, 2) == found, "settled once"
    said = told(found, 4)
    assert "on, by default" in said
    assert "a round needs 3 of the 4 that it asks, though cohort.quorum would do with 2" in said
    assert "though" not in told(settled(job(cohort={"quorum": 1.0}), 4), 4)


PRIVATE = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("values", "sites", "reason"),
    [
        ({}, 2, "2 sites take part, and fewer than 3 are never summed"),
        ({"cohort": {"sample": 0.5}}, 4, "a round asks 2 sites"),
        ({"baselines": {"local": True}}, 4, "baseline 'local' does not compose with them: a model of one site's own"),
        ({"workflow": "cyclic"}, 4, "no sum that masks could cancel in"),
        ({"filters": ["cast"]}, 4, "elements of a ring"),
        ({"cohort": {"late": "accept"}}, 4, "masks of a late update"),
        (
            {"strategy": {"name": "fedavg", "robust": {"rule": "median", "malicious": 1}}},
            4,
            "the server sees a sum only",
        ),
        ({"strategy": "my:strategy"}, 4, "'my:strategy' of the strategies is not Hansa's"),
        ({"filters": ["my:filter"]}, 4, "'my:filter' of the filters is not Hansa's"),
        ({"recipe": {"name": "toys:build"}}, 4, "recipe 'toys:build' is not Hansa's"),
        ({"privacy": {**PRIVATE, "mechanism": "central"}}, 4, "holds each update to"),
        ({"privacy": {**PRIVATE, "mechanism": "dp-sgd"}}, 4, "budget is held against the number of examples"),
        ({"privacy": {**PRIVATE, "mechanism": "dp-ftrl"}}, 4, "holds each update to"),
        ({"privacy": {**PRIVATE, "mechanism": "local"}}, 4, "may be larger than any range"),
        ({"privacy": {**PRIVATE, "mechanism": "distributed"}}, 4, "a table that the job itself gives"),
        ({"secure_aggregation": False}, 4, "the job says so"),
    ],
)
def test_what_speaks_against_masks_stands_in_the_job(values, sites, reason):
    found = settled(job(**values), sites)
    assert found.masks is None
    assert reason in found.secure_aggregation.off
    assert f"off, because {found.secure_aggregation.off.removesuffix('.')}." in told(found, sites)
    assert settled(found, 4) == found


def test_a_strategy_given_as_a_value_is_not_masked_by_default(tmp_path):
    done = run(job(tmp_path, rounds=1), strategy=fedavg())
    assert "off, because 'fedavg' of the strategies is not Hansa's" in done.report["secure_aggregation"]


def test_a_batched_simulation_is_masked_by_default_and_not_when_asked_to_make_keys():
    batched = {"engine": {"name": "batched"}}
    assert settled(job(**batched), 4).masks is not None
    assert "no updates of their own to mask" in _refusal(job(**batched, secure_aggregation=True))


def _refusal(asked) -> str:
    from hansa.core.fit import conflicts
    from hansa.runs.pieces import pieces_of
    from hansa.workers.runner import Course

    return "\n".join(map(str, conflicts(pieces_of(asked, frozenset(), Course("toy", (), asked.strategy)))))


def test_the_short_forms_and_a_table_that_contradicts_itself():
    assert job(secure_aggregation=True).masks == config.SecureAggregationSection()
    assert job(secure_aggregation=False).masks is None
    off = job(secure_aggregation=False)
    assert config.parse(off.model_dump(mode="json")) == off
    assert config.parse(config.override(job().model_dump(), ["secure_aggregation=false"])) == off
    with pytest.raises(JobError, match="off, so leave the rest out"):
        job(secure_aggregation={"off": "why not", "minimum": 4})


def test_a_jobs_own_table_keeps_its_words_and_gets_its_recipes_metrics():
    found = settled(job(secure_aggregation={"minimum": 4, "metrics": {"loss_sum": 5.0, "f1": 1.0}}), 4)
    assert found.masks.metrics == {"loss_sum": 5.0, "f1": 1.0, "examples": 2.0**26}
    assert (found.masks.minimum, found.masks.by_default) == (4, False)


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_without_keys_the_bits_are_those_of_the_whole_protocol(tmp_path, engine, strategy):
    values = {"strategy": strategy, "engine": {"name": engine}, "recipe": {"varied": True}}
    open_run = run(job(tmp_path / "open", **values))
    masked = run(job(tmp_path / "masked", secure_aggregation=True, **values))
    plain = run(job(tmp_path / "plain", secure_aggregation=False, **values))
    assert not list(open_run.directory.rglob("identities.key")), "no keys are made"
    assert list(masked.directory.rglob("identities.key"))
    assert np.array_equal(final(open_run), final(masked))
    assert np.abs(final(open_run) - final(plain)).max() < 1e-7
    for mine, theirs, open_ones in zip(open_run.records, masked.records, plain.records, strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert mine["metrics"] == pytest.approx(open_ones["metrics"], rel=1e-6)
        assert theirs["site_metrics"] == {}
        losses = {site: found["loss"] for site, found in mine["site_metrics"].items()}
        assert losses == pytest.approx({site: found["loss"] for site, found in open_ones["site_metrics"].items()}, 1e-6)
    assert open_run.report["secure_aggregation"].startswith("Secure aggregation: on, by default.")
    assert open_run.report["job"]["secure_aggregation"]["by_default"]


def test_a_round_of_fewer_than_are_summed_fails_in_simulation_too(tmp_path):
    """The job's own quorum would do with two."""
    faults = {"s01:1": "raise", "s02:1": "data"}
    with pytest.raises(QuorumError, match=r"2 of 4 sites answered; .* needs 3") as caught:
        run(job(tmp_path, recipe={"faults": faults}))
    assert "s01: lost" in str(caught.value)
    assert "s02: refused: The site has lost its data" in str(caught.value)


@pytest.mark.parametrize("masks", [None, True])
def test_a_value_out_of_range_names_what_to_set(tmp_path, masks, monkeypatch):
    monkeypatch.setitem(sums._DECLARED, "toys:many", lambda job: {**METRICS, "loss_sum": 5.0})
    with pytest.raises(QuorumError, match=r"'loss_sum' .* from -5 to 5\. .* Raise secure_aggregation\.metrics\.loss_"):
        run(job(tmp_path, secure_aggregation=masks))


@pytest.mark.parametrize("masks", [None, True])
def test_partial_work_that_a_strategy_can_not_use_is_not_in_the_sum(tmp_path, masks):
    faults = {"s01:1": "partial"}
    done = run(job(tmp_path, recipe={"faults": faults}, rounds=1, secure_aggregation=masks))
    (absent,) = done.records[0]["absent"]
    assert (absent["site"], "did 40% of its work" in absent["reason"]) == ("s01", True)


def test_metrics_that_some_tasks_or_sites_do_not_have(tmp_path, monkeypatch):
    """A sum that no site gave is none; where some gave it, it is theirs, as without masks."""
    evaluate = toys.Quadratics.evaluate

    def some(self, site, plan):
        return {} if site == "s03" else {**evaluate(self, site, plan), "correct": 2.0}

    def summarise(self, given):
        return {name: value / given["examples"] for name, value in given.items() if name != "examples"}

    monkeypatch.setattr(toys.Quadratics, "evaluate", some)
    monkeypatch.setattr(toys.Quadratics, "summarise", lambda self, given: summarise(self, given) if given else {})
    monkeypatch.setitem(sums._DECLARED, "toys:many", lambda job: {**METRICS, "correct": 2.0**26, "words": 2.0**26})
    ends = {}
    for name, masks in {"plain": False, "open": None, "masked": True}.items():
        done = run(job(tmp_path / name, rounds=1, secure_aggregation=masks))
        ends[name] = done.records[0]["metrics"]
    assert ends["plain"].keys() == {"loss_sum", "correct", "train_loss_sum"}
    assert ends["open"] == ends["masked"]
    assert ends["open"] == pytest.approx(ends["plain"], rel=1e-6)
