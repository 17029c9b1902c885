# SPDX-License-Identifier: Apache-2.0
"""Scripts for NVIDIA FLARE's client API run with only their import changed; logging; processes started by hand."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

import hansa.client as flare
from hansa.client import script as api
from hansa.client.host import Attached
from hansa.client.link import Link
from hansa.client.tracking import Log
from hansa.core import wire
from hansa.core.config import PrivacySection, parse
from hansa.core.filter import Given
from hansa.core.values import MAX_NAME, MAX_NAMES, Plan, Update
from hansa.errors import JobError, SiteError
from hansa.privacy.plan import Terms
from hansa.privacy.protect import bounded
from hansa.recipes import script
from hansa.simulation.run import run
from links import TASK

pytestmark = pytest.mark.timeout(120)

# FLARE's client API, from its documentation (2.4 to 2.7): module -> name -> the parameters that scripts may pass.
FLARE = {
    "hansa.client": {
        "init": ["rank", "config_file"],
        "receive": ["timeout"],
        "send": ["model", "clear_cache"],
        "is_running": [],
        "is_train": [],
        "is_evaluate": [],
        "is_submit_model": [],
        "get_config": [],
        "get_job_id": [],
        "get_site_name": [],
        "get_task_name": [],
        "system_info": [],
        "log": ["key", "value", "data_type", "kwargs"],
        "clear": [],
        "shutdown": [],
        "train": ["_func", "root_kwargs"],
        "evaluate": ["_func", "root_kwargs"],
        "FLModel": [
            "params_type", "params", "optimizer_params", "metrics", "start_round", "current_round",
            "total_rounds", "meta",
        ],
        "ParamsType": None,
        "AnalyticsDataType": None,
    },
    "hansa.client.lightning": {
        "patch": ["trainer", "restore_state", "load_state_dict_strict", "update_fit_loop"],
        **dict.fromkeys(
            ["FLCallback", "FLModel", "ParamsType", "AnalyticsDataType", "get_config", "get_job_id", "get_site_name"]
        ),
        **dict.fromkeys(["init", "is_running", "is_train", "is_evaluate", "is_submit_model", "log", "receive", "send"]),
        "system_info": [],
    },
    "hansa.client.hf": {
        "patch": ["trainer", "restore_state", "load_state_dict_strict"],
        **dict.fromkeys(["init", "is_running", "is_train", "is_evaluate", "log", "receive", "send"]),
        **dict.fromkeys(["train", "evaluate"]),
    },
    "hansa.client.tracking": dict.fromkeys(["SummaryWriter", "MLflowWriter", "WandBWriter"]),
}  # fmt: skip

WRITERS = {
    "SummaryWriter": ["add_scalar", "add_scalars"],
    "WandBWriter": ["log"],
    "MLflowWriter": [
        "log_param", "log_params", "log_metric", "log_metrics", "log_text", "set_tag", "set_tags"
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", FLARE)
def test_the_names_and_parameters_are_flares(module):
    loaded = importlib.import_module(module)
    for name, expected in FLARE[module].items():
        found = getattr(loaded, name)
        if expected is not None:
            parameters = inspect.signature(found).parameters.values()
            ours = [p.name for p in parameters if p.name in expected or p.kind is not p.KEYWORD_ONLY]
            assert ours[: len(expected)] == expected, name
    for writer, methods in WRITERS.items() if module.endswith("tracking") else ():
        assert all(callable(getattr(getattr(loaded, writer), method)) for method in methods)


def test_values_are_flares():
    assert flare.ParamsType.FULL == "FULL"
    assert flare.ParamsType("DIFF") is flare.ParamsType.DIFF
    assert {"SCALAR", "SCALARS", "METRIC", "METRICS", "PARAMETER", "PARAMETERS", "TEXT", "TAG", "TAGS", "IMAGE"} <= {
        kind.value for kind in flare.AnalyticsDataType
    }
    model = flare.FLModel(params={"w": np.zeros(1000)}, current_round=2)
    assert str(model) == "FLModel(params_type=<ParamsType.FULL: 'FULL'>, start_round=0, current_round=2, params=1)"


FLARE_SCRIPT = """
import torch
from torch import nn
import IMPORT as flare
from IMPORT.tracking import MLflowWriter, SummaryWriter

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def forward(self, x):
        return self.layer(x)

