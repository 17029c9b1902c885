# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation over the network: the simulation's model, whoever is killed when, and who can't take part."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

import hidden
import phases
import toys
from federations import Loopback, loopback
from hansa.core.config import Job, OutputSection
from hansa.core.ports import MaskPhase
from hansa.errors import AccessError
from hansa.lab import lab
from hansa.pki.kit import Kit
from hansa.recipes import sums
from hansa.runs.masking import settled
from hansa.secagg import protocol
from hansa.secagg.agreement import terms
from hansa.server import remote, service
from hansa.simulation.run import run
from hansa.site import joined
from hansa.workers.runner import Course, SiteRunner
from hansa.workflows.secure import bounds_of
from hidden import METRICS, SITES, attended, meddling, weights

PHASES = get_args(MaskPhase)

pytestmark = pytest.mark.timeout(120)


def job(**values):
    recipe = {"name": "toys:many", "num_sites": 4, **values.pop("recipe", {})}
    section = values.pop("secure_aggregation", {})
    if section is not None:
        section = {"metrics": METRICS, "corrupt": 0.0, **section}
    defaults = {"rounds": 1, "cohort": {"quorum": 0.5}, "secure_aggregation": section}
    return toys.job(recipe=recipe, **{**defaults, **values})


def calm(tmp_path: Path, **values) -> Job:
    """Return the same job for a simulation."""
    return job(output={"dir": str(tmp_path / "simulated")}, **values)


async def equals_a_simulation(tmp_path: Path, federation: Loopback, view, **values) -> None:
    await hidden.equals_a_simulation(federation, view, calm(tmp_path, **values), within=1e-7)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
async def test_the_model_is_that_of_a_simulation_and_nobody_sees_a_sites_loss(tmp_path, strategy):
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        asked = job(rounds=2, strategy=strategy, baselines={"base": True, "local": False})
        async with federation.lead() as lead:
            id = await lead.submit(asked)
            told = [event.text async for event in lead.events(id)]
            view = await lead.show(id)
        await equals_a_simulation(tmp_path, federation, view, rounds=2, strategy=strategy)
        for record in view.records:
            assert record["accepted"] == list(SITES)
            assert record["site_metrics"] == {}
            assert {"loss", "train_loss"} <= record["metrics"].keys()
        assert not [line for line in told if "loss" in line and any(site in line for site in SITES)]
        assert not list((federation.made.server / "jobs" / id / "work").rglob("secure.*"))
        assert not list((tmp_path / "fed").rglob("identities.key")), "the mark of simulated identities"
        for site in SITES:
            states = list(federation.site(site).rglob("*.secagg"))
            assert [folder.stat().st_mode & 0o77 for folder in states] == [0], states


async def test_a_job_that_does_not_say_is_masked_with_the_bits_of_its_simulation(tmp_path, monkeypatch):
    """What its submitter signs says so; the simulation makes no keys."""
    monkeypatch.setitem(sums._DECLARED, "toys:many", lambda job: METRICS)
    asked = job(rounds=2, secure_aggregation=None)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(settled(asked, len(SITES)))
        assert view.line.state == "finished", view.line.error
        found = weights(federation.made.server / "jobs" / view.line.job)
    calm = await asyncio.to_thread(run, asked.model_copy(update={"output": OutputSection(dir=str(tmp_path / "calm"))}))
    assert np.array_equal(found, weights(calm.directory))
    for mine, theirs in zip(view.records, calm.records, strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert (mine["site_metrics"], theirs["site_metrics"].keys()) == ({}, set(SITES))
    assert not list(calm.directory.rglob("identities.key"))


async def test_messages_that_are_too_large_to_go_with_an_agenda(tmp_path, monkeypatch):
    """As the roll of 1,100 sites is: it is fetched in pieces, and what a site allows of a model does not bound it."""
    largest = {}

    def seen(phase, letters):
        largest[phase] = max(len(letter) for letter in letters.values())
        return letters

    meddling(monkeypatch, seen)
    monkeypatch.setattr(service, "INLINE_BYTES", 50)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation, max_model_bytes=4_000)
        view = await federation.run(job())
        assert view.line.state == "finished", view.line.error
        found = weights(federation.made.server / "jobs" / view.line.job)
    assert largest["share"] > 4_000
    assert min(largest.values()) > 50
    assert np.array_equal(found, await hidden.simulated(calm(tmp_path)))


