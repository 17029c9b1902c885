# SPDX-License-Identifier: Apache-2.0
"""`hansa lab up`: real processes, real TLS, the same model as in simulation, and nothing left running."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import shell
import toys
from hansa.core import config
from hansa.errors import DataError, JobError, SiteError
from hansa.lab import down, lab
from hansa.simulation.run import run

ROOT = Path(__file__).parents[1]


def model_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "model" / "model.safetensors").read_bytes()).hexdigest()


def gone(pids: list[int]) -> list[int]:
    """Wait until processes have ended (a zombie has), and return those that have not within a minute."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    return [each.pid for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_the_quickstart_ends_with_the_same_model_as_in_simulation(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "quickstart.toml")
    settings = ("rounds=2", "partition.sites=3", "train.steps=4", "data.limit=40")
    words = ("--json", *(word for setting in settings for word in ("--set", setting)))
    simulated = shell.process(tmp_path, "run", example, *words)
    assert simulated.code == 0, simulated.err
    deployed = shell.process(tmp_path, "lab", "up", example, "--sites", "3", *words)
    assert deployed.code == 0, deployed.err
    assert deployed.json["run"] == "quickstart-0002"
    assert deployed.json["model"] == simulated.json["model"]
    mine, theirs = deployed.json["comparison"]["rows"], simulated.json["comparison"]["rows"]
    assert {name: row["everyone"] for name, row in mine.items()} == {
        name: row["everyone"] for name, row in theirs.items()
    }
    assert len(theirs["federated"]["sites"]) == 3
    assert "Secure aggregation: on, by default." in deployed.err, "so no site's own score is known"
    assert mine["federated"]["sites"] == {}
    assert model_hash(tmp_path / "runs/quickstart-0001") == model_hash(tmp_path / "runs/quickstart-0002")
    listed = shell.process(tmp_path, "runs", "--json").json
    assert [entry["state"] for entry in listed] == ["finished", "finished"]
    assert shell.process(tmp_path, "report", "quickstart-0002").code == 0


SCRIPT = """
    import argparse
    import torch
    import hansa.client as flare          # the one line that was changed

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x)

    def evaluate(net, x, y):
        with torch.no_grad():
            return (net(x).argmax(1) == y).float().mean().item()

    def main():
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        args = parser.parse_args()
        flare.init()
        site = flare.get_site_name()
        generator = torch.Generator().manual_seed(int(site[-1]))
        x = torch.randn(64, 4, generator=generator)
        y = (x.sum(1) > 0).long()
        net = Net()
        loss_fn = torch.nn.CrossEntropyLoss()
        while flare.is_running():
            model = flare.receive()
            net.load_state_dict(model.params)
            accuracy = evaluate(net, x, y)
            optimizer = torch.optim.SGD(net.parameters(), lr=args.lr)
            for _ in range(10):
                optimizer.zero_grad()
                loss_fn(net(x), y).backward()
                optimizer.step()
            flare.send(
                flare.FLModel(
                    params=net.cpu().state_dict(),
                    metrics={"accuracy": accuracy},
                    meta={"NUM_STEPS_CURRENT_ROUND": 10},
                )
            )

    if __name__ == "__main__":
        main()
"""


def test_a_script_for_another_platform_trains_with_its_import_changed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    job = config.parse(
        {
            "name": "moved",
            "rounds": 4,
            "recipe": {"name": "script", "path": "train.py", "args": ["--lr", "0.5"]},
            "model": {"factory": "train.py:Net"},
            "evaluation": {"metric": "accuracy", "mode": "max"},
            "baselines": {"base": False, "local": False},
            "directory": str(tmp_path),
            "output": {"dir": str(tmp_path / "runs")},
        }
    )
    with lab(job, sites=2) as federation:
        done = federation.run()
        assert federation.sites == ("site-1", "site-2")
        settled = federation.job
    accuracies = [record["metrics"]["accuracy"] for record in done.records]
    assert accuracies[-1] > max(0.9, accuracies[0])
    assert model_hash(done.directory) == model_hash(run(settled).directory)


