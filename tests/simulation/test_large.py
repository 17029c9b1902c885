# SPDX-License-Identifier: Apache-2.0
"""Whole runs in which every model counts as large end with the same bits, and leave nothing behind."""

import pytest

import toys
from hansa.core import fold as folds
from hansa.core import tree as trees
from hansa.runs.carrier import digest
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints

FILTERS = [{"name": "clip", "max_norm": 1e3}, "cast"]


def finished(folder, engine, recipe, faults=None, **sections):
    job = toys.job(
        rounds=3,
        recipe={"name": recipe, "size": 1000, "faults": faults or {}},
        engine={"name": engine, "workers": 2},
        output={"dir": str(folder)},
        **sections,
    )
    done = run(job)
    snapshot = Checkpoints(done.directory / "checkpoints", 2, "loss", "min").load()
    state = {f"{part}.{name}": leaf for part, tree in snapshot.state.items() for name, leaf in tree.items()}
    return done, (digest(snapshot.model.params), digest(state), done.report["model"]["sha256"])


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("strategy", ["fedadam", "scaffold"])
def test_large_models_end_with_the_bits_of_small_ones(engine, strategy, tmp_path, monkeypatch):
    sections = {"strategy": strategy, "filters": FILTERS[strategy == "scaffold" :]}
    _, expected = finished(tmp_path / "small", engine, "toys:build", **sections)
    monkeypatch.setattr(trees, "LARGE", 0)
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    done, got = finished(tmp_path / "large", engine, "large_toys:build", **sections)
    assert got == expected
    left = {path.name for path in done.directory.rglob("*") if path.suffix in {".bin", ".hansa", ".safetensors"}}
    kept = {"initial.safetensors", "model.safetensors", "state.hansa"}
    assert {name for name in left if ".strategy." not in name} == kept, "beside what sites remember"


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_a_large_update_that_is_not_finite_is_named_and_outlived(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "LARGE", 0)
    done, _ = finished(tmp_path, engine, "large_toys:build", {"s1:2": "nan"})
    assert [len(record["accepted"]) for record in done.records] == [3, 2, 3]
    (absence,) = done.records[1]["absent"]
    assert "'w' is NaN or infinite" in absence["reason"]


def test_a_large_model_goes_from_site_to_site(tmp_path, monkeypatch):
    _, expected = finished(tmp_path / "small", "local", "toys:build", workflow="cyclic")
    monkeypatch.setattr(trees, "LARGE", 0)
    assert finished(tmp_path / "large", "local", "large_toys:build", workflow="cyclic")[1] == expected