async def test_a_site_that_is_gone_after_it_dealt_shares_is_recovered(tmp_path, monkeypatch):
    """It is killed for good while it trains: its masks are taken off the others' sum."""
    struck, perform = asyncio.Event(), joined.JoinedJob._perform

    async def gone(self, job, given, *rest):
        if self._site == "s03":
            struck.set()
            await asyncio.Event().wait()
        return await perform(self, job, given, *rest)

    monkeypatch.setattr(joined.JoinedJob, "_perform", gone)
    async with loopback(tmp_path, SITES, lease_s=4.0) as federation, federation.lead() as lead:
        await attended(federation)
        id = await lead.submit(job())
        await struck.wait()
        await federation.stop("s03")
        view = await lead.wait(id)
        await equals_a_simulation(tmp_path, federation, view, recipe={"faults": {"s03:1": "raise"}})
    assert view.records[0]["accepted"] == ["s00", "s01", "s02"]
    assert [(absent["site"], absent["kind"]) for absent in view.records[0]["absent"]] == [("s03", "lost")]


async def test_an_agent_that_dies_in_every_phase_goes_on(tmp_path, monkeypatch):
    """Each time before its answer is on the disk, after its state is."""
    due, struck, exchange = list(PHASES), asyncio.Event(), joined.JoinedJob._exchange

    async def deadly(self, connection, job, given):
        answer = await exchange(self, connection, job, given)
        if self._site == "s01" and due and given.kind == due[0]:
            del due[0]
            struck.set()
            await asyncio.Event().wait()
        return answer

    monkeypatch.setattr(joined.JoinedJob, "_exchange", deadly)
    async with loopback(tmp_path, SITES) as federation, federation.lead() as lead:
        await attended(federation)
        id = await lead.submit(job())
        for _ in PHASES:
            await struck.wait()
            struck.clear()
            await federation.stop("s01")
            await federation.start("s01")
        view = await lead.wait(id)
        await equals_a_simulation(tmp_path, federation, view)
    assert view.records[0]["accepted"] == list(SITES)
    assert view.records[0]["absent"] == []


def halting(monkeypatch, due: list[tuple[str, str]]) -> threading.Event:
    """Have the job halt when a phase of a task's sum has been answered, one after the other, and tell of it."""
    struck, exchange = threading.Event(), remote.RemoteLine.exchange

    async def deadly(self, plan, phase, letters):
        answers = await exchange(self, plan, phase, letters)
        if due and (phase, plan.task) == due[0]:
            del due[0]
            struck.set()
            await asyncio.Event().wait()
        return answers

    monkeypatch.setattr(remote.RemoteLine, "exchange", deadly)
    return struck


async def test_a_server_that_stops_when_the_sum_is_known_goes_on(tmp_path, monkeypatch):
    """The round's, while that of its evaluation is to be unmasked; for the phases before see SIGKILL below."""
    struck = halting(monkeypatch, [("vote", "evaluate")])
    async with Loopback(tmp_path, SITES) as federation:
        async with federation.serving():
            await attended(federation)
            async with federation.lead() as lead:
                id = await lead.submit(job())
            await asyncio.to_thread(struck.wait, 60)
        async with federation.serving(), federation.lead() as lead:
            view = await lead.wait(id)
    await equals_a_simulation(tmp_path, federation, view)
    assert view.records[0]["accepted"] == list(SITES)


