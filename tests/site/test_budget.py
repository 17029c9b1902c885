# SPDX-License-Identifier: Apache-2.0
"""Privacy budgets at a deployed site: what is refused, what is charged, and what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import toys
from federations import Loopback, loopback
from hansa.bundle import Bundle
from hansa.core import config, wire
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.storage import load_tree
from hansa.errors import PolicyError, StorageError
from hansa.pki.authority import Authority
from hansa.pki.identity import Role
from hansa.pki.kit import Kit
from hansa.privacy import protect
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.ledger import Books, Budget, Charge
from hansa.privacy.plan import GRID
from hansa.runs import carrier
from hansa.simulation.run import run
from hansa.site import budget, policy
from hansa.site.settings import SiteSettings, load
from members import Members, members
from shell import environment, hansa

pytestmark = pytest.mark.timeout(120)

DELTA = 1e-5
LOCAL = {"mechanism": "local", "clip": 1.0, "noise_multiplier": 12.0, "delta": DELTA}
DP_SGD = {**LOCAL, "mechanism": "dp-sgd", "noise_multiplier": 1.0}
CENTRAL = {**LOCAL, "mechanism": "central"}
DP_FTRL = {**LOCAL, "mechanism": "dp-ftrl"}
DISTRIBUTED = {**LOCAL, "mechanism": "distributed"}
MASKS = {"metrics": {"loss_sum": 1e6, "examples": 1e6}, "corrupt": 0.25}


def settings(rules: dict | None = None, **values) -> SiteSettings:
    data = {"notes": {"train": "notes.jsonl"}, "free": {"train": "free.jsonl"}}
    return SiteSettings(server="127.0.0.1:1", data=data, privacy=rules or {}, **values)


def job(privacy: dict | None = LOCAL, data: str | None = "site:notes", **values) -> Job:
    section = {} if data is None else {"data": {"train": data}}
    return config.parse(
        {"name": "toy", "recipe": "causal-lm", "privacy": privacy, "baselines": {"local": False}, **section, **values}
    )


@pytest.fixture(scope="module")
def everybody(tmp_path_factory) -> Members:
    return members(tmp_path_factory.mktemp("federation"))


def decided(everybody: Members, asked: Job, rules: dict) -> None:
    policy.decide(Bundle(asked, everybody.lead.identity, {}, datetime.now(UTC)), "s0", settings(rules))


def budgets(**values) -> dict:
    return {"budgets": {"notes": {"epsilon": 3.0, "delta": DELTA, **values}}}


@pytest.mark.parametrize(
    ("asked", "rules", "reason"),
    [
        (job(None), {"require": ["dp-sgd", "local"]}, r"has no \[privacy\]; this site takes part with: dp-sgd, local"),
        (job(CENTRAL), {"require": ["dp-sgd"]}, "mechanism = 'central'; this site takes part with: dp-sgd"),
        (job(None), budgets(), r"has no \[privacy\], and 'notes' has a privacy budget"),
        (job(CENTRAL), budgets(), "for one example against the server. Use one of: distributed, dp-sgd, local"),
        (job(DP_FTRL), budgets(), "for one example against the server"),
        (job(DP_SGD), budgets(unit="user"), "for one user against the server. Use one of: distributed, local"),
        (job(CENTRAL), budgets(adversary="server-and-corrupt"), "Use one of: distributed, dp-sgd, local"),
        (job(data=None), budgets(), "does not say what it trains on"),
        (job(data="/data/notes.jsonl"), budgets(), "does not say what it trains on"),
        (job(baselines={"local": True}), budgets(), "baselines.local sends what no noise hides"),
        (job(baselines={"local": True}), {"require": ["local"]}, "baselines.local"),
    ],
)
def test_jobs_that_a_budget_does_not_take(everybody, asked, rules, reason):
    with pytest.raises(PolicyError, match=reason):
        decided(everybody, asked, rules)


@pytest.mark.parametrize(
    ("asked", "rules"),
    [
        (job(), budgets()),
        (job(DP_SGD), {"require": ["dp-sgd"], **budgets()}),
        (job(CENTRAL), budgets(adversary="sites")),
        (job(DP_FTRL), budgets(adversary="sites", unit="user")),
        (job(DISTRIBUTED), {"require": ["distributed"], **budgets(adversary="server-and-corrupt", unit="user")}),
        (job(None, data="site:free"), budgets()),
        (job(None, data=None), {}),
    ],
)
def test_jobs_that_it_takes(everybody, asked, rules):
    decided(everybody, asked, rules)


def test_pieces_of_ones_own_are_not_trusted_with_a_budget(everybody):
    rules = {"budgets": {"notes": {"epsilon": 3.0, "delta": DELTA}}}
    trusting = settings(rules, policy={"modules": ["ours:strategy"]})
    own = Bundle(job(strategy={"name": "ours:strategy"}), everybody.lead.identity, {}, datetime.now(UTC))
    required = settings({"require": ["local"]}, policy={"modules": ["ours:strategy"]})
    for site in (trusting, required):
        with pytest.raises(PolicyError, match="'ours:strategy' may not be among its strategies"):
            policy.decide(own, "s0", site)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[privacy.budgets.other]\nepsilon = 1.0\ndelta = 1e-5\n", "not under [data]: other"),
        ("[privacy.budgets.notes]\nepsilon = 1.0\n", "privacy.budgets.notes.delta"),
        ("[privacy.budgets.notes]\nepsilon = 0.0\ndelta = 1e-5\n", "privacy.budgets.notes.epsilon"),
        ("[policy]\njob_paths = true\n[privacy.budgets.notes]\nepsilon = 1.0\ndelta = 1e-5\n", "job_paths"),
        ('[data.twin]\ntrain = "n"\n[privacy.budgets.notes]\nepsilon = 1.0\ndelta = 1e-5\n', "by another name"),
        ('[privacy]\nrequire = ["dp"]\n', "privacy.require"),
        ("[privacy]\nepsilon = 1.0\n", "give epsilon and delta, or neither"),
    ],
)
def test_settings_that_would_not_hold(tmp_path, text, message):
    path = tmp_path / "site.toml"
    path.write_text(f'server = "a:1"\n[data.notes]\ntrain = "n"\n{text}')
    with pytest.raises(Exception, match="is not valid") as wrong:
        load(path)
    assert message in str(wrong.value)


ALLOWED = Budget(epsilon=3.0, delta=DELTA)
TRUSTING = ALLOWED.model_copy(update={"adversary": "sites"})
COLLUDING = ALLOWED.model_copy(update={"adversary": "server-and-corrupt"})


def account(everybody: Members, folder: Path, allowed: Budget = ALLOWED) -> budget.Account:
    return budget.Account(budget.ledger(folder, "notes", everybody.site), allowed, "d" * 64, "toy-0001")


def books(everybody: Members, folder: Path) -> Books:
    return budget.ledger(folder, "notes", everybody.site).read()


BOUNDS = frozenset({Trait.STEPWISE, Trait.BOUNDS_EXAMPLES})


@pytest.mark.parametrize(
    ("privacy", "unit", "release"),
    [
        (DP_SGD, "example", Release(1.0, 0.01, 25)),
        (LOCAL, "user", Release(6.0)),
        (CENTRAL, "user", Release(6.0)),
        (DP_FTRL, "user", Release(6.0)),
    ],
)
def test_what_a_round_is_charged(everybody, tmp_path, privacy, unit, release):
    asked = job(privacy, train={"batch_size": 40, "epochs": 0.25}, rounds=30)
    allowed = TRUSTING if privacy in (CENTRAL, DP_FTRL) else ALLOWED
    open_account = account(everybody, tmp_path, allowed)
    for task, round in (("t1", 1), ("t1", 1), ("t2", 2)):
        open_account.charge(asked, 4000, task, round)
    found = books(everybody, tmp_path).entries
    rounds = 1 if privacy is DP_FTRL else 2
    assert [(entry.unit, entry.release) for entry in found] == [(unit, release)] * rounds
    assert books(everybody, tmp_path).spent(allowed) == pytest.approx(
        epsilon([Release(release.noise_multiplier, release.rate, rounds * release.count)], DELTA)
    )


def test_an_update_of_other_examples_does_not_leave(everybody, tmp_path):
    asked = job(DP_SGD, train={"batch_size": 40, "steps": 5})
    open_account = account(everybody, tmp_path)
    open_account.charge(asked, 4000, "t1", 1)
    with pytest.raises(PolicyError, match="made from 2000 examples, and the site has 4000"):
        budget.check_examples(asked, 2000 / 1024, 4000)
    budget.check_examples(asked, 4000 / 1024, 4000)
    budget.check_examples(job(), 2000 / 1024, 4000)
    open_account.sent(asked, "t1")
    open_account.charge(asked, 4000, "t1", 1)
    assert len(books(everybody, tmp_path).entries) == 2


@pytest.mark.parametrize(
    ("asked", "examples", "reason"),
    [
        (job(DP_SGD), 0, "no examples"),
        (job({**LOCAL, "noise_multiplier": 0.1}), 4000, "budget of 'notes' does not allow this round"),
        (job({**LOCAL, "noise_multiplier": None, "epsilon": 1e-9, "delta": 1e-12}), 4000, "No noise multiplier"),
    ],
)
def test_nothing_is_charged_for_what_is_refused(everybody, tmp_path, asked, examples, reason):
    with pytest.raises(PolicyError, match=reason):
        account(everybody, tmp_path).charge(asked, examples, "t1", 1)
    assert books(everybody, tmp_path).entries == []


def test_the_site_checks_what_the_server_should_have_checked():
    budget.check_promise(job(DP_SGD), BOUNDS)
    for asked, traits in ((job(DP_SGD), {Trait.STEPWISE}), (job(DP_SGD, train={"clip_grad": 1.0}), BOUNDS)):
        with pytest.raises(PolicyError, match="does not keep the privacy that it promises"):
            budget.check_promise(asked, traits)


def test_the_ledger_is_signed_by_the_site(everybody, tmp_path):
    """Renewals and new keys are taken; another member's signature, or one that was revoked, is not."""
    authority = everybody.authority
    kit = authority.issue(tmp_path / "kit", Role.SITE, "renewed")
    account(everybody, tmp_path / "own").charge(job(), 4000, "t1", 1)
    for stranger in (everybody.lead, kit):
        stranger.update_roster(authority.roster.data)
        with pytest.raises(StorageError, match=r"notes\.head, was changed"):
            budget.ledger(tmp_path / "own", "notes", stranger).read()
    head = tmp_path / "own" / "ledger" / "notes.head"
    said = json.loads(head.read_bytes())
    head.write_bytes(json.dumps({**said, "signature": said["signature"][::-1]}).encode())
    with pytest.raises(StorageError, match=r"notes\.head, was changed"):
        books(everybody, tmp_path / "own")


