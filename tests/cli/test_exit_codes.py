# SPDX-License-Identifier: Apache-2.0
"""Each kind of failure ends a real process in its own code, with one clear message and no traceback."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import shell
from hansa import errors
from hansa.errors import HansaError
from hansa.runs.run import list_runs

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_the_table_in_the_documentation_is_the_one_in_the_code() -> None:
    found: dict[str, int] = {}
    codes = set()
    for code, names in re.findall(r"^\| (\d+) \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE):
        codes.add(int(code))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), int(code))
    kinds = [k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, HansaError)]
    assert found == {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {errors.SUCCESS, errors.DEFECT, *found.values()}


def toy(**options: Any) -> dict[str, Any]:
    return {"recipe": {"name": "toys:build", **options}}


CASES: dict[str, tuple[int, dict[str, Any], Sequence[str], str]] = {
    "an unknown key": (2, {"trian": {}}, [], "Did you mean 'train'?"),
    "an unknown key in a section": (2, {"train": {"batchsize": 4}}, [], "train.batchsize: unknown key. Did you mean"),
    "a wrong value": (2, {}, ["--set", "train.lr=-1"], "train.lr: "),
    "an unknown strategy": (2, {"strategy": "fedvag"}, [], "Did you mean 'fedavg'?"),
    "an unknown recipe": (2, {"recipe": "causal_lm"}, [], "Did you mean 'causal-lm'?"),
    "a recipe that is no module": (2, {"recipe": "nowhere:build"}, [], "can't be imported"),
    "a site without examples": (3, toy(faults={"s1:0": "data"}), [], "s1: The site has no examples"),
    "pieces that don't compose": (5, {"strategy": "scaffold", "train": {"optimizer": "adamw"}}, [], "Instead: "),
    "too few sites": (6, toy(faults={"s0:2": "raise", "s1:2": "nan"}), [], "the quorum is 2"),
    "a folder that is a file": (7, {}, ["--set", "output.dir=job.json"], "Can't create a run in job.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failing_run(folder: Path, case: str) -> None:
    code, values, words, message = CASES[case]
    done = shell.process(folder, "run", shell.job_file(folder, **values), *words)
    assert done.code == code, done.err
    assert message in done.err
    assert "Error: " in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_too_few_sites_loses_no_finished_round(folder: Path) -> None:
    done = shell.process(folder, "run", shell.job_file(folder, **toy(faults={"s0:2": "raise", "s1:2": "nan"})))
    assert done.code == 6
    for reason in ("s0: lost: RuntimeError: the disk of this site is on fire", "s1: refused: ", "is NaN or infinite"):
        assert reason in done.err
    (run,) = list_runs(folder / "runs")
    assert run.state == "failed"
    assert run.status["error"] in done.err
    assert [record["round"] for record in run.records] == [1]
    assert (run.directory / "checkpoints" / "000001").is_dir()


def test_errors_are_one_json_document_where_asked_for(folder: Path) -> None:
    done = shell.process(folder, "run", shell.job_file(folder, strategy="fedvag"), "--json")
    assert done.code == 2
    error = done.json["error"]
    assert error["kind"] == "JobError"
    assert error["exit_code"] == 2
    assert "Did you mean 'fedavg'?" in error["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "jop.json"], "Did you mean 'job.json'?"),
        (["run"], "hansa init"),
        (["run", "job.txt"], "takes one .toml, .yaml or .json job"),
        (["run", "a.toml", "b.toml"], "takes one .toml, .yaml or .json job"),
        (["run", "--resume"], "There is no unfinished run"),
        (["run", "--resume", "toy-0009"], "There is no run 'toy-0009'"),
        (["run", "job.json", "--resume"], "There is no unfinished run of this very job"),
        (["run", "--resume", "x", "--set", "rounds=2"], "--set changes a job file"),
        (["report", "toy-0009"], "There is no run 'toy-0009'"),
        (["rum"], "No such command 'rum'"),
        (["run", "--rezume"], "No such option"),
    ],
)
def test_wrong_words(hansa: Callable[..., shell.Result], folder: Path, words: list[str], message: str) -> None:
    shell.job_file(folder)
    done = hansa(*words)
    assert done.code == 2, done.err
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_full_disk(folder: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    done = shell.process(folder, "run", shell.job_file(folder, **toy(size=50_000)), prelude=limit)
    assert done.code == 7
    assert "Free some space" in done.err
    assert "Traceback" not in done.err


def test_a_damaged_checkpoint(folder: Path) -> None:
    assert shell.process(folder, "run", shell.job_file(folder)).code == 0
    latest = folder / "runs/toy-0001/checkpoints/000003"
    record = json.loads((latest / "record.json").read_text())
    (latest / "record.json").write_text(json.dumps({**record, "format": 99}))
    done = shell.process(folder, "run", "--resume", "toy-0001")
    assert done.code == 8
    assert "format 99" in done.err
    (latest / "record.json").write_text(json.dumps(record))
    (latest / "model.safetensors").write_bytes(b"\xff" * 64)
    done = shell.process(folder, "run", "--resume", "toy-0001")
    assert done.code == 8
    assert "is no safetensors file" in done.err


def test_a_missing_extra(folder: Path) -> None:
    job = shell.job_file(folder, output={"tensorboard": True})
    done = shell.process(folder, "run", job, prelude="import sys; sys.modules['tensorboard'] = None")
    assert done.code == 9
    assert "pip install 'hansa[tensorboard]'" in done.err
    assert "Traceback" not in done.err


def test_a_defect_shows_its_traceback_and_asks_for_a_report(folder: Path) -> None:
    done = shell.process(folder, "run", shell.job_file(folder, **toy(no_such_option=1)))
    assert done.code == 70
    assert "Traceback" in done.err
    assert "Please report it" in done.err


def test_a_closed_pipe_is_no_defect(folder: Path) -> None:
    code = "from hansa.cli.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "schema"],
        cwd=folder,
        env=shell.environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.close()
    assert child.wait(timeout=60) == 1
    assert child.stderr.read() == ""
    child.stderr.close()
