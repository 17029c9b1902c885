# SPDX-License-Identifier: Apache-2.0
"""Every example runs; those over data that must be fetched are cut short, and skipped where the data are not."""

import runpy
from pathlib import Path

import pytest

from hansa.core import config
from hansa.simulation.run import run

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["rounds=1", "train.steps=1", "train.batch_size=2", "engine.name=local", "baselines.local=false"]


def test_a_loop_of_ones_own():
    finals = runpy.run_path(str(EXAMPLES / "digits_loop.py"))["main"](rounds=10)
    assert finals["scaffold"] > finals["fedavg"] > 0.3


def test_a_script_of_ones_own(tmp_path):
    job = config.load(EXAMPLES / "own_script" / "job.toml", [f"output.dir={tmp_path}", "rounds=5"])
    done = run(job)
    metrics = done.records[-1]["metrics"]
    assert metrics["accuracy"] > 0.8, "a site alone knows three tenths of the classes well"
    assert done.records[-1]["accepted"] == ["site-1", "site-2", "site-3", "site-4"]


def test_a_patched_trainer(tmp_path):
    job = config.load(EXAMPLES / "patched_trainer" / "job.toml", [f"output.dir={tmp_path}", "rounds=5"])
    done = run(job)
    scores = [record["metrics"]["eval_accuracy"] for record in done.records]
    assert scores[-1] > 0.7 > 0.6 > scores[0], "a site alone knows five of ten classes well"


@pytest.mark.parametrize(
    ("example", "data", "files", "metric"),
    [
        ("ner.toml", "ner-wnut17", ("train.conll", "test.conll"), "f1"),
        ("intents.toml", "banking77", ("train.csv", "test.csv"), "accuracy"),
    ],
)
def test_jobs_over_fetched_data(tmp_path, shared_data, example, data, files, metric):
    folder = shared_data(data)
    train, test = (folder / name for name in files)
    overrides = [f"data.train={train}", f"data.test={test}", f"output.dir={tmp_path}", "data.limit=20"]
    job = config.load(EXAMPLES / example, [*overrides, *SHORT])
    done = run(job)
    assert 0 <= done.records[-1]["metrics"][metric] <= 1
    assert (done.model_directory / "config.json").exists()


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".toml", ".py") or (path.is_dir() and (path / "job.toml").exists()):
            assert path.name in listed