def test_a_share_of_noise_counts_by_whom_it_is_to_hide_from(everybody, tmp_path):
    """Against the corrupt sites all of it, against all other sites one site's own share; the server's own noise not."""
    asked = job(DISTRIBUTED, secure_aggregation=MASKS)
    with pytest.raises(PolicyError, match=r"round 1 of toy-0001 would make it"):
        account(everybody, tmp_path).charge(asked, 10, "t1", 1, 25)
    open_account = account(everybody, tmp_path, COLLUDING)
    open_account.charge(asked, 10, "t1", 1, 9)
    (entry,) = books(everybody, tmp_path).entries
    assert (entry.unit, entry.release, entry.honest) == ("user", Release(6.0, grid=2 * GRID), 9)
    for adversary, noise in (("server-and-corrupt", 6.0), ("server", 2.0), ("sites", 2.0)):
        found = books(everybody, tmp_path).spent(ALLOWED.model_copy(update={"adversary": adversary}))
        assert found == pytest.approx(epsilon([Release(noise)], DELTA, "rdp"), rel=5e-3), adversary
    lines = books(everybody, tmp_path)
    trusting = Charge("e" * 64, "b-0001", "t1", 1, "central", "user", Release(50.0))
    assert lines.spent(TRUSTING, trusting) < 4
    assert lines.spent(ALLOWED, trusting) == float("inf")


