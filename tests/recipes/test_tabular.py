# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers from files, by a perceptron, in engines local and batched."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hansa.core.config import parse
from hansa.errors import DataError, JobError
from hansa.recipes.tabular_classification import build, perceptron
from hansa.simulation.run import run

HEADER = "age,pressure,sick\n"
CSV = {
    "berlin": HEADER + "".join(f"{30 + i},{100 + 3 * i},{'yes' if i > 9 else 'no'}\n" for i in range(20)),
    "lyon": HEADER + "".join(f"{40 + i},{160 - i},{'yes' if i % 3 else 'no'}\n" for i in range(15)),
}


@pytest.fixture
def folder(tmp_path):
    for site, text in CSV.items():
        (tmp_path / f"{site}.csv").write_text(text)
    return tmp_path


def job_for(folder, recipe=None, data=None, **values):
    recipe = {"features": ["age", "pressure"], "offset": [45, 130], "scale": [10, 20], "hidden": [5], **(recipe or {})}
    return parse(
        {
            "name": "heart",
            "rounds": 2,
            "recipe": {"name": "tabular-classification", **recipe},
            "data": {
                "train": {site: f"{site}.csv" for site in CSV},
                "columns": {"label": "sick"},
                "labels": ["no", "yes"],
                **(data or {}),
            },
            "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4},
            "directory": str(folder),
            "output": {"dir": str(folder / "runs")},
            **values,
        }
    )


def test_rows_are_standardised_by_the_jobs_constants(folder):
    program = build(job_for(folder, data={"test_fraction": 0}))
    x, y = program.examples("berlin").train
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[:2], [[-1.5, -1.5], [-1.4, -1.35]], rtol=1e-6)
    np.testing.assert_array_equal(y, np.arange(20) > 9)
    report = program.inspect("lyon")
    assert report.labels == {"no": 5, "yes": 10}
    assert {name: leaf.shape for name, leaf in program.initial().items()} == {
        "0.weight": (5, 2),
        "0.bias": (5,),
        "2.weight": (2, 5),
        "2.bias": (2,),
    }


def test_initial_parameters_follow_the_seed(folder):
    first, again, other = (build(job_for(folder, seed=seed)).initial() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["0.weight"], again["0.weight"])
    assert (first["0.weight"] != other["0.weight"]).any()


def test_a_job_runs_batched_as_it_does_locally(folder):
    finals = {}
    for engine in ("local", "batched"):
        job = job_for(folder, engine={"name": engine}, strategy="scaffold", name=f"heart-{engine}")
        done = run(job)
        finals[engine] = load_file(done.model_directory / "model.safetensors")
        config = json.loads((done.model_directory / "config.json").read_text())
        assert config["features"] == ["age", "pressure"]
        assert config["labels"] == ["no", "yes"]
        assert 0 <= done.report["rounds"][-1]["metrics"]["accuracy"] <= 1
    for name, leaf in finals["local"].items():
        np.testing.assert_allclose(finals["batched"][name], leaf, atol=1e-6)
    perceptron(2, [5], 2).load_state_dict(finals["local"])


def test_a_column_of_vectors(folder):
    x = np.random.default_rng(0).normal(size=(12, 2, 3))
    np.savez(folder / "all.npz", pixels=x, digit=np.arange(12) % 3)
    job = job_for(
        folder,
        recipe={"features": None, "inputs": 6, "offset": 1.0, "scale": 2.0},
        data={
            "train": "all.npz",
            "columns": {"features": "pixels", "label": "digit"},
            "labels": ["0", "1", "2"],
            "test_fraction": 0,
        },
        partition={"name": "iid", "sites": 2},
    )
    program = build(job)
    rows = np.concatenate([program.examples(site).train[0] for site in program.sites])
    assert rows.shape == (12, 6)
    expected = (x.reshape(12, 6) - 1) / 2
    np.testing.assert_allclose(np.sort(rows, axis=0), np.sort(expected, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("cell", "message"),
    [("", "column 'pressure' is empty"), ("high", "'high', which is no number"), ("nan", "no number")],
)
def test_a_value_that_is_no_number_is_named(folder, cell, message):
    (folder / "lyon.csv").write_text(HEADER + f"40,120,no\n41,{cell},yes\n42,1,no\n")
    with pytest.raises(DataError, match=message) as caught:
        build(job_for(folder, data={"test_fraction": 0})).inspect("lyon")
    assert "lyon.csv, row 2" in str(caught.value)


def test_an_empty_cell_may_count_as_its_offset(folder):
    (folder / "lyon.csv").write_text(HEADER + "45,,no\n55,150,yes\n")
    program = build(job_for(folder, recipe={"fill_missing": True}, data={"test_fraction": 0}))
    np.testing.assert_allclose(program.examples("lyon").train[0], [[0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"features": None}, "features = "),
        ({"offset": [1, 2, 3]}, "offset has 3 numbers, the model has 2 inputs"),
        ({"scale": [1, 0]}, "scale must be positive"),
        ({"hidden": [0]}, "at least 1"),
        ({"widths": [3]}, "no option 'widths'"),
    ],
)
def test_options_that_are_wrong_are_named(folder, recipe, message):
    with pytest.raises(JobError, match=message):
        build(job_for(folder, recipe=recipe))


def test_a_job_that_does_not_fit_the_recipe_is_refused(folder):
    with pytest.raises(JobError, match=r"leave out \[model\]"):
        build(job_for(folder, model={"base": "somewhere"}))
    with pytest.raises(JobError, match=r'"no", "yes"'):
        build(job_for(folder, data={"labels": None}))
    wrong = build(job_for(folder, recipe={"inputs": 3, "offset": 0.0, "scale": 1.0}))
    with pytest.raises(DataError, match="2 inputs, the model 3"):
        wrong.inspect("berlin")
    with pytest.raises(DataError, match="no column 'weight'"):
        build(job_for(folder, recipe={"features": ["age", "weight"]})).inspect("berlin")


def test_the_module_is_what_the_recipe_says():
    module = perceptron(4, [], 3)
    assert [type(layer).__name__ for layer in module] == ["Linear"]
    assert module(torch.zeros(2, 4)).shape == (2, 3)
