# SPDX-License-Identifier: Apache-2.0
"""``hansa quickstart`` does its three stages; here with a few steps of each."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("transformers")

from hansa.recipes import quickstart as recipe
from hansa.runs.run import list_runs

SMALL = [
    *("--set", "rounds=1"),
    *("--set", "train.steps=1"),
    *("--set", "engine.name=local"),
    *("--set", "baselines.local=false"),
    *("--set", "baselines.central=false"),
    *("--set", "recipe.max_new_tokens=2"),
]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Make pre-training short and keep its cache in the test's folder."""
    plan = recipe.Pretraining(steps=4, batch_size=2)
    monkeypatch.setattr(recipe, "Pretraining", lambda: plan)
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path / "cache"))


def test_three_stages_and_the_mean_over_seeds(hansa, quick):
    done = hansa("quickstart", "--seed", "3", "--seeds", "2", "--json", *SMALL)
    assert done.code == 0, done.err
    assert "pre-training the base model 4/4: loss" in done.err
    runs = list_runs(Path("runs"))
    assert [run.job.seed for run in runs] == [3, 4]
    documents = done.json["runs"]
    assert [document["run"] for document in documents] == [run.id for run in runs]
    for row in ("base", "federated"):
        for column in ("own", "everyone"):
            values = [document["comparison"]["rows"][row][column] for document in documents]
            assert done.json["mean"][row][column] == fmean(values)
    assert len(runs[0].report["sites"]) == 8
    assert len(runs[0].report["samples"]) == len(recipe.PROMPTS)
    assert (runs[0].directory / "report.html").exists()
    assert (runs[0].directory / "model" / "config.json").exists()
    assert (runs[0].directory / "adapter" / "adapter_config.json").exists()


def test_one_s_own_model_and_data(hansa, quick, folder):
    base = recipe.pretrained(recipe.gather()).directory
    rows = [{"who": f"w{i % 3}", "says": f"line {i} of what this one says " * 8} for i in range(60)]
    Path("talk.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    mine = ["quickstart", "--base", str(base), "--data", "talk.jsonl", "--by", "who", "--text", "says"]
    done = hansa(*mine, *SMALL, "--set", "partition.sites=3")
    assert done.code == 0, done.err
    assert "pre-training" not in done.err
    (run,) = list_runs(Path("runs"))
    assert [site["site"] for site in run.report["sites"]] == ["w0", "w1", "w2"]
    assert "perplexity on held-out data (lower is better)" in done.out
    assert f"from_pretrained('{run.directory / 'model'}')" in done.out
    wrong = hansa(*mine[:-1], "tells", *SMALL, "--set", "partition.sites=3")
    assert wrong.code == 3
    assert "tells" in wrong.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "x.jsonl"], 2, "--data and --by go together"),
        (["--by", "role"], 2, "--data and --by go together"),
        (["--base", ".", "--data", "x.jsonl", "--by", "role"], 3, "There is no data file 'x.jsonl'"),
        (["--base", "nowhere"], 4, "There is no model folder 'nowhere'"),
    ],
)
def test_what_it_can_not_do(hansa, quick, words, code, message):
    done = hansa("quickstart", *words)
    assert done.code == code
    assert message in done.err