FTRL = job({**DP_FTRL, "separation": 3, "participations": 2}, rounds=12)


@pytest.mark.parametrize(
    ("asked", "before", "round", "reason"),
    [
        (FTRL, (), 2, None),
        (FTRL, (2,), 2, None),
        (FTRL, (2,), 5, None),
        (FTRL, (2,), 4, "has trained round 2: dp-ftrl's noise is made for turns 3 rounds apart"),
        (FTRL, (5,), 3, "has trained round 5"),
        (FTRL, (2, 5), 8, "has trained 2 of the 2 that dp-ftrl's noise is made for"),
        (FTRL, (2, 5), 5, None),
        (job(CENTRAL, cohort={"sample": 0.1}), range(1, 10), 10, None),
        (job(CENTRAL, cohort={"sample": 0.1}), range(1, 13), 13, "in 13 of 13 rounds, and the job draws it with"),
        (job(CENTRAL, cohort={"sample": 0.1}), range(1, 13), 100, None),
        (job(CENTRAL, cohort={"sample": 1.0}), range(1, 200), 200, None),
        (job(None, cohort={"sample": 0.1}), range(1, 200), 200, None),
    ],
)
def test_a_site_is_asked_no_more_often_than_its_promise_allows(asked, before, round, reason):
    if reason is None:
        budget.check_turn(asked, set(before), round)
    else:
        with pytest.raises(PolicyError, match=reason):
            budget.check_turn(asked, set(before), round)


