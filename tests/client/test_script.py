# SPDX-License-Identifier: Apache-2.0
"""The client API, and recipe ``script`` with every mistake that a script can make."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

import hansa.client as flare
from hansa.client import script as api
from hansa.client.link import Link
from hansa.core.config import parse
from hansa.core.values import Plan
from hansa.errors import DataError, FitError, HansaError, JobError, ModelError, QuorumError, SiteError
from hansa.recipes import script
from hansa.simulation.run import run
from links import TASK

pytestmark = pytest.mark.timeout(90)


GOOD = """
import hansa.client as flare
import os, sys
flare.init()
site = int(flare.get_site_name()[-1])
while flare.is_running():
    m = flare.receive()
    diff = {name: 0.5 * (site - value) for name, value in m.params.items()}
    full = {name: value + diff[name] for name, value in m.params.items()}
    kind = sys.argv[1] if len(sys.argv) > 1 else "FULL"
    print("pid", os.getpid(), "round", m.current_round, "of", m.total_rounds, flush=True)
    flare.send(flare.FLModel(params_type=kind, params=full if kind == "FULL" else diff,
               metrics={"mean": float(m.params["w"].mean())}, meta={"NUM_STEPS_CURRENT_ROUND": site}))
"""


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    until = time.monotonic() + 5
    while left := [c for c in psutil.Process().children(recursive=True) if c.pid not in before]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def a_job(folder, code=GOOD, *, rounds=2, sites=2, recipe=None, **sections):
    """Return a job over a script with ``code``; its first parameters are zeros."""
    (folder / "train.py").write_text(textwrap.dedent(code))
    first = {"w": np.zeros((2, 3), np.float32), "steps": np.zeros((), np.int64)}
    save_file(first, folder / "first.safetensors")
    return parse(
        {
            "name": "own",
            "rounds": rounds,
            "recipe": {"name": "script", "path": "train.py", "sites": sites, **(recipe or {})},
            "model": {"factory": "first.safetensors"},
            "evaluation": {"metric": "mean"},
            "baselines": {"base": False, "local": False},
            "output": {"dir": str(folder / "runs")},
            "directory": str(folder),
            **sections,
        }
    )


def a_plan(program, number=1, **values):
    return Plan("own", number, "train", number - 1, program.initial(), seed=5, **values)


def fails(folder, code, words, kind=SiteError, **more):
    """Check that one training with ``code`` fails with ``words``, and return the error."""
    program = script.build(a_job(folder, code, **more))
    try:
        with pytest.raises(kind) as caught:
            program.train("site-1", a_plan(program), None)
        assert words in caught.value.message
        return caught.value
    finally:
        program.close()


def expected(rounds, sites=(1, 2)):
    w = 0.0
    for _ in range(rounds):
        w += sum(s * 0.5 * (s - w) for s in sites) / sum(sites)
    return w


@pytest.mark.parametrize("engine", ["local", "processes"])
@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_a_script_trains_and_weighs_by_its_steps(tmp_path, engine, kind):
    done = run(a_job(tmp_path, recipe={"args": [kind]}, engine={"name": engine}))
    w = load_file(done.directory / "model" / "model.safetensors")["w"]
    np.testing.assert_allclose(w, np.full((2, 3), expected(2)), rtol=1e-6)
    records = done.records
    assert records[0]["metrics"]["mean"] == pytest.approx(expected(1))
    assert records[1]["metrics"]["train_mean"] == pytest.approx(expected(1))
    log = (done.directory / "work" / "sites.log").read_text()
    pids = {line.split("pid ")[1].split()[0] for line in log.splitlines() if "pid " in line}
    assert len(pids) == 2, "one process a site, started once"
    assert "round 1 of 2" in log


def test_algorithms_on_steps_are_refused(tmp_path):
    for strategy in ("scaffold", {"name": "fedprox", "mu": 0.1}):
        with pytest.raises(FitError, match="hands over finished updates only"):
            run(a_job(tmp_path, strategy=strategy, train={"optimizer": "sgd"}))


def test_a_crash_costs_a_round_and_the_script_is_started_anew(tmp_path):
    crash = GOOD.replace(
        "    diff =", "    if site == 1 and m.current_round == 1: raise ValueError('no more disk')\n    diff ="
    )
    done = run(a_job(tmp_path, crash, rounds=3))
    accepted = [record["accepted"] for record in done.records]
    assert accepted == [["site-1", "site-2"], ["site-2"], ["site-1", "site-2"]]
    (absent,) = done.records[1]["absent"]
    assert (absent["site"], absent["kind"]) == ("site-1", "refused")
    assert "The script ended with exit code 1. Its last lines:" in absent["reason"]
    assert "ValueError: no more disk" in absent["reason"]


def test_a_script_without_a_loop_is_started_every_round(tmp_path):
    once = """
    import hansa.client as flare
    flare.init()
    m = flare.receive()
    flare.send(flare.FLModel(params={k: v + 1 for k, v in m.params.items()}))
    """
    done = run(a_job(tmp_path, once, rounds=3, evaluation={"every": 0, "metric": "loss"}))
    w = load_file(done.directory / "model" / "model.safetensors")["w"]
    np.testing.assert_allclose(w, 3.0)


def sends(model):
    """Return a script that answers with ``model``."""
    return f"import hansa.client as flare\nimport numpy as np\nflare.init()\nm = flare.receive()\nflare.send({model})"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("print('hello')", "ended without calling hansa.client.init()"),
        ("import hansa.client as flare\nflare.init()\nflare.receive()", "returned before it answered"),
        ("import hansa.client as flare\nflare.receive()", "Call hansa.client.init() first"),
        ("import os\nos.kill(os.getpid(), 9)", "ended by signal 9"),
        (sends("flare.FLModel()"), "sent no parameters"),
        (sends("flare.FLModel(params={})"), "did not send the tensor 'w'"),
        (sends("flare.FLModel(params={**m.params, 'v': m.params['w']})"), "a tensor 'v', which the shared model"),
        (sends("flare.FLModel(params={'w': m.params['w'].T})"), "'w' with shape [3, 2]; it must be [2, 3]"),
        (sends("flare.FLModel(params=[1])"), "FLModel.params is a list"),
        (sends("flare.FLModel(params={'w': np.zeros((2, 3), complex)})"), "of dtype complex128"),
        (sends("flare.FLModel(params=m.params, metrics={'acc': 'good'})"), "metrics['acc'] is a str"),
        (sends("flare.FLModel(params=m.params, meta={'num_examples': 0})"), "weight (in meta) is 0.0"),
        (sends("flare.FLModel('WHOLE')"), "'WHOLE' is not a valid ParamsType"),
    ],
)
def test_mistakes_are_named(tmp_path, code, words):
    fails(tmp_path, code, words)


def test_nan_is_refused_by_name(tmp_path):
    nan = GOOD.replace("0.5 *", "float('nan') *")
    with pytest.raises(QuorumError, match=r"update's tensor 'w' is NaN or infinite"):
        run(a_job(tmp_path, nan))


def test_a_script_that_does_not_answer_is_ended(tmp_path):
    hang = (
        "import hansa.client as flare, time\nflare.init()\nflare.receive()\nprint('stuck', flush=True)\ntime.sleep(600)"
    )
    error = fails(tmp_path, hang, "did not answer for 2 s and was ended", recipe={"timeout_s": 2})
    assert "stuck" in error.message
    fails(tmp_path, "import time\ntime.sleep(600)", "did not answer for 1 s", recipe={"timeout_s": 1})
    fails(tmp_path, "import time\ntime.sleep(600)", "did not answer for 1 s", cohort={"deadline_s": 0.2})


def test_what_came_and_what_is_told(tmp_path):
    tell = """
    import json, os, sys
    import hansa.client as flare
    flare.init(); flare.init()
    while flare.is_running():
        m = flare.receive()
        assert flare.receive() is m and flare.is_running()
        told = [flare.system_info(), flare.get_job_id(), m.current_round, m.total_rounds, m.start_round,
                m.meta, flare.is_train(), flare.is_evaluate(), sorted(m.params), type(m.params["w"]).__name__,
                os.environ["HANSA_TRAIN"], os.environ["COLOUR"], sys.argv[1:], os.getcwd(), "torch" in sys.modules]
        with open("told.json", "w") as file: json.dump(told, file)
        flare.send(flare.FLModel(params=m.params, metrics={"x": 2}, meta={"num_examples": 7}))
    open("ended", "w").close()
    """
    (tmp_path / "a.csv").touch()
    job = a_job(
        tmp_path,
        tell,
        sites=None,
        recipe={"args": ["--x"], "env": {"COLOUR": "red"}},
        data={"train": {"berlin": "a.csv"}},
    )
    program = script.build(job)
    assert program.sites == ("berlin",)
    work = program.train("berlin", a_plan(program, 2), None)
    assert (work.num_examples, dict(work.sums)) == (7, {"x": 14, "x.count": 7})
    told = json.loads((tmp_path / "told.json").read_text())
    meta = told.pop(5)
    assert told == [
        {"site_name": "berlin", "job_id": "own"}, "own", 1, 2, 0, True, False, ["steps", "w"], "ndarray",
        str(tmp_path / "a.csv"), "red", ["--x"], str(tmp_path), False,
    ]  # fmt: skip
    assert meta["task"] == "train"
    assert 0 <= meta["seed"] < 2**32
    assert meta["train"]["lr"] == 1e-3
    evaluation = Plan("other", 2, "evaluate", 2, program.initial())
    assert program.evaluate("berlin", evaluation) == {"x": 14, "x.count": 7}
    assert program.summarise({"x": 14, "x.count": 7, "y": 1.0}) == {"x": 2}
    program.close()
    assert (tmp_path / "ended").exists(), "the script returned by itself"


def test_jobs_that_can_not_be(tmp_path):
    def refused(words, kind=JobError, **sections):
        with pytest.raises(kind, match=words):
            script.build(a_job(tmp_path, **sections)).initial()

    refused("needs its sites", sites=None)
    refused("names a site twice", sites=["a", "a"])
    refused("is no name for a site", sites=["a/b"])
    refused(r"no script .*trian.py.* Did you mean 'train.py'", recipe={"path": "trian.py"})
    refused("has no option 'arg'", recipe={"arg": []})
    refused("timeout_s must be above 0", recipe={"timeout_s": 0})
    refused("can't divide data.train", data={"train": "*.csv"})
    refused("can't divide data", partition="iid")
    refused("names the site 'c'", sites=["a"], data={"train": {"c": "x"}})
    refused("set model.factory", model={})
    refused("write FILE.py:CALLABLE", model={"factory": "nothing.py:f"})
    refused("no file .*no.safetensors", ModelError, model={"factory": "no.safetensors"})
    (tmp_path / "m.py").write_text(
        "x = 1\ndef none(): return None\ndef bad(): raise OSError('gone')\ndef stop(): exit(2)"
    )
    refused("no callable 'x'", model={"factory": "m.py:x"})
    refused("returned NoneType", ModelError, model={"factory": "m.py:none"})
    refused("OSError: gone", ModelError, model={"factory": "m.py:bad"})
    refused("SystemExit: 2", ModelError, model={"factory": "m.py:stop"})
    with pytest.raises(DataError, match="no data file"):
        script.build(a_job(tmp_path, sites=None, data={"train": {"a": "no.csv"}})).inspect("a")


def test_factories_are_seeded_by_the_job(tmp_path):
    code = "import numpy as np, helper\ndef draw(): return {'w': np.random.rand(3).astype('float32')}\n"
    (tmp_path / "m.py").write_text(code)
    (tmp_path / "helper.py").write_text("")
    job = a_job(tmp_path, model={"factory": "m.py:draw"})
    one, two = script.build(job).initial(), script.build(job).initial()
    other = script.build(job.model_copy(update={"seed": 1})).initial()
    assert one["w"].tobytes() == two["w"].tobytes() != other["w"].tobytes()


def test_outside_a_federation_init_says_so(tmp_path):
    code = "import hansa.client as flare\nflare.init()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HANSA_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "This script was not started by Hansa" in done.stderr


def test_the_client_is_light():
    code = "import sys, hansa.client; print([m for m in ('torch', 'pydantic', 'asyncio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_script_does_not_outlive_its_host(tmp_path):
    stuck = """
    import os, time
    import hansa.client as flare
    flare.init()
    flare.receive()
    open("pid", "w").write(str(os.getpid()))
    time.sleep(600)
    """
    a_job(tmp_path, stuck)
    host = """
    import sys, pathlib
    from hansa.core.config import parse
    from hansa.core.values import Plan
    from hansa.recipes import script
    job = parse({"name": "own", "recipe": {"name": "script", "path": "train.py", "sites": 1},
                 "model": {"factory": "first.safetensors"}, "directory": sys.argv[1]})
    program = script.build(job)
    program.train("site-1", Plan("own", 1, "train", 0, program.initial()), None)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(host), str(tmp_path)])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.02)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    until = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_rank_outlives_the_launcher(tmp_path):
    stuck = """
    import os, time
    import hansa.client as flare
    flare.init()
    open("pid" + os.environ["RANK"], "w").write(str(os.getpid()))
    flare.receive()
    time.sleep(600)
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fails(tmp_path, stuck, "did not answer for 15 s", recipe={"launch": launch, "timeout_s": 15})
    for rank in (0, 1):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int((tmp_path / f"pid{rank}").read_text())).wait(20)


@pytest.mark.parametrize("tensors", [None, "numpy", "torch"])
def test_tensors_and_arrays(tensors):
    import torch

    ours, theirs = socket.socketpair()
    host = Link(ours)
    session = api.Session(Link(theirs), {"site": "a"}, tensors)
    sent = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3, np.int64), "e": np.zeros((0, 2))}
    big = {"big": np.random.default_rng(0).standard_normal(3_000_000, np.float32)}
    sender = threading.Thread(target=host.send, args=(TASK, {"params": {**sent, **big}}))
    sender.start()
    received = session.receive()
    sender.join()
    kind = np.ndarray if tensors == "numpy" else torch.Tensor
    assert all(isinstance(leaf, kind) for leaf in received.params.values())
    model = flare.FLModel(
        params={**received.params, "half": torch.ones(2, dtype=torch.bfloat16)}, metrics={"x": torch.tensor(2.0)}
    )
    sender = threading.Thread(target=session.send, args=(model,))
    sender.start()
    answer, parts = host.receive()
    sender.join()
    assert answer == {"type": "result", "params_type": "FULL", "metrics": {"x": 2.0}, "meta": {}, "steps": None}
    back = parts["params"]
    assert back["half"].dtype.name == "bfloat16"
    for name, leaf in {**sent, **big}.items():
        assert back[name].dtype == leaf.dtype
        assert back[name].tobytes() == leaf.tobytes()
    with pytest.raises(SiteError, match="nothing to answer"):
        session.send(model)
    host.send({"type": "end"})
    assert not session.wait()
    with pytest.raises(SiteError, match="The federation has ended"):
        session.receive()
    host.close()


def test_optimizer_params_do_not_leave(recwarn):
    ours, theirs = socket.socketpair()
    host, session = Link(ours), api.Session(Link(theirs), {"site": "a"}, "numpy")
    host.send(TASK, {"params": {}})
    session.receive()
    session.send(flare.FLModel(params={}, optimizer_params={"m": 1}))
    assert "stay at the site" in str(recwarn.pop(UserWarning).message)
    host.send({"type": "end"})
    session.wait()
    host.close()


def test_errors_are_hansa_errors():
    with pytest.raises(HansaError, match="init"):
        flare.is_running()
