# SPDX-License-Identifier: Apache-2.0
"""The other commands: init, check, runs, report, schema, and how quickly the first of them is there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shell
import toys
from hansa.cli.starting import RECIPES, text
from hansa.core import config
from hansa.runs.run import list_runs
from hansa.version import VERSION

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "jinja2", "tensorboard", "numpy", "pydantic")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom hansa.cli.main import main\nsys.argv = ['hansa', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("run", "init", "check", "runs", "report", "schema"):
        assert command in done.stdout


def test_version(hansa):
    done = hansa("--version")
    assert (done.code, done.out) == (0, f"hansa {VERSION}\n")


def test_schema(hansa):
    assert hansa("schema").json == config.schema()


# --- init --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_init_writes_is_a_job(hansa, folder, recipe):
    assert hansa("init", "my job.toml", "--recipe", recipe).code == 0
    job = config.load(Path("my job.toml"))
    assert job.name == "my-job"
    assert job.recipe.name == recipe
    assert job.model.base or job.model.factory == "train.py:Model"
    assert job.baselines.local == (recipe != "script")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_that_init_comments_out_can_be_set(recipe):
    lines = text(Path("job.toml"), recipe).splitlines()
    values = tomllib.loads("\n".join(lines))
    seen = set()
    table, commented = "", False
    for line in lines:
        if line.removeprefix("# ").startswith("["):
            table = line.strip("# []")
            commented = line.startswith("#")
        if not line.startswith("# ") or " = " not in line:
            continue
        setting = tomllib.loads(line[2:])
        (key,) = setting
        needed = dict(NEEDED.get(table, {})) if commented else {}
        if key == "epsilon":
            del needed["noise_multiplier"]
        changed = {**values, table: {**needed, **values.get(table, {}), **setting}} if table else {**values, **setting}
        if key in ("steps", "epochs"):
            changed["train"].pop("epochs" if key == "steps" else "steps", None)
        config.parse(changed)
        seen.add(f"{table}.{key}" if table else key)
    assert {"seed", "partition", "data.limit", "cohort.deadline_s"} <= seen
    written = {*seen, *values, *TABLES, *(f"{t}.{key}" for t in TABLES for key in values.get(t, {}))}
    assert {*config.Job.model_fields, *(f"{t}.{k}" for t, kind in TABLES.items() for k in kind)} - written == {
        "directory"
    }


NEEDED = {
    "data": {"train": "a.jsonl"},
    "privacy": {"mechanism": "central", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0},
}

TABLES = {
    "privacy": config.PrivacySection.model_fields,
    "secure_aggregation": config.SecureAggregationSection.model_fields,
    "homomorphic_encryption": config.HomomorphicEncryptionSection.model_fields,
    "model": config.ModelSection.model_fields,
    "data": config.DataSection.model_fields,
    "train": config.TrainSection.model_fields,
    "cohort": config.CohortSection.model_fields,
    "engine": config.EngineSection.model_fields,
    "evaluation": config.EvaluationSection.model_fields,
    "baselines": config.BaselineSection.model_fields,
    "output": config.OutputSection.model_fields,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_takes_what_init_sets(folder, recipe):
    (folder / "train.py").write_text("class Model:\n    pass\n")
    module = importlib.import_module(f"hansa.recipes.{recipe.replace('-', '_')}")
    module.build(config.parse(tomllib.loads(text(Path("job.toml"), recipe)))).close()


def test_init_overwrites_nothing(hansa, folder):
    (folder / "job.toml").write_text("mine")
    done = hansa("init")
    assert done.code == 2
    assert "is there already" in done.err
    assert (folder / "job.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["x.toml", "--recipe", "causal_lm"], 2, "Did you mean 'causal-lm'?"),
        (["x.json"], 2, "writes a .toml file"),
        (["nowhere/x.toml"], 7, "No such file or directory"),
    ],
)
def test_what_init_can_not_write(hansa, words, code, message):
    done = hansa("init", *words)
    assert done.code == code
    assert message in done.err


# --- check -------------------------------------------------------------------------------------------------------


def test_check_trains_nothing_and_says_what_a_job_is(hansa, folder):
    done = hansa("check", shell.job_file(folder), "--set", "rounds=7")
    assert done.code == 0
    assert '"rounds": 7' in done.out
    for word in ("s0", "s1", "s2", "even 1, odd 2", "fedavg", "scatter-gather", "every site can take part"):
        assert word in done.out
    assert sorted(path.name for path in folder.iterdir()) == ["job.json"]


MODEL = 4 * 8 + 8
"""Bytes of the toy model: four float64 and one int64."""


@pytest.mark.parametrize(
    ("values", "down", "up"),
    [
        ({}, MODEL, 32),
        ({"strategy": "scaffold"}, MODEL + 32, 64),
        ({"filters": [{"name": "cast", "dtype": "float16"}]}, MODEL, 8),
        ({"workflow": "cyclic"}, MODEL, MODEL),
        ({"homomorphic_encryption": {"full_model": True}, "baselines": {"local": False}}, MODEL, 8 * 2 * 8192),
    ],
)
def test_check_knows_the_bytes_that_a_round_sends(hansa, folder, values, down, up):
    job = shell.job_file(folder, **values)
    costs = hansa("check", job, "--json").json["costs"]
    assert (costs["down"], costs["up"], costs["asked"]) == (down, up, 3)
    assert hansa("run", job).code == 0
    (run,) = list_runs(Path("runs"))
    record = run.records[0]
    assert record["bytes_down"] == 3 * down
    assert record["bytes_up"] == 3 * up


def test_check_tells_what_encryption_costs_and_refuses_what_is_too_large(hansa, folder):
    section = {"full_model": True, "step": 1e-4}
    recipe, baselines = {"name": "toys:build", "size": 10_000}, {"local": False}
    job = shell.job_file(folder, recipe=recipe, homomorphic_encryption=section, baselines=baselines)
    costs = hansa("check", job, "--json").json["costs"]
    assert costs["encrypting_s"] == pytest.approx(3 * 2.7e-3)
    assert 0 < costs["error"] <= 3 * 1e-4 / 2
    refused = hansa("check", job, "--set", "homomorphic_encryption.max_bytes=300000")
    assert refused.code == 5
    assert "is 393,216 bytes encrypted" in refused.err
    assert hansa("check", job, "--set", "homomorphic_encryption.full_model=false").code == 5


def test_check_estimates_the_servers_memory_and_disk(hansa, folder):
    job = shell.job_file(folder, recipe={"name": "toys:build", "size": 1000}, strategy="fedadam")
    costs = hansa("check", job, "--set", "cohort.sample=2", "--set", "output.keep=3", "--json").json["costs"]
    model = 8 * 1000 + 8
    assert costs["asked"] == 2
    assert costs["model"] == model
    assert costs["state"] >= 2 * 8000
    assert costs["memory"] == 2 * (model + costs["state"]) + 8000
    assert costs["checkpoints"] == 5 * (model + costs["state"])
    assert costs["waiting"] == 2 * 8000


def test_check_says_what_does_not_compose(hansa, folder):
    job = shell.job_file(folder, strategy="scaffold", train={"optimizer": "adamw"}, recipe={"name": "toys:build"})
    done = hansa("check", job)
    assert done.code == 5
    assert "strategy 'scaffold' does not compose with optimizer 'adamw'" in done.err
    assert "Instead: use train.optimizer = 'sgd'" in done.err
    assert "can take part" not in done.out
    error = hansa("check", job, "--json").json["error"]
    assert (error["kind"], error["exit_code"]) == ("FitError", 5)


def test_check_shows_the_sites_that_can_take_part_and_those_that_can_not(hansa, folder):
    done = hansa("check", shell.job_file(folder, recipe={"name": "toys:build", "faults": {"s1:0": "data"}}))
    assert done.code == 3
    assert "1 of 3 sites can't take part:\n  s1: The site has no examples." in done.err
    assert "s2" in done.out


# --- runs and report ---------------------------------------------------------------------------------------------


def test_runs_lists_what_there_is(hansa, folder):
    assert hansa("runs").code == 0
    assert hansa("runs", "--json").json == []
    job = shell.job_file(folder)
    hansa("run", job)
    hansa("run", job, "--set", "strategy=scaffold", "--set", "train.optimizer=adamw")
    entries = hansa("runs", "--json").json
    assert [(e["run"], e["state"], e["rounds"], e["planned"]) for e in entries] == [
        ("toy-0001", "finished", 3, 3),
        ("toy-0002", "failed", 0, 3),
    ]
    record = list_runs(Path("runs"))[0].records[-1]
    assert (entries[0]["metric"], entries[0]["value"]) == ("loss", record["metrics"]["loss"])
    assert "does not compose" in entries[1]["error"]
    shown = hansa("runs").out
    assert "toy-0001" in shown
    assert "failed" in shown
    elsewhere = hansa("runs", "--dir", "elsewhere")
    assert elsewhere.code == 0
    assert "There are no runs in elsewhere" in elsewhere.out


def test_a_run_that_can_not_be_read_does_not_hide_the_others(hansa, folder):
    job = shell.job_file(folder)
    for _ in range(2):
        hansa("run", job)
    Path("runs/toy-0001/report.json").write_text("{")
    entries = hansa("runs", "--json").json
    assert "report.json is damaged" in entries[0]["error"]
    assert entries[1]["value"] is not None
    assert "damaged" in hansa("runs").out


def test_report_makes_the_page_again(hansa, folder):
    hansa("run", shell.job_file(folder))
    page = Path("runs/toy-0001/report.html")
    first = page.read_bytes()
    page.unlink()
    done = hansa("report", "toy-0001", "--json")
    assert done.json["finished"]
    assert done.json["comparison"]["metric"] == "loss"
    assert page.read_bytes() == first
    assert hansa("report", "runs/toy-0001").code == 0


def test_report_of_a_run_that_is_not_finished(hansa, folder):
    faults = {"s0:3": "raise", "s1:3": "raise"}
    assert hansa("run", shell.job_file(folder, recipe={"name": "toys:build", "faults": faults})).code == 6
    done = hansa("report", "toy-0001", "--json")
    assert done.code == 0
    assert not done.json["finished"]
    record = list_runs(Path("runs"))[0].records[-1]
    assert record["round"] == 2
    assert done.json["comparison"]["rows"]["federated"]["everyone"] == record["metrics"]["loss"]
    page = Path("runs/toy-0001/report.html").read_text()
    assert "The run is not finished" in page
    assert all(site in page for site in toys.SITES)


def test_report_of_a_format_that_is_not_known(hansa, folder):
    hansa("run", shell.job_file(folder))
    path = Path("runs/toy-0001/report.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    done = hansa("report", "toy-0001")
    assert done.code == 8
    assert "format 2" in done.err