def test_chance_turns_away_no_honest_server():
    """The bound is above the true tail, so a site is asked in vain once in 2⁴⁰ at most."""
    for rounds, rate in ((1, 0.5), (20, 0.1), (300, 0.02), (300, 0.7)):
        for times in range(1, rounds + 1):
            assert budget._chance(times, rounds, rate) >= stats.binom(rounds, rate).sf(times - 1) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("asked", "examples", "release"),
    [
        (job(DP_SGD, train={"batch_size": 40, "epochs": 0.25}, rounds=3), 4000, Release(1.0, 0.01, 75)),
        (job(LOCAL, rounds=3), 0, Release(6.0, count=3)),
        (job(DP_FTRL, rounds=3), 0, Release(6.0)),
    ],
)
def test_a_job_that_would_spend_more_than_a_site_accepts(asked, examples, release):
    spent = epsilon([release], DELTA)
    budget.check_epsilon(asked, examples, spent * 1.001, DELTA)
    with pytest.raises(PolicyError, match="this site accepts at most"):
        budget.check_epsilon(asked, examples, spent * 0.999, DELTA)


# Deployed


def write(lab: Loopback, allowed: float) -> None:
    spend = f"{{ notes = {{ epsilon = {allowed}, delta = {DELTA} }} }}"
    rules = f'[data.notes]\ntrain = "notes.jsonl"\n[privacy]\nbudgets = {spend}\n'
    lab.write("s0", rules, job_paths=False)


def deployed(folder: Path, rounds: int, noise: float = 12.0, **recipe) -> Job:
    return toys.job(
        recipe={"sites": ["s0"], "trained": str(folder / "trained.txt"), **recipe},
        rounds=rounds,
        evaluation={"every": 0},
        directory=str(folder),
        data={"train": "site:notes"},
        privacy={**LOCAL, "noise_multiplier": noise},
        baselines={"local": False, "base": False},
    )


def kept(lab: Loopback) -> Books:
    return budget.ledger(lab.site("s0"), "notes", Kit(lab.site("s0"))).read()


def trained(folder: Path) -> Counter[str]:
    path = folder / "trained.txt"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


async def test_the_round_that_would_exceed_the_budget_is_not_trained(tmp_path):
    async with loopback(tmp_path) as lab:
        write(lab, epsilon([Release(6.0, count=5)], DELTA) + 1e-6)
        await lab.start("s0")
        first = await lab.run(deployed(tmp_path, rounds=3))
        assert first.line.state == "finished", first.line.error
        second = await lab.run(deployed(tmp_path, rounds=3))
        assert second.line.state == "failed"
        assert "privacy budget of 'notes' does not allow this round" in second.line.error
        assert trained(tmp_path) == Counter({"s0 1": 2, "s0 2": 2, "s0 3": 1})
        entries = kept(lab).entries
        assert [entry.round for entry in entries] == [1, 2, 3, 1, 2]
        assert len({entry.job for entry in entries}) == 2


async def test_a_job_without_privacy_is_refused_before_anything_runs(tmp_path):
    async with loopback(tmp_path) as lab:
        write(lab, 3.0)
        await lab.start("s0")
        view = await lab.run(deployed(tmp_path, rounds=1).model_copy(update={"privacy": None}))
        assert view.line.state == "failed"
        assert "has no [privacy], and 'notes' has a privacy budget" in view.line.error
        assert trained(tmp_path) == Counter()
        assert kept(lab).entries == []


