# SPDX-License-Identifier: Apache-2.0
"""``hansa run`` from a job file to a finished run, and on from an interrupted one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import shell
import toys
from hansa.cli.starting import toml
from hansa.runs.run import Run, list_runs
from hansa.sinks.summary import summary
from hansa.sinks.text import number


def test_a_run_ends_with_the_comparison_and_says_where_things_are(hansa, folder):
    done = hansa("run", shell.job_file(folder))
    assert done.code == 0
    (run,) = list_runs(Path("runs"))
    assert run.state == "finished"
    federated = summary(run.report).row("federated")
    assert number(federated.everyone) in done.out
    for name in ("report.html", "report.json", "model"):
        assert (run.directory / name).exists()
        assert str(run.directory / name) in done.out
    assert "round 3/3" in done.err


def test_json_is_one_document_and_nothing_else(hansa, folder):
    done = hansa("run", shell.job_file(folder), "--json")
    document = done.json
    (run,) = list_runs(Path("runs"))
    assert document["run"] == run.id
    assert document["state"] == "finished"
    assert document["model"] == run.report["model"]
    assert document["comparison"]["better"] == "lower"
    assert set(document["comparison"]["rows"]) == {"base", "local", "federated"}
    assert document["comparison"]["rows"]["federated"]["everyone"] == run.records[-1]["metrics"]["loss"]
    assert all(Path(path).exists() for path in document["files"].values())


def test_toml_yaml_and_json_give_the_same_model(hansa, folder):
    (folder / "a.json").write_text(json.dumps(shell.SETTINGS))
    (folder / "b.yaml").write_text(yaml.safe_dump(shell.SETTINGS))
    (folder / "c.toml").write_text("\n".join(f"{key} = {toml(value)}" for key, value in shell.SETTINGS.items()))
    hashes = {hansa("run", name, "--json").json["model"]["sha256"] for name in ("a.json", "b.yaml", "c.toml")}
    assert len(hashes) == 1


def test_set_changes_the_job(hansa, folder):
    job = shell.job_file(folder)
    done = hansa("run", job, "--set", "rounds=2", "--set", "strategy.name=fedavgm", "--json")
    assert done.json["rounds"] == 2
    (run,) = list_runs(Path("runs"))
    assert run.job.strategy.name == "fedavgm"


def test_a_site_that_fails_is_named_and_the_run_goes_on(hansa, folder):
    done = hansa("run", shell.job_file(folder, recipe={"name": "toys:build", "faults": {"s1:2": "nan"}}))
    assert done.code == 0
    assert "round 2: s1 is refused" in done.err
    (run,) = list_runs(Path("runs"))
    assert [entry["site"] for entry in run.records[1]["absent"]] == ["s1"]
    assert "NaN" in run.records[1]["absent"][0]["reason"]


def test_a_site_that_can_not_train_alone_does_not_end_the_run(hansa, folder):
    job = shell.job_file(folder, recipe={"name": "toys:build", "faults": {"s1:3": "raise"}})
    done = hansa("run", job)
    assert done.code == 0
    (run,) = list_runs(Path("runs"))
    assert list(run.report["failed_baselines"]) == ["local.s1"]
    assert "local.s1" in done.err
    assert summary(run.report).left_out == ("s1",)
    assert "local.s1 could not be made" in (run.directory / "report.html").read_text()


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    code = "from hansa.cli.main import main; main()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, cwd=folder, env=shell.environment(), stderr=subprocess.PIPE, text=True)


def interrupted(folder: Path, number: int) -> tuple[int, str]:
    """Start a slow run, send a signal in its second round, and return the exit code and what was said."""
    child = start(folder, "run", shell.job_file(folder, rounds=4, recipe={"name": "toys:build", "delay_s": 0.02}))
    deadline = time.monotonic() + 60
    while not (folder / "runs/toy-0001/checkpoints/000001").exists():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    return child.returncode, said


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_finished_rounds_and_resume_goes_on(folder, kind):
    code, said = interrupted(folder, kind)
    assert code == 130
    assert "`hansa run --resume runs/toy-0001` goes on" in said
    assert "Traceback" not in said
    (run,) = list_runs(folder / "runs")
    assert run.state == "interrupted"
    before = [record["round"] for record in run.records]
    assert before[0] == 1
    assert len(before) < 4
    done = shell.process(folder, "run", "--resume", "runs/toy-0001", "--json")
    assert done.code == 0, done.err
    assert f"Going on after round {len(before)}" in done.err
    assert Run(run.directory).state == "finished"
    whole = shell.process(folder, "run", "job.json", "--json")
    assert done.json["model"]["sha256"] == whole.json["model"]["sha256"]


def test_a_second_ctrl_c_ends_at_once(folder):
    child = start(folder, "run", shell.job_file(folder, recipe={"name": "toys:build", "delay_s": 4.0}))
    deadline = time.monotonic() + 60
    for line in child.stderr:
        assert time.monotonic() < deadline
        if line.startswith("federated training"):
            break
    child.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in child.stderr.readline()
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    assert time.monotonic() - begun < 3
    child.stderr.close()
    (run,) = list_runs(folder / "runs")
    assert run.state in ("interrupted", "killed")  # it may have had no time to say so itself


@pytest.mark.parametrize("words", [["job.json", "--resume"], ["--resume"], ["--resume", "toy-0001"]])
def test_ways_to_name_what_is_resumed(hansa, folder, monkeypatch, words):
    from hansa.sinks.checkpoint import Checkpoints

    written = Checkpoints.write

    def full(self, record):
        if record.round == 2:
            raise OSError(28, "No space left on device")
        written(self, record)

    monkeypatch.setattr(Checkpoints, "write", full)
    failed = hansa("run", shell.job_file(folder))
    assert failed.code == 7
    assert "No space left on device" in failed.err
    assert "resuming goes on" in failed.err
    monkeypatch.setattr(Checkpoints, "write", written)
    assert hansa("run", *words).code == 0
    (run,) = list_runs(Path("runs"))
    assert run.state == "finished"
    assert [record["round"] for record in run.records] == [1, 2, 3]


def test_a_killed_run_is_listed_as_killed(hansa, folder):
    code, _ = interrupted(folder, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (run,) = list_runs(folder / "runs")
    assert run.status["state"] == "running"
    assert hansa("runs", "--json").json[0]["state"] == "killed"
    assert hansa("run", "--resume").code == 0


def test_without_the_report_extra_a_run_says_how_to_get_it(folder):
    prelude = "import sys; sys.modules['matplotlib'] = None"
    done = shell.process(folder, "run", shell.job_file(folder), prelude=prelude)
    assert done.code == 0, done.err
    assert "pip install 'hansa[report]'" in done.err
    assert "hansa report" in done.out
    (run,) = list_runs(folder / "runs")
    assert not (run.directory / "report.html").exists()
    assert run.report["model"]["round"] == 3
    again = shell.process(folder, "report", run.id, prelude=prelude)
    assert again.code == 9
    assert "pip install 'hansa[report]'" in again.err
    assert shell.process(folder, "report", run.id).code == 0
    assert (run.directory / "report.html").exists()


def test_both_words_may_stand_in_either_order(hansa, folder):
    job = shell.job_file(folder)
    assert hansa("run", job).code == 0
    assert hansa("run", "--resume", "toy-0001", job).code == 0
    assert len(list_runs(Path("runs"))) == 1
    assert tuple(list_runs(Path("runs"))[0].records[0]["asked"]) == toys.SITES