def evaluate(net, x, y):
    with torch.no_grad():
        return nn.functional.mse_loss(net(x), y).item()

def main():
    net = Net()
    flare.init()
    sys_info = flare.system_info()
    site_name = sys_info["site_name"]
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(len(site_name)))
    y = x @ torch.tensor([[1.0], [-2.0]]) + 0.5
    writer, mlflow = SummaryWriter(), MLflowWriter()
    while flare.is_running():
        input_model = flare.receive()
        print(f"current_round={input_model.current_round}, total_rounds={input_model.total_rounds}")
        net.load_state_dict(input_model.params)
        loss = evaluate(net, x, y)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"loss": loss}))
            continue
        if flare.is_submit_model():
            raise SystemExit("nobody asks for that")
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        steps = 10
        for step in range(steps):
            optimizer.zero_grad()
            cost = nn.functional.mse_loss(net(x), y)
            cost.backward()
            optimizer.step()
            writer.add_scalar("train_loss", cost.item(), input_model.current_round * steps + step)
        mlflow.log_param("lr", 0.05)
        flare.log("image", net, flare.AnalyticsDataType.IMAGE)
        output_model = flare.FLModel(
            params_type=flare.ParamsType.FULL,
            params=net.cpu().state_dict(),
            metrics={"loss": loss},
            meta={"NUM_STEPS_CURRENT_ROUND": steps},
        )
        flare.send(output_model)

if __name__ == "__main__":
    main()
"""


def a_job(folder, code, **sections):
    (folder / "train.py").write_text(textwrap.dedent(code))
    recipe = {"name": "script", "path": "train.py", "sites": 2, **sections.pop("recipe", {})}
    values = {
        "name": "own",
        "rounds": 3,
        "recipe": recipe,
        "model": {"factory": "train.py:Net"},
        "evaluation": {"metric": "loss", "mode": "min"},
        "baselines": {"base": False, "local": False},
        "output": {"dir": str(folder / "runs")},
        **sections,
    }
    (folder / "job.json").write_text(json.dumps(values))
    return parse({**values, "directory": str(folder)})


def test_a_flare_script_trains_with_its_import_changed(tmp_path):
    a_job(tmp_path, FLARE_SCRIPT.replace("IMPORT", "hansa.client"), rounds=4)
    command = [sys.executable, "-m", "hansa.cli.main", "run", str(tmp_path / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "runs" / "own-0001"
    losses = [json.loads(line)["metrics"]["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    log = (directory / "work" / "sites.log").read_text()
    logged = [json.loads(line.split(": ", 1)[1])["logged"] for line in log.splitlines() if '"logged"' in line]
    assert {"key": "lr", "value": 0.05, "data_type": "PARAMETER", "with": {}} in logged
    steps = [entry["with"]["global_step"] for entry in logged if entry["key"] == "train_loss"]
    assert sorted(set(steps)) == list(range(40))
    assert not [entry for entry in logged if entry["key"] == "image"], "an image is neither a number nor a text"


def test_decorated_functions_receive_and_send(tmp_path):
    code = """
    import numpy as np
    import hansa.client as flare
    def Net(): return {"w": np.zeros(3)}
    if __name__ == "__main__":
        flare.init()

        @flare.evaluate
        def judge(model, shift=0.0):
            return {"loss": float(model.params["w"].mean()) + shift}

        @flare.train(anything=1)
        def fit(model=None, by=0.0):
            return flare.FLModel(params={"w": model.params["w"] + by})

        while flare.is_running():
            judge(shift=1.0)
            if flare.is_train():
                fit(by=2.0)
    """
    done = run(a_job(tmp_path, code))
    assert load_file(done.directory / "model" / "model.safetensors")["w"].tolist() == [6, 6, 6]
    assert [r["metrics"]["loss"] for r in done.records] == [3, 5, 7]
    assert [r["metrics"]["train_loss"] for r in done.records] == [1, 3, 5]


def test_what_is_kept_and_what_is_waited_for():
    ours, theirs = socket.socketpair()
    host, session = Link(ours), api.Session(Link(theirs), {"site": "a"}, "numpy")
    assert session.receive(timeout=0.01) is None
    host.send(TASK, {"params": {"w": np.ones(2)}})
    model = session.receive(timeout=10)
    session.send(model, clear_cache=False)
    assert session.receive() is model
    with pytest.raises(SiteError, match="nothing to answer"):
        session.send(model)
    session.clear()
    assert session.receive(timeout=0.01) is None
    with pytest.raises(JobError, match="takes an FLModel, not a dict"):
        session.send({})
    host.send({"type": "end"})
    assert not session.agree()
    host.close()


def test_the_other_ranks_are_silent():
    session = api.Session(None, {"site": ""}, rank=1)
    assert session.agree()
    assert session.receive() is None
    session.send(flare.FLModel(params={}))


BY_HAND = """
import os, sys
import hansa.client as flare
def Net():
    import numpy as np
    return {"w": np.zeros(2)}