@contextlib.contextmanager
def agent(folder: Path, prelude: str = ""):
    """Run a site's agent as a process of its own, which is killed at the end."""
    command = [
        sys.executable,
        "-c",
        f"{prelude}\nfrom hansa.cli.main import main; main()",
        "site",
        "start",
        str(folder),
    ]
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(command, env=environment(), stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


async def until(true) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


KILLED = """
import os, signal
from hansa.site.budget import Account
step = Account.{step}
def killed(self, *args):
    if {before}: os.kill(os.getpid(), signal.SIGKILL)
    step(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
Account.{step} = killed
"""
"""A kill around a step of the account."""


@pytest.mark.parametrize(
    ("step", "before", "charges", "trainings"),
    [("charge", True, 1, 1), ("charge", False, 1, 1), ("sent", True, 1, 2), ("sent", False, 2, 2)],
)
async def test_a_kill_at_each_step_leaves_no_training_uncharged(tmp_path, step, before, charges, trainings):
    """What is trained again is charged again only where an update may have left."""
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        write(lab, 50.0)
        with agent(lab.site("s0"), KILLED.format(step=step, before=before)) as process:
            id = await lead.submit(deployed(tmp_path, rounds=1))
            await until(lambda: process.poll() is not None)
        with agent(lab.site("s0")):
            view = await lead.wait(id)
            assert view.line.state == "finished", view.line.error
        assert len(kept(lab).entries) == charges
        assert trained(tmp_path) == Counter({"s0 1": trainings})


NOTED = """
import os, signal
from hansa.site.{module} import {kind}
step = {kind}.{step}
def killed(self, *args):
    step(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
{kind}.{step} = killed
"""
"""A kill while a finished update becomes an answer."""


@pytest.mark.parametrize(
    ("module", "kind", "step", "charges"), [("outbox", "Outbox", "keep", 2), ("history", "History", "note", 1)]
)
async def test_a_kill_between_note_and_answer_costs_neither_the_round_nor_a_second_draw(
    tmp_path, module, kind, step, charges
):
    """What was noted is the answer; what was not is made again, with noise of its own, and charged again."""
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        write(lab, 50.0)
        with agent(lab.site("s0"), NOTED.format(module=module, kind=kind, step=step)) as process:
            id = await lead.submit(deployed(tmp_path, rounds=1))
            await until(lambda: process.poll() is not None)
        (made,) = (lab.site("s0") / "work" / "jobs" / id / "outbox").glob(".*.hansa")
        update = wire.Spooled(made)
        drawn = np.asarray(update.parts["delta"]["w"]) / update.header.weight
        with agent(lab.site("s0")):
            view = await lead.wait(id)
        assert view.line.state == "finished", view.line.error
        assert view.records[0]["accepted"] == ["s0"]
        assert len(kept(lab).entries) == charges == trained(tmp_path)["s0 1"]
        model = load_tree(lab.made.server / "jobs" / id / "model" / "model.safetensors")["w"]
        assert np.allclose(model, drawn, rtol=1e-6) == (charges == 1)


async def test_a_kill_while_it_trains_charges_once(tmp_path):
    """Killed while it trains; the update is made again, and each round has one charge and left once."""
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        write(lab, 50.0)
        with agent(lab.site("s0")):
            id = await lead.submit(deployed(tmp_path, rounds=3, delay_s=0.3))
            await until(lambda: len(kept(lab).entries) == 2)
        assert trained(tmp_path)["s0 2"] == 0
        with agent(lab.site("s0")):
            view = await lead.wait(id)
            assert view.line.state == "finished", view.line.error
        assert [entry.round for entry in kept(lab).entries] == [1, 2, 3]
        assert len(kept(lab).lines) == 6


async def test_nothing_is_trained_on_a_ledger_that_was_tampered_with(tmp_path, caplog):
    async with loopback(tmp_path) as lab:
        write(lab, 50.0)
        await lab.start("s0")
        view = await lab.run(deployed(tmp_path, rounds=1))
        assert view.line.state == "finished", view.line.error
        path = lab.site("s0") / "ledger" / "notes.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":6.0', b'"noise_multiplier":9.0'))
        view = await lab.run(deployed(tmp_path, rounds=1))
        assert view.line.state == "failed"
        assert "ledger of the data is damaged" in view.line.error
        assert "line 1 was changed" in caplog.text
        assert trained(tmp_path) == Counter({"s0 1": 1})


@contextlib.asynccontextmanager
async def at_a_clinic(folder: Path, **sections):
    """A site with a budget and a table of 50 rows, and a job under dp-sgd that trains on them."""
    values = {
        "name": "heart",
        "rounds": 1,
        "data": {"train": "site:notes"},
        "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 5},
        "evaluation": {"every": 0},
        "privacy": {**DP_SGD, "noise_multiplier": 4.0},
        "baselines": {"local": False, "base": False},
        "directory": str(folder),
        **sections,
    }
    async with loopback(folder) as lab:
        write(lab, 9.0)
        (lab.site("s0") / "notes.csv").write_text("age,sick\n" + "".join(f"{i / 50},{i % 2}\n" for i in range(50)))
        text = (lab.site("s0") / "site.toml").read_text().replace("notes.jsonl", "notes.csv")
        text = text.replace('"toys:build"', f'"{values["recipe"]["name"]}"')
        (lab.site("s0") / "site.toml").write_text(f'{text}\nsigners = ["ana"]\n')
        await lab.start("s0")
        yield lab, config.parse(values)


async def test_dp_sgd_is_charged_by_the_examples_that_it_trains_on(tmp_path):
    asked = {
        "rounds": 2,
        "recipe": {"name": "tabular-classification", "features": ["age"], "offset": [0.5], "scale": [0.3]},
        "data": {"train": "site:notes", "columns": {"label": "sick"}, "labels": ["0", "1"]},
        "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4},
    }
    async with at_a_clinic(tmp_path, **asked) as (lab, job):
        view = await lab.run(job)
        assert view.line.state == "finished", view.line.error
        found = kept(lab).entries
        assert [(entry.round, entry.unit, entry.release) for entry in found] == [
            (1, "example", Release(4.0, 0.1, 10)),
            (2, "example", Release(4.0, 0.1, 10)),
        ]


SCRIPT = """
import os
import torch
from torch.utils.data import DataLoader, TensorDataset
import hansa.client as flare

def make():
    return torch.nn.Linear(1, 2)

if __name__ == "__main__":
    flare.init()
    rows = [line.split(",") for line in open(os.environ["HANSA_TRAIN"])][1:]
    data = TensorDataset(torch.tensor([[float(age)] for age, _ in rows]), torch.tensor([int(s) for _, s in rows]))
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = flare.prepare(model, optimizer, DataLoader(data))
    while flare.is_running():
        model.load_state_dict(flare.receive().params)
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), metrics={"loss": 1.0}))
"""


UNPREPARED = """
import numpy as np
import hansa.client as flare

def make():
    return {"w": np.zeros(3, np.float32)}

if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        flare.send(flare.FLModel(params_type=flare.ParamsType.FULL, params=flare.receive().params))
"""


def scripted(folder: Path, script: str, **recipe):
    """Sections of a job that trains by a script."""
    (folder / "train.py").write_text(script)
    recipe = {"name": "script", "path": "train.py", "steps": "prepared", "examples": 50, **recipe}
    return {"recipe": recipe, "model": {"factory": "train.py:make"}}


async def test_a_script_under_dp_sgd_is_charged_by_what_its_job_says_of_its_data(tmp_path):
    async with at_a_clinic(tmp_path, **scripted(tmp_path, SCRIPT)) as (lab, asked):
        view = await lab.run(asked)
        assert view.line.state == "finished", view.line.error
        (entry,) = kept(lab).entries
        assert (entry.unit, entry.release) == ("example", Release(4.0, 0.1, 10))


@pytest.mark.parametrize("script", [SCRIPT, UNPREPARED], ids=["prepared", "unprepared"])
async def test_a_process_of_the_owners_own_under_dp_sgd(tmp_path, script):
    """Charged like any other; without the prepared steps nothing is sent, and why is told to the owner alone."""
    sections = scripted(tmp_path, script, attached=True)
    async with at_a_clinic(tmp_path, **sections) as (lab, asked), lab.lead() as lead:
        id = await lead.submit(asked)
        await until(lambda: (lab.site("s0") / "work" / "jobs" / id / "files" / "train.py").exists())
        command = ["site", "attach", id, "--dir", str(lab.site("s0")), "--", sys.executable, str(tmp_path / "train.py")]
        ours = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from hansa.cli.main import main; main()", *command),
            env={**environment(), "HANSA_TRAIN": str(lab.site("s0") / "notes.csv")},
        )
        try:
            view = await lead.wait(id)
        finally:
            with contextlib.suppress(ProcessLookupError):
                ours.kill()
            await ours.wait()
        (entry,) = kept(lab).entries
        assert (entry.unit, entry.release) == ("example", Release(4.0, 0.1, 10))
        if script == SCRIPT:
            assert view.line.state == "finished", view.line.error
            assert "train_loss" not in view.records[0]["metrics"]
        else:
            assert view.line.state == "failed"
            assert "s0: refused: The attached process has gone" in view.line.error


