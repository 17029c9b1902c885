# SPDX-License-Identifier: Apache-2.0
"""What a site's owner does by hand: ``hansa site check``, ``show`` and ``attach``, as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest

from federations import loopback
from hansa import bundle
from hansa.core import config
from hansa.pki.kit import Kit
from hansa.pki.provision import provision
from hansa.site.warm import attach_folder
from shell import environment, job_file, process

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def fed(tmp_path):
    made = provision(tmp_path / "fed", "lab", "127.0.0.1:1", ["s0"], ["ana"])
    settings(made.sites["s0"], 'recipes = ["toys:build"]')
    return made


def settings(site: Path, *policy: str, more: str = "") -> None:
    text = ['server = "127.0.0.1:1"', "[policy]", *policy, more]
    (site / "site.toml").write_text("\n".join(text) + "\n")


def test_check_of_a_job_file(tmp_path, fed):
    site = str(fed.sites["s0"])
    done = process(tmp_path, "site", "check", job_file(tmp_path), "--dir", site, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["ok"] is True
    assert (found["job"], found["site"]) == ("toy", "s0")
    assert found["counts"] == {"train": 3, "test": 3}
    assert found["labels"] == {"even": 1, "odd": 2}
    assert found["examples"] == 3
    assert found["update_bytes"] > 32
    assert found["peak_bytes"] > 10 << 20
    assert not (fed.sites["s0"] / "work").exists(), "it leaves nothing"
    text = process(tmp_path, "site", "check", job_file(tmp_path), "--dir", site)
    assert text.code == 0
    assert "s0 would take part in toy" in text.out


def test_check_of_a_bundle(tmp_path, fed):
    job = config.load(tmp_path / job_file(tmp_path))
    path = tmp_path / "toy.zip"
    bundle.pack(job, path, Kit(fed.users["ana"]))
    done = process(tmp_path, "site", "check", str(path), "--dir", str(fed.sites["s0"]), "--json")
    assert done.code == 0, done.err
    assert done.json["signer"] == "ana"
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"xxxx")
    done = process(tmp_path, "site", "check", str(path), "--dir", str(fed.sites["s0"]), "--json")
    assert done.code in (8, 10)


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("recipes = []", {}, "not allowed"),
        ('recipes = ["toys:build"]\nmax_rounds = 1', {}, "allows 1"),
        ('recipes = ["toys:build"]\nrequire_filters = {clip = {max_norm = 1.0}}', {}, "the filter 'clip'"),
        ('recipes = ["toys:build"]\nmax_model_bytes = 50', {}, "allows 50"),
        ('recipes = ["toys:build"]', {"recipe": {"name": "toys:build", "faults": {"s0:1": "data"}}}, "lost its data"),
        ('recipes = ["toys:build"]', {"recipe": {"name": "toys:build", "faults": {"s0:1": "raise"}}}, "on fire"),
        ('recipes = ["toys:build"]', {"data": {"train": "site:notes"}}, "no data called 'notes'"),
        ('recipes = ["toys:build"]', {"strategy": {"name": "ours:x"}}, "code of its own"),
    ],
)
def test_check_ends_with_the_refusals_code(tmp_path, fed, policy, changes, message):
    settings(fed.sites["s0"], policy)
    job = {"baselines": {"base": True, "local": False}, **changes}
    done = process(tmp_path, "site", "check", job_file(tmp_path, **job), "--dir", str(fed.sites["s0"]), "--json")
    assert done.code == 6, done.err
    assert message in done.json["error"]["message"]


def test_check_as_if_somebody_had_signed(tmp_path, fed):
    settings(fed.sites["s0"], 'recipes = ["toys:build", "script"]', 'signers = ["ana"]')
    (tmp_path / "extra.py").write_text("")
    words = ("site", "check", job_file(tmp_path, files=["extra.py"]), "--dir", str(fed.sites["s0"]))
    assert "not signed" in process(tmp_path, *words).err
    assert process(tmp_path, *words, "--signer", "ana").code == 0


def test_show(tmp_path, fed):
    site = fed.sites["s0"]
    (tmp_path / "notes.jsonl").write_text("{}\n")
    settings(
        site, "max_rounds = 3", more=f'[data.notes]\ntrain = "{tmp_path}/*.jsonl"\n[data.gone]\ntrain = "gone.jsonl"'
    )
    outbox = site / "work" / "jobs" / "toy-0001" / "outbox"
    outbox.mkdir(parents=True)
    (outbox / ".begun.hansa").write_bytes(b"")
    (outbox / "task.hansa").write_bytes(b"x" * 10)
    done = process(tmp_path, "site", "show", str(site), "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["site"], found["federation"], found["roster"]) == ("s0", "lab", Kit(site).roster().version)
    assert found["settings"]["policy"]["max_rounds"] == 3
    assert found["data"] == {"gone": False, "notes": True}
    assert found["jobs"] == [{"job": "toy-0001", "bytes": 10, "waiting": 1}]
    text = process(tmp_path, "site", "show", str(site)).out
    assert "site:gone IS MISSING" in text
    assert "PRIVATE" not in text


def test_attach_to_nothing(tmp_path, fed):
    done = process(tmp_path, "site", "attach", "toy-0009", "--dir", str(fed.sites["s0"]), "--", "true")
    assert done.code == 2
    assert "no job 'toy-0009'" in done.err


SCRIPT = """
import sys
import numpy as np
import hansa.client as flare

flare.init()
print("site", flare.get_site_name(), *sys.argv[1:], flush=True)
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    params = {name: value + 1 for name, value in model.params.items()}
    flare.send(flare.FLModel(params_type=flare.ParamsType.FULL, params=params, metrics={"loss": 1.0}))
"""


async def test_a_process_of_the_owners_own_trains(tmp_path):
    """``hansa site attach JOBID -- python train.py``: the agent, the worker, and a process that neither started."""
    home = tmp_path / "job"
    home.mkdir()
    (home / "train.py").write_text(SCRIPT)
    (home / "start.py").write_text("import numpy as np\ndef make():\n    return {'w': np.zeros(3, np.float32)}\n")
    job = config.parse(
        {
            "name": "attached",
            "rounds": 2,
            "recipe": {"name": "script", "path": "train.py", "sites": ["s0"], "attached": True},
            "model": {"factory": "start.py:make"},
            "evaluation": {"every": 0},
            "baselines": {"base": False, "local": False},
            "directory": str(home),
        }
    )
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        lab.write("s0", recipes=["script"], signers=["ana"], job_paths=False)
        await lab.start("s0")
        id = await lead.submit(job)
        async with asyncio.timeout(60):
            while not (lab.site("s0") / "work" / "jobs" / id / "files" / "train.py").exists():
                await asyncio.sleep(0.05)
        place = attach_folder(lab.site("s0") / "work" / "jobs" / id, "s0")
        words = (
            "site",
            "attach",
            id,
            "--dir",
            str(lab.site("s0")),
            "--",
            sys.executable,
            str(home / "train.py"),
            "--x",
        )
        ours = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from hansa.cli.main import main; main()", *words),
            env=environment(),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            view = await lead.wait(id)
            assert view.line.state == "finished", view.line.error
            said, _ = await asyncio.wait_for(ours.communicate(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                ours.kill()
        assert said.decode() == "site s0 --x\n"
        assert ours.returncode == 0
        report = lab.made.server / "jobs" / id / "report.json"
        assert json.loads(report.read_text())["model"]["round"] == 2
        async with asyncio.timeout(60):
            while (lab.site("s0") / "work" / "jobs" / id).exists():
                await asyncio.sleep(0.05)
    assert not place.exists()
