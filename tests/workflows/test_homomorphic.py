# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under homomorphic encryption: the model of a plain sum, whoever drops out when, and whatever is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toys
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints

METRICS = {"loss_sum": 1e6, "examples": 1e6}


def job(tmp_path: Path, encrypted: bool = True, **values):
    recipe = {"name": "toys:many", "num_sites": 5, **values.pop("recipe", {})}
    values = {"rounds": 2, "output": {"dir": str(tmp_path)}, **values}
    if encrypted:
        more = values.get("homomorphic_encryption", {})
        values["homomorphic_encryption"] = {"metrics": METRICS, "full_model": True, **more}
    return toys.job(recipe=recipe, **values)


def final(done) -> np.ndarray:
    return np.array(Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load().model.params["w"])


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_model_is_that_of_the_plain_sum(tmp_path, engine, strategy):
    values = {"engine": {"name": engine}, "strategy": strategy}
    plain = run(job(tmp_path / "plain", encrypted=False, **values))
    hidden = run(job(tmp_path / "hidden", **values))
    assert np.abs(final(hidden) - final(plain)).max() < 1e-5
    for mine, theirs in zip(hidden.records, plain.records, strict=True):
        assert mine["accepted"] == theirs["accepted"]
        assert mine["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-5)
        assert mine["metrics"]["train_loss"] == pytest.approx(theirs["metrics"]["train_loss"], rel=1e-5)
        assert mine["site_metrics"] == {}