async def test_a_required_mechanism_that_the_training_code_does_not_have(tmp_path, monkeypatch):
    """The server takes the job, and the site finds that its program knows nothing of dp-sgd."""
    monkeypatch.setattr(carrier, "check", lambda *args: None)
    async with loopback(tmp_path) as lab:
        lab.write("s0", "[privacy]\nrequire = ['dp-sgd']\n")
        await lab.start("s0")
        asked = deployed(tmp_path, rounds=1).model_dump(mode="json")
        view = await lab.run(config.parse({**asked, "data": None, "privacy": DP_SGD}))
        assert view.line.state == "failed"
        assert "does not keep the privacy that it promises" in view.line.error
        assert trained(tmp_path) == Counter()


async def test_what_a_job_promises_is_checked_where_nothing_is_required(tmp_path, monkeypatch):
    """A lead's job says dp-sgd, its program knows nothing of it, and a server lets it pass."""
    monkeypatch.setattr(carrier, "check", lambda *args: None)
    async with loopback(tmp_path) as lab:
        lab.write("s0")
        await lab.start("s0")
        asked = deployed(tmp_path, rounds=1).model_dump(mode="json")
        view = await lab.run(config.parse({**asked, "data": None, "privacy": DP_SGD}))
        assert view.line.state == "failed"
        assert "does not keep the privacy that it promises" in view.line.error
        assert trained(tmp_path) == Counter()