def test_processes_die_and_come_back_and_the_bits_stay(tmp_path: Path) -> None:
    job = toys.job(rounds=3, recipe={"delay_s": 0.02}, output={"dir": str(tmp_path / "runs")})
    with lab(job, sites=3) as federation:
        pids = [federation.pid(name) for name in federation.names]
        id = federation.federation.submit(job)
        events = federation.federation.follow(id)
        next(event for event in events if event.kind == "round")
        federation.kill("server")
        federation.kill("s1")
        assert not federation.alive("s1")
        federation.start("server")
        federation.start("s1")
        assert federation.federation.wait(id).line.state == "finished"
        federation.federation.download(id, tmp_path / "got")
        pids += [federation.pid(name) for name in federation.names]
    assert gone(pids) == []
    assert model_hash(tmp_path / "got") == model_hash(run(job).directory)


def test_a_job_that_fails_raises_its_own_error_and_leaves_nothing(tmp_path: Path) -> None:
    job = toys.job(recipe={"faults": {"s1:0": "data"}}, cohort={"quorum": 1.0}, output={"dir": str(tmp_path / "runs")})
    with lab(job, directory=tmp_path / "fed") as federation:
        pids = [federation.pid(name) for name in federation.names]
        with pytest.raises(SiteError, match="no examples"):
            federation.run()
    assert gone(pids) == []
    assert (tmp_path / "fed" / "processes" / "s1.log").exists()
    assert json.loads((tmp_path / "runs" / "toy-0001" / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("values", "sites", "error", "message"),
    [
        ({}, 4, JobError, r"has 3 sites \(s0, s1, s2\), not 4"),
        ({"recipe": {"sites": ["s0", "s1"]}}, 3, JobError, "--set recipe.sites=3"),
        ({"recipe": {"sites": ["s0", "server"]}}, 2, JobError, "Rename the site"),
        ({"recipe": {"name": "no-such"}}, 2, JobError, "no-such"),
        (
            {"recipe": {"name": "causal-lm"}, "data": {"train": "absent/*.md"}, "model": {"tokenizer": "bytes"}},
            2,
            DataError,
            "absent",
        ),
    ],
)
def test_a_job_and_a_number_that_do_not_agree(
    tmp_path: Path, values: dict[str, object], sites: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), lab(toys.job(**values), sites=sites, directory=tmp_path / "fed"):
        pass


def test_a_folder_in_use_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    from hansa.errors import StorageError

    with pytest.raises(StorageError, match="already"), lab(toys.job(), directory=tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def started_lab(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start `hansa lab up` with a job that lasts, and return it with its processes once the job has begun a round."""
    shell.job_file(folder, rounds=500, recipe={"name": "toys:build", "delay_s": 0.2}, baselines={"base": False})
    process = subprocess.Popen(
        [sys.executable, "-m", "hansa.cli.main", "lab", "up", "job.json", "--sites", "3", "--dir", "fed"],
        cwd=folder,
        env=shell.environment(),
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if b"round 1/500" in line:
            break
    return process, [each.pid for each in psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_lab(tmp_path: Path, number: signal.Signals) -> None:
    process, children = started_lab(tmp_path)
    with process:
        assert len(children) >= 8, "a server, three sites, and a worker of each"
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        code = process.wait(60)
    assert gone(children) == []
    if number != signal.SIGKILL:
        assert code == 130
        assert "the federation is down" in said


def test_a_lab_that_is_kept_can_be_talked_to_and_ended(tmp_path: Path) -> None:
    shell.job_file(tmp_path, output={"dir": "runs"})
    kept = shell.process(tmp_path, "lab", "up", "job.json", "--sites", "3", "--keep", "--dir", "fed", "--json")
    assert kept.code == 0, kept.err
    pids = list(kept.json["lab"]["processes"].values())
    try:
        assert all(psutil.pid_exists(pid) for pid in pids)
        listed = shell.process(tmp_path, "job", "list", "--as", kept.json["lab"]["kit"], "--json")
        assert [line["state"] for line in listed.json] == ["finished"]
    finally:
        ended = shell.process(tmp_path, "lab", "down", "fed", "--json")
    assert sorted(ended.json["ended"]) == ["s0", "s1", "s2", "server"]
    assert gone(pids) == []
    assert down(tmp_path / "fed") == []
    with pytest.raises(JobError, match="no lab"):
        down(tmp_path)


def test_a_number_that_another_process_got_is_not_ended(tmp_path: Path) -> None:
    states = tmp_path / "processes"
    states.mkdir()
    (states / "server.pid").write_text(str(os.getpid()))
    assert down(tmp_path) == []