if __name__ == "__main__":
    flare.init(attach=sys.argv[1])
    while flare.is_running():
        model = flare.receive()
        if len(sys.argv) > 2 and model.current_round == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"loss": os.getpid()}))
    print("the job is over", flare.get_job_id())
"""


@pytest.fixture
def owners():
    """Start a process by hand; whatever still runs is ended."""
    started = []

    def start(folder, *args):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HANSA_")}
        process = subprocess.Popen(
            [sys.executable, str(folder / "train.py"), str(folder / "attach" / "site-1"), *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def attached(folder, **sections):
    folder.mkdir(exist_ok=True)
    return a_job(folder, BY_HAND, recipe={"attached": True, "attach": "attach", "sites": 1}, **sections)


def test_a_process_started_by_hand_serves_the_job_and_sees_its_end(tmp_path, owners):
    job = attached(tmp_path)
    owner = owners(tmp_path)
    assert "waiting for a job at" in owner.stderr.readline(), "it was started before the job"
    done = run(job)
    assert load_file(done.directory / "model" / "model.safetensors")["w"].tolist() == [3, 3]
    assert {record["metrics"]["loss"] for record in done.records} == {owner.pid}
    out, _ = owner.communicate(timeout=30)
    assert "the job is over own" in out
    assert not list((tmp_path / "attach" / "site-1").iterdir())


def test_an_attached_process_that_dies_costs_one_attempt(tmp_path, owners):
    program = script.build(attached(tmp_path))

    def plan(number):
        return Plan("own", number, "train", number - 1, program.initial())

    try:
        first = owners(tmp_path, "1")
        assert program.train("site-1", plan(1), None).params["w"].tolist() == [1, 1]
        with pytest.raises(SiteError, match=r"attached process has gone\. Start it again with HANSA_ATTACH="):
            program.train("site-1", plan(2), None)
        assert first.wait(30) == -signal.SIGKILL
        second = owners(tmp_path)
        work = program.train("site-1", plan(2), None)
        assert dict(work.sums)["loss"] == second.pid
        mode = (tmp_path / "attach" / "site-1" / "token").stat().st_mode
        assert mode & 0o777 == 0o600
    finally:
        program.close()


def test_an_attached_process_outlives_the_jobs_process(tmp_path, owners):
    owner = owners(attached(tmp_path) and tmp_path)
    for number in (1, 2):
        program = script.build(attached(tmp_path))
        plan = Plan("own", number, "train", number - 1, program.initial())
        assert dict(program.train("site-1", plan, None).sums)["loss"] == owner.pid
        for process in program._processes.values():
            process.kill()  # as when the worker is killed: no farewell


def test_where_nobody_attaches_it_is_said(tmp_path, monkeypatch):
    job = a_job(tmp_path, BY_HAND, recipe={"attached": True, "sites": 1, "timeout_s": 0.3})
    program = script.build(job)
    plan = Plan("own", 1, "train", 0, program.initial())
    with pytest.raises(JobError, match=r"set recipe\.attach, or HANSA_ATTACH_DIR"):
        program.train("site-1", plan, None)
    monkeypatch.setenv("HANSA_ATTACH_DIR", str(tmp_path / "jobs"))
    with pytest.raises(SiteError, match=r"No process attached at '.*jobs/site-1' within 0.3 s"):
        program.train("site-1", plan, None)
    program.close()


def test_a_folder_that_others_may_enter_is_refused_and_so_is_a_wrong_token(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(JobError, match="open to others"):
        Attached("a", folder, print)
    folder.chmod(0o700)
    host = Attached("a", folder, print)
    found = []
    task = threading.Thread(target=lambda: found.append(host.exchange(TASK, {"params": {}}, 60)))
    task.start()
    with pytest.raises(OSError, match="closed"):
        api._connected(str(folder / "socket"), "guess")
    link, welcome = api._connected(str(folder / "socket"), (folder / "token").read_text())
    assert welcome["site"] == "a"
    assert link.receive()[0]["round"] == 1
    link.send({"type": "result"})
    task.join()
    assert found[0][0] == {"type": "result"}
    host.kill()
    link.close()


NOISY = """
import hansa.client as flare
from hansa.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
def Net():
    import numpy as np
    return {"w": np.zeros(1)}