async def test_noise_that_hides_nothing_does_not_pass_for_a_mechanism(tmp_path):
    async with loopback(tmp_path) as lab:
        lab.write("s0", f"[privacy]\nrequire = ['local']\nepsilon = 4.0\ndelta = {DELTA}\n")
        await lab.start("s0")
        asked = deployed(tmp_path, rounds=1, noise=1e-6).model_dump(mode="json")
        view = await lab.run(config.parse({**asked, "data": None}))
        assert view.line.state == "failed"
        assert "this site accepts at most 4 of one job" in view.line.error
        assert trained(tmp_path) == Counter()


async def test_a_server_that_asks_too_often_is_refused_by_what_the_site_remembers(tmp_path, monkeypatch):
    """The server takes dp-ftrl's sites in every round; the agent is started anew in between."""
    monkeypatch.setattr(protect, "_turn", lambda sites, *rest: tuple(sites))
    asked = deployed(tmp_path, rounds=4).model_dump(mode="json")
    private = {**DP_FTRL, "separation": 2}
    async with loopback(tmp_path) as lab, lab.lead() as lead:
        lab.write("s0")
        with agent(lab.site("s0")):
            id = await lead.submit(config.parse({**asked, "data": None, "privacy": private}))
            await until(lambda: trained(tmp_path)["s0 1"] == 1)
        with agent(lab.site("s0")):
            view = await lead.wait(id)
        assert view.line.state == "failed"
        assert "has trained round 1: dp-ftrl's noise is made for turns 2 rounds apart" in view.line.error
        assert trained(tmp_path)["s0 2"] == 0


# Distributed noise

FOUR = ("s00", "s01", "s02", "s03")


def shared(folder: Path, noise: float, rounds: int, **data) -> Job:
    return toys.job(
        recipe={"name": "toys:many", "num_sites": 4},
        rounds=rounds,
        evaluation={"every": 0},
        directory=str(folder),
        output={"dir": str(folder / "runs")},
        privacy={**DISTRIBUTED, "noise_multiplier": noise},
        secure_aggregation=MASKS,
        baselines={"local": False, "base": False},
        **data,
    )


@contextlib.asynccontextmanager
async def four(folder: Path, allowed: float):
    """A federation whose sites keep a budget against the server and one of them."""
    async with loopback(folder, FOUR) as lab:
        spend = f"epsilon = {allowed!r}, delta = {DELTA}, unit = 'user', adversary = 'server-and-corrupt'"
        rules = (
            f"[data.notes]\ntrain = 'n'\n[privacy]\nrequire = ['distributed']\nbudgets = {{ notes = {{ {spend} }} }}\n"
        )
        for site in FOUR:
            lab.write(site, rules, job_paths=False, recipes=["toys:many"])
        await asyncio.gather(*map(lab.start, FOUR))
        yield lab


async def test_distributed_noise_is_charged_and_the_model_is_a_simulations(tmp_path, capsys, monkeypatch):
    """Noise far below the grid is all zeros, so the bits are those of `hansa run`; the charge is the job's."""
    async with four(tmp_path, 1e60) as lab:
        view = await lab.run(shared(tmp_path, 1e-12, 2, data={"train": "site:notes"}))
        assert view.line.state == "finished", view.line.error
        found = (lab.made.server / "jobs" / view.line.job / "model" / "model.safetensors").read_bytes()
        simulated = await asyncio.to_thread(run, shared(tmp_path, 1e-12, 2))
        assert found == (simulated.directory / "model" / "model.safetensors").read_bytes()
        for site in FOUR:
            (item,) = hansa(capsys, monkeypatch, "site", "budget", str(lab.site(site)), "--json").json["budgets"]
            (charged,) = item["jobs"]
            assert (charged["job"], charged["mechanism"], charged["charges"]) == (view.line.job, "distributed", 2)
            assert item["spent"] == pytest.approx(epsilon([Release(5e-13, count=2, grid=2 * GRID)], DELTA))


async def test_a_round_of_distributed_noise_beyond_the_budget_is_not_trained(tmp_path):
    """Of four sites one may be corrupt, so three shares are asked for a sum and two of them are all of the noise."""
    allowed = epsilon([Release(6.0, grid=2 * GRID)], DELTA)
    async with four(tmp_path, allowed * 1.001) as lab:
        view = await lab.run(shared(tmp_path, 12.0, 2, data={"train": "site:notes"}))
        assert view.line.state == "failed"
        assert "privacy budget of 'notes' does not allow this round" in view.line.error
        for site in FOUR:
            books = budget.ledger(lab.site(site), "notes", Kit(lab.site(site))).read()
            assert [(entry.round, entry.honest) for entry in books.entries] == [(1, 2)]


