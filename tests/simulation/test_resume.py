# SPDX-License-Identifier: Apache-2.0
"""A run killed at any instant goes on and ends with the same bits as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import toys
from hansa.runs.carrier import digest
from hansa.runs.run import Run, list_runs
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints
from hansa.sinks.metrics import JsonLines

CHILD = """
import sys, toys
from hansa.simulation.run import run
job = toys.job(rounds=12, strategy=sys.argv[1], recipe={"size": 50_000, "delay_s": 0.001},
               engine={"name": sys.argv[4], "workers": 2},
               output={"dir": sys.argv[2]}, baselines={"base": True, "local": True})
run(job, resume=sys.argv[3] == "resume")
"""


def final(run):
    """Return the digest of the last checkpoint's parameters and strategy state."""
    checkpoints = Checkpoints(run.directory / "checkpoints", 2, "loss", "min")
    snapshot = checkpoints.load()
    assert snapshot is not None
    state = {f"{part}.{name}": leaf for part, tree in snapshot.state.items() for name, leaf in tree.items()}
    return snapshot.round, digest(snapshot.model.params), digest(state)


def rounds(folder):
    """Return how many rounds the run in ``folder`` has on disk."""
    found = list(folder.glob("*/checkpoints/[0-9]*"))
    return max((int(path.name) for path in found), default=0)


def wait_for(child, folder, number):
    """Return when ``number`` rounds are on disk (all of them at most), or the child has ended."""
    while child.poll() is None and rounds(folder) < min(number, 12):
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("strategy", "engine"), [("scaffold", "local"), ("fedadam", "local"), ("scaffold", "processes")]
)
def test_sigkill_at_random_instants(tmp_path, strategy, engine):
    seed = random.SystemRandom().randrange(1 << 30)
    generator = random.Random(seed)
    env = {**os.environ, "PYTHONPATH": str(Path(toys.__file__).parent)}

    def start(folder, mode):
        command = [sys.executable, "-c", CHILD, strategy, str(folder), mode, engine]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    undisturbed = start(tmp_path / "whole", "new")
    assert undisturbed.wait(timeout=120) == 0
    kills = 0
    while kills < 6:
        before = list_runs(tmp_path / "killed")
        child = start(tmp_path / "killed", "resume" if before else "new")
        wait_for(child, tmp_path / "killed", rounds(tmp_path / "killed") + generator.randint(0, 4))
        time.sleep(generator.uniform(0, 0.2))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
    assert kills >= 2, f"seed {seed}: killed {kills} times only"
    if list_runs(tmp_path / "killed")[0].status["state"] != "finished":
        last = start(tmp_path / "killed", "resume")
        _, error = last.communicate(timeout=120)
        assert last.returncode == 0, f"seed {seed}: {error}"
    (whole,), (killed,) = list_runs(tmp_path / "whole"), list_runs(tmp_path / "killed")
    assert killed.status["state"] == "finished"
    assert final(killed) == final(whole), f"seed {seed}, {kills} kills"
    assert killed.report["model"]["sha256"] == whole.report["model"]["sha256"]
    assert [r["round"] for r in killed.records] == list(range(1, 13))
    assert killed.report["baselines"] == whole.report["baselines"]


def test_a_round_that_can_not_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    job = toys.job(rounds=3, output={"dir": str(tmp_path)})
    written = Checkpoints.write
    closed = []
    monkeypatch.setattr(JsonLines, "close", lambda self: (self._file.close(), closed.append(self)))

    def full(self, record):
        if record.round == 3:
            raise OSError(28, "No space left on device")
        written(self, record)

    monkeypatch.setattr(Checkpoints, "write", full)
    with pytest.raises(Exception, match="No space left on device") as caught:
        run(job)
    assert caught.type.__name__ == "StorageError"
    assert len(closed) == 1
    monkeypatch.setattr(Checkpoints, "write", written)
    (stopped,) = list_runs(tmp_path)
    assert stopped.status["state"] == "failed"
    assert Checkpoints(stopped.directory / "checkpoints", 2, "loss", "min").rounds() == [1, 2]
    finished = run(job, resume=True)
    assert finished.directory == stopped.directory
    fresh = run(toys.job(rounds=3, output={"dir": str(tmp_path / "fresh")}))
    assert final(finished) == final(fresh)


def test_two_processes_can_not_work_on_one_run(tmp_path):
    job = toys.job(rounds=2, output={"dir": str(tmp_path)})
    done = run(job)
    import fcntl

    with (done.directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="at work in another process"):
            run(job, resume=done.id)


def test_a_changed_job_is_not_resumed(tmp_path):
    done = run(toys.job(rounds=2, output={"dir": str(tmp_path)}))
    with pytest.raises(Exception, match="The job has changed"):
        run(toys.job(rounds=3, output={"dir": str(tmp_path)}), resume=done.id)
    assert Run(done.directory).status["state"] == "finished"