async def test_a_server_that_has_lost_its_work_goes_on_with_other_keys(tmp_path, monkeypatch):
    """As one does that moves to another machine, with the database, in its second attempt at the round."""
    struck = halting(monkeypatch, [("share", "train"), ("vote", "train")])
    async with Loopback(tmp_path, SITES) as federation:
        async with federation.serving():
            await attended(federation)
            async with federation.lead() as lead:
                id = await lead.submit(job())
            await asyncio.to_thread(struck.wait, 60)
        struck.clear()
        async with federation.serving():
            await asyncio.to_thread(struck.wait, 60)
        shutil.rmtree(federation.made.server / "jobs" / id / "work")
        async with federation.serving(), federation.lead() as lead:
            view = await lead.wait(id)
    await equals_a_simulation(tmp_path, federation, view)
    assert view.records[0]["accepted"] == list(SITES)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A lab of five sites, whose server works on a job for each phase at a time; and the job."""
    asked = job(recipe={"num_sites": 5}, evaluation={"every": 0}, directory=str(tmp_path_factory.mktemp("job")))
    with lab(asked, settings={"lease_s": 8.0, "max_running_jobs": len(phases.PHASES)}) as federation:
        yield federation, asked


def led(stack, federation, asked, held) -> dict[str, phases.Led]:
    """Submit a job for each phase and lead it there, first the one that trains: it takes no thread of the agents."""
    gates = sorted(set(asked.cohort.sites or federation.sites) - set(held))
    found = {}
    for number, phase in enumerate(sorted(phases.PHASES, key=lambda phase: phase != "train")):
        id = federation.federation.submit(asked)
        turn = [gates[number % len(gates)], gates[(number + 1) % len(gates)]]
        found[phase] = stack.enter_context(closing(phases.Led(federation, id, phase, held, turn)))
    for each in found.values():
        each.lead()
    return found


def ended(federation, jobs) -> dict[str, tuple[dict, np.ndarray]]:
    """Wait for all jobs; return what each one's round was and the model that it ended with."""
    views = {phase: federation.federation.wait(each.id) for phase, each in jobs.items()}
    assert {view.line.state for view in views.values()} == {"finished"}, [view.line.error for view in views.values()]
    models = {phase: weights(federation.folder("server") / "jobs" / each.id) for phase, each in jobs.items()}
    return {phase: (view.records[0], models[phase]) for phase, view in views.items()}


@pytest.mark.timeout(300)
def test_sigkill_of_two_of_five_sites_in_every_phase(five, tmp_path):
    """Agents and workers, for good. Until they have sent they are left out of the sum; later the others unmask it."""
    federation, asked = five
    gone = ["s03", "s04"]
    with ExitStack() as stack:
        jobs = led(stack, federation, asked, gone)
        phases.kill(federation, *gone)
        found = ended(federation, jobs)
    faults = {True: {}, False: {f"{site}:1": "raise" for site in gone}}
    expected = {
        late: run(job(recipe={"num_sites": 5, "faults": fault}, output={"dir": str(tmp_path / str(late))}))
        for late, fault in faults.items()
    }
    for phase, (record, model) in found.items():
        calm = expected[phase in ("vote", "reveal")]
        assert record["accepted"] == calm.records[0]["accepted"], phase
        assert {(absent["site"], absent["kind"]) for absent in record["absent"]} == {(site, "lost") for site in gone}, (
            phase
        )
        assert np.array_equal(model, weights(calm.directory)), phase


@pytest.mark.timeout(300)
def test_sigkill_of_the_server_in_every_phase(five, tmp_path):
    """Until the survivors are fixed it begins another attempt, with other keys; later it goes on with the same one.

    So it does, with the database alone, where it has lost its work.
    """
    federation, asked = five
    three = asked.model_copy(update={"cohort": asked.cohort.model_copy(update={"sites": ["s00", "s01", "s02"]})})
    with ExitStack() as stack:
        jobs = led(stack, federation, three, ["s02"])
        federation.kill("server")
        for each in jobs.values():
            each.release()
        shutil.rmtree(federation.folder("server") / "jobs" / jobs["share"].id / "work")
        settings = federation.folder("server") / "server.toml"  # agents may pause for longer than that lease
        settings.write_text(settings.read_text().replace("lease_s = 8.0", "lease_s = 60.0"))
        federation.start("server")
        found = ended(federation, jobs)
        sessions = {phase: each.sessions("s00") for phase, each in jobs.items()}
    calm = run(job(recipe={"num_sites": 3}, output={"dir": str(tmp_path)}))
    for phase, (record, model) in found.items():
        assert record["accepted"] == ["s00", "s01", "s02"], phase
        assert np.array_equal(model, weights(calm.directory)), phase
        assert sessions[phase] == (2 if phase in ("vote", "reveal") else 3), f"{phase}: one more is the evaluation's"