if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if flare.is_train():
            first = 200 * model.current_round
            for step in range(first, first + 200):
                SummaryWriter().add_scalar("cost", step / 2, step)
            SummaryWriter().add_scalars("rate", {"low": 1, "high": float("inf")})
            WandBWriter().log({"norm": 2.5}, step=7)
            MLflowWriter().log_params({"lr": 0.5})
            MLflowWriter().log_text("words", "notes.txt")
        else:
            SummaryWriter().add_scalar("judged", 1.0)
        flare.send(flare.FLModel(params=model.params, metrics={"loss": 1.0}))
"""


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_logged_numbers_end_beside_the_metrics(tmp_path, engine):
    output = {"dir": str(tmp_path / "runs"), "tensorboard": True}
    done = run(a_job(tmp_path, NOISY, rounds=2, engine={"name": engine}, output=output))
    for record in done.records:
        assert list(record["logged"]) == ["site-1", "site-2"]
        assert record["logged"]["site-1"] == record["logged"]["site-2"]
        first = 200 * (record["round"] - 1)
        found = record["logged"]["site-1"]
        assert found.pop("cost") == [[step, step / 2] for step in range(first, first + 200, 4)], "thinned to 64 at most"
        assert found == {"rate/low": [[None, 1.0]], "rate/high": [[None, None]], "norm": [[7, 2.5]]}
        assert "cost" not in str(record["metrics"])
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(done.directory / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("site-2/logged/cost")]
    assert steps == [*range(0, 200, 4), *range(200, 400, 4)]
    assert [event.step for event in events.Scalars("site-1/logged/rate/low")] == [1, 2], "without a step: the round's"
    assert np.isnan(events.Scalars("site-1/logged/rate/high")[0].value)


def test_a_task_keeps_no_more_than_an_update_carries():
    log = Log()
    for step in range(1000):
        log.add({"key": "a", "value": step, "data_type": "SCALAR", "with": {"global_step": step}})
    assert log.numbers["a"] == [(step, float(step)) for step in range(0, 1000, 16)]
    for number in range(100):
        log.add({"key": f"{number:03d}" * 50, "value": 1, "data_type": "METRIC", "with": None})
    assert len(log.numbers) == MAX_NAMES
    assert max(map(len, log.numbers)) == MAX_NAME
    odd = Log()
    for value in (10**400, float("nan"), "text", None, {"x": 1}, True):
        odd.add({"key": "k", "value": value, "data_type": "SCALAR", "with": {"global_step": 1 << 70}})
    odd.add({"key": "", "value": 1, "data_type": "SCALAR", "with": {}})
    odd.add({"value": [], "data_type": "SCALARS"})
    assert odd.numbers == {"k": [(None, None), (None, None), (None, 1.0)]}
    file = io.BytesIO()
    wire.write_update(file, Update("a", 1, 0, {}, 1.0, {}, logged=log.numbers))
    file.seek(0)
    assert wire.read_update(file).logged == log.numbers


def test_under_a_privacy_plan_logged_numbers_stay_at_the_site():
    section = PrivacySection(mechanism="central", clip=1.0, noise_multiplier=1.0, delta=1e-5)
    update = Update("a", 1, 0, {"delta": {"w": np.ones(2)}}, 1.0, {}, logged={"cost": [(0, 1.0)]})
    sent, _ = bounded(Terms(section, 10, 1.0)).apply(update, Given({"delta": True}), {})
    assert sent.logged == {}