# hansa site budget


@pytest.fixture
def spent_at(tmp_path) -> Path:
    """A site that has spent on two jobs, and on data that have no budget any more."""
    kit = members(tmp_path / "federation").site
    folder = kit.directory
    (folder / "site.toml").write_text(
        'server = "127.0.0.1:1"\n[data.notes]\ntrain = "notes.jsonl"\n'
        f"[privacy.budgets.notes]\nepsilon = 3.0\ndelta = {DELTA}\n"
    )
    for data, id, tasks in (("notes", "a-0001", 2), ("notes", "b-0001", 1), ("old", "c-0001", 1)):
        for task in range(tasks):
            charge = Charge(id, id, f"t{task}", task + 1, "local", "user", Release(9.0))
            budget.ledger(folder, data, kit).charge(charge, ALLOWED)
    return folder


def test_the_command_shows_what_is_spent(spent_at, capsys, monkeypatch):
    shown = hansa(capsys, monkeypatch, "site", "budget", str(spent_at), "--json")
    assert shown.code == 0
    notes, old = shown.json["budgets"]
    assert notes["spent"] == pytest.approx(epsilon([Release(9.0, count=3)], DELTA))
    assert (notes["data"], notes["budget"]["epsilon"], notes["lines"], notes["intact"]) == ("notes", 3.0, 3, True)
    by_job = {job["job"]: (job["charges"], job["spent"]) for job in notes["jobs"]}
    assert by_job["a-0001"] == (2, pytest.approx(epsilon([Release(9.0, count=2)], DELTA)))
    assert by_job["b-0001"] == (1, pytest.approx(epsilon([Release(9.0)], DELTA)))
    assert (old["data"], old["budget"], old["jobs"][0]["charges"]) == ("old", None, 1)
    text = hansa(capsys, monkeypatch, "site", "budget", str(spent_at)).out
    assert f"notes: ε = {notes['spent']:.4g} of 3 is spent, at δ = 1e-05, for one example, against the server" in text
    assert "  a-0001: local, 2 charges, ε = " in text
    assert "old: no budget any more; 1 lines are kept" in text


def test_the_command_finds_tampering(spent_at, capsys, monkeypatch):
    sound = hansa(capsys, monkeypatch, "site", "budget", str(spent_at), "--verify")
    assert sound.code == 0
    assert "notes: 3 lines, as they were written; SHA-256 " in sound.out
    path = spent_at / "ledger" / "notes.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    for words in ([], ["--verify"], ["--json"]):
        found = hansa(capsys, monkeypatch, "site", "budget", str(spent_at), *words)
        assert found.code == StorageError.exit_code
        assert "line 3 is missing; 3 were written" in found.err + found.out
        assert "old" in found.out


def test_a_ledger_whose_key_is_gone_is_sealed_by_its_owner(spent_at, tmp_path, capsys, monkeypatch):
    site = Authority(tmp_path / "federation" / "authority").issue(tmp_path / "new", Role.SITE, "hospital-c")
    (tmp_path / "new" / "site.toml").write_bytes((spent_at / "site.toml").read_bytes())
    (spent_at / "ledger").rename(tmp_path / "new" / "ledger")
    folder = str(site.directory)
    assert "was changed" in hansa(capsys, monkeypatch, "site", "budget", folder).err
    wrong = hansa(capsys, monkeypatch, "site", "budget", folder, "--seal", "note")
    assert (wrong.code, "Did you mean 'notes'" in wrong.err) == (2, True)
    for data in ("notes", "old"):
        hansa(capsys, monkeypatch, "site", "budget", folder, "--seal", data)
    assert hansa(capsys, monkeypatch, "site", "budget", folder, "--verify").code == 0
    path = tmp_path / "new" / "ledger" / "notes.jsonl"
    path.write_bytes(path.read_bytes().replace(b"9.0", b"99."))
    assert hansa(capsys, monkeypatch, "site", "budget", folder, "--seal", "notes").code == StorageError.exit_code


def test_a_site_without_budgets(tmp_path, capsys, monkeypatch):
    folder = members(tmp_path / "federation").site.directory
    (folder / "site.toml").write_text('server = "127.0.0.1:1"\n')
    shown = hansa(capsys, monkeypatch, "site", "budget", str(folder))
    assert (shown.code, shown.out.strip()) == (0, "No budgets, and no ledgers.")
    assert not (folder / "ledger").exists()