def _with_terms(letter: bytes, **changes) -> bytes:
    return protocol.pack(msgspec.structs.replace(protocol.unpack(letter, protocol.Terms), **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"corrupt": 0.01}, "other terms"),
        ({"job": "toy"}, "other terms"),
        ({"round": 4}, "which is another's"),
        ({"sites": SITES[:3]}, "the signed job has it ask s00, s01, s02, s03"),
    ],
)
async def test_a_server_that_proposes_other_terms_is_refused(tmp_path, monkeypatch, changes, reason):
    def proposing(phase, letters):
        return {
            site: _with_terms(letter, **changes) if phase == "advertise" else letter for site, letter in letters.items()
        }

    meddling(monkeypatch, proposing)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(cohort={"quorum": 0.5, "sites": list(SITES)}))
    assert view.line.state == "failed"
    assert view.line.error.count("refused:") >= 3, view.line.error
    assert reason in view.line.error


@pytest.mark.parametrize("forger", ["ana", "s02"])
async def test_keys_that_the_server_made_up_are_refused(tmp_path, monkeypatch, forger):
    """Signed by a person whom the roster lists, or by another site; the site itself is none the wiser."""
    async with loopback(tmp_path, SITES) as federation:
        folder = federation.made.users["ana"] if forger == "ana" else federation.site(forger)
        kit = Kit(folder)

        def forging(phase, letters):
            if phase != "share":
                return letters
            roll = protocol.unpack(letters["s00"], protocol.Roll)
            mine = msgspec.structs.replace(roll.adverts[3], mask=b"\x07" * 32, credential=kit.certificate_pem())
            mine = msgspec.structs.replace(mine, signature=kit.sign(mine.content()))
            forged = protocol.pack(msgspec.structs.replace(roll, adverts=(*roll.adverts[:3], mine)))
            return dict.fromkeys(letters, forged)

        meddling(monkeypatch, forging)
        await attended(federation)
        view = await federation.run(job())
    assert view.line.state == "failed"
    assert view.line.error.count("refused: The keys were not signed by the site") == 4, view.line.error


async def test_a_revoked_site_is_not_on_the_roll(tmp_path, monkeypatch):
    """Its advert came in time; a server that keeps it on the roll all the same is refused by all who know better."""
    async with loopback(tmp_path, SITES) as federation:

        def revoking(phase, letters):
            if phase == "share":
                roster = federation.authority.revoke("s03", "its machine was stolen").data
                for site in SITES[:3]:
                    Kit(federation.site(site)).update_roster(roster)
            return letters

        meddling(monkeypatch, revoking)
        await attended(federation)
        view = await federation.run(job())
    assert view.line.state == "failed"
    assert view.line.error.count("was revoked") >= 3, view.line.error


def test_a_deployed_sites_worker_has_no_identity(tmp_path):
    """It masks what the agent has agreed on; asked to answer for the site, or to check others, it refuses."""
    runner = SiteRunner(toys.Many(4), tmp_path, secure=tmp_path / "states")
    asked = job()
    course = Course("toy", SITES, asked.strategy, secure=asked.secure_aggregation)
    with pytest.raises(AccessError, match="no identity"):
        runner.secure.checker.check("s00", b"", b"", b"")
    bounds = bounds_of(asked.secure_aggregation, None, len(SITES))
    letter = protocol.pack(terms(asked.secure_aggregation, bounds, "toy", 2, 1, SITES, {}, {}))
    (answer,) = runner.secure.exchange(course, "advertise", {"s00": letter}).values()
    assert "no identity" in answer.reason
    assert not list(tmp_path.rglob("*.state"))
    assert not list(tmp_path.rglob("identities.key"))
