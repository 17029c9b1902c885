# SPDX-License-Identifier: Apache-2.0
"""Cyclic weight transfer over the network: the simulation's bits, whoever is killed when, and nothing to be read."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

import toys
from federations import Loopback, loopback
from hansa.core import wire
from hansa.core.ports import SERVER, topic
from hansa.core.storage import load_tree
from hansa.core.values import Update
from hansa.lab import SERVER as LAB_SERVER
from hansa.lab import lab
from hansa.pki import sealed
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.server import mail
from hansa.server.mail import RemotePeers
from hansa.server.store import Store
from hansa.simulation.run import run
from hansa.site.joined import JoinedJob
from hansa.site.mail import Mail
from hansa.transport.client import Connection
from hansa.transport.messages import Posting
from hansa.transport.protocol import encode

SITES = ("s0", "s1", "s2")

pytestmark = pytest.mark.timeout(240)


def job(**values):
    recipe = {"name": "toys:build", "size": 4_000, "varied": True, **values.pop("recipe", {})}
    cohort = {"sites": SITES, "quorum": 1, **values.pop("cohort", {})}
    return toys.job(**{"rounds": 2, "workflow": "cyclic", "recipe": recipe, "cohort": cohort, **values})


def weights(folder: Path) -> np.ndarray:
    return load_tree(folder / "model" / "model.safetensors")["w"]


async def equals_a_simulation(tmp_path: Path, federation: Loopback, view, **values) -> None:
    assert view.line.state == "finished", view.line.error
    found = weights(federation.made.server / "jobs" / view.line.job)
    calm = await asyncio.to_thread(run, job(output={"dir": str(tmp_path / "simulated")}, **values))
    assert np.array_equal(found, weights(calm.directory))


async def attended(federation: Loopback) -> None:
    for site in SITES:
        federation.write(site)
    await asyncio.gather(*map(federation.start, SITES))


def absences(view, round: int = 1) -> dict[str, tuple[str, str]]:
    return {absent["site"]: (absent["kind"], absent["reason"]) for absent in view.records[round - 1]["absent"]}


def refusals(federation: Loopback) -> str:
    """Return what the audit log has of messages and turns that were refused."""
    store = Store.view(None, federation.made.server)
    try:
        rows = store.audits()
        return "\n".join(f"{row.actor} {row.action} {row.detail}" for row in rows if row.outcome == "refused")
    finally:
        store.close()


class Watch:
    """Whatever leaves the sites, and the models that they hand to each other, a few stretches of each."""

    def __init__(self, monkeypatch) -> None:
        self.sent = bytearray()
        self.models: list[bytes] = []
        call, write, seal = Connection.call, Connection._write, sealed.seal

        async def calling(connection, message):
            self.sent += encode(message)
            return await call(connection, message)

        async def writing(connection, stream, data):
            self.sent += data
            return await write(connection, stream, data)

        def sealing(contents, *rest):
            data = contents.read_bytes()
            self.models += [data[at : at + 48] for at in range(1000, len(data) - 48, len(data) // 10)]
            return seal(contents, *rest)

        monkeypatch.setattr(Connection, "call", calling)
        monkeypatch.setattr(Connection, "_write", writing)
        monkeypatch.setattr(sealed, "seal", sealing)

    def seen_in(self, folder: Path) -> list[Path]:
        """Return the files that hold any of those models."""
        found = []
        for path in folder.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                found += [path] if any(model in data for model in self.models) else []
        return found


async def test_the_model_is_that_of_a_simulation_and_not_to_be_seen_on_its_way(tmp_path, monkeypatch):
    """In one piece and in many: while it is on its way, on the server's disk and on the wire below TLS."""
    watch, looked, send = Watch(monkeypatch), [], RemotePeers.send

    async def looking(self, plan, sender, recipient):
        failed = await send(self, plan, sender, recipient)
        looked.append(watch.seen_in(federation.made.server))
        return failed

    monkeypatch.setattr(RemotePeers, "send", looking)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        for size in (4_000, 400_000):
            view = await federation.run(job(recipe={"size": size}))
            await equals_a_simulation(tmp_path, federation, view, recipe={"size": size})
            assert [record["accepted"] for record in view.records] == [list(SITES)] * 2
            work = federation.made.server / "jobs" / view.line.job / "work"
            assert not (work / "mail").exists(), "notes of messages go with the job"
            looked.append(watch.seen_in(federation.made.server))
    assert len(watch.models) == 80, "two models a round, in two rounds of two jobs"
    assert looked == [[]] * 18
    assert not any(model in watch.sent for model in watch.models)
    assert len(watch.sent) > 8 * 400_000


@pytest.mark.parametrize("where", ["before training", "before posting", "before delivering"])
async def test_a_site_that_is_lost_is_passed_over(tmp_path, monkeypatch, where):
    """In its turn, or after it and before it has handed its model on: its turn is undone then."""
    struck, lost = asyncio.Event(), "s2" if where == "before delivering" else "s1"

    def dying(method):
        async def die(self, *rest):
            given = next(item for item in rest if hasattr(item, "kind"))
            if (self._site, given.round, given.kind) == (lost, 1, "train" if where == "before training" else "post"):
                struck.set()
                await asyncio.Event().wait()
            return await method(self, *rest)

        return die

    monkeypatch.setattr(JoinedJob, "_perform", dying(JoinedJob._perform))
    monkeypatch.setattr(JoinedJob, "_correspond", dying(JoinedJob._correspond))
    async with loopback(tmp_path, SITES, lease_s=2.0) as federation, federation.lead() as lead:
        await attended(federation)
        id = await lead.submit(job(rounds=1))
        await struck.wait()
        await federation.stop(lost)
        view = await lead.wait(id)
        faults = {f"{lost}:1": "raise"}
        await equals_a_simulation(tmp_path, federation, view, rounds=1, recipe={"faults": faults})
    assert view.records[0]["accepted"] == [site for site in SITES if site != lost]
    assert absences(view)[lost][0] == "lost"


STEPS = [
    *(("s0", "train"), ("s1", "address"), ("s0", "post")),
    *(("s1", "train"), ("s2", "address"), ("s1", "post")),
    *(("s2", "train"), ("s2", "post")),
]
"""What sites do in a round, in order."""


async def test_whoever_stops_between_any_two_steps_goes_on(tmp_path, monkeypatch):
    """Sites after what they do for a message is done and before it is answered; the server after each message."""
    due, stops = [*STEPS], [*SITES]
    struck, halted = asyncio.Event(), threading.Event()
    correspond, perform, send = JoinedJob._correspond, JoinedJob._perform, RemotePeers.send

    async def strike(site, given):
        if due and (site, given.kind) == due[0] and given.round == 1:
            due.pop(0)
            struck.set()
            await asyncio.Event().wait()

    async def corresponding(self, connection, job, given, out):
        outcome = await correspond(self, connection, job, given, out)
        await strike(self._site, given)
        return outcome

    async def performing(self, job, given, path, plan, out):
        outcome = await perform(self, job, given, path, plan, out)
        await strike(self._site, given)
        return outcome

    async def sending(self, plan, sender, recipient):
        failed = await send(self, plan, sender, recipient)
        if plan.round == 2 and stops and sender == stops[0]:
            stops.pop(0)
            halted.set()
            await asyncio.Event().wait()
        return failed

    monkeypatch.setattr(JoinedJob, "_correspond", corresponding)
    monkeypatch.setattr(JoinedJob, "_perform", performing)
    monkeypatch.setattr(RemotePeers, "send", sending)
    federation = Loopback(tmp_path, SITES)
    try:
        async with federation.serving():
            await attended(federation)
            async with federation.lead() as lead:
                id = await lead.submit(job())
            while due:
                site = due[0][0]
                await struck.wait()
                struck.clear()
                await federation.stop(site)
                await federation.start(site)
            await asyncio.to_thread(halted.wait)
        while stops:
            halted.clear()
            async with federation.serving():
                await asyncio.to_thread(halted.wait)
        async with federation.serving(), federation.lead() as lead:
            view = await lead.wait(id)
    finally:
        for site in list(federation.agents):
            await federation.stop(site)
    await equals_a_simulation(tmp_path, federation, view)
    assert [record["accepted"] for record in view.records] == [list(SITES)] * 2


def test_sigkill_of_server_agent_and_worker_in_a_hop(tmp_path):
    """Real processes: all of them, each in the turn of another site."""
    trained = tmp_path / "trained.txt"
    recipe = {"delay_s": 0.2, "trained": str(trained), "size": 400_000}
    asked = job(recipe=recipe, output={"dir": str(tmp_path / "runs")})
    calm = run(job(recipe={"size": 400_000}, output={"dir": str(tmp_path / "calm")}))
    with lab(asked, settings={"lease_s": 60.0}) as federation:
        id = federation.federation.submit(asked)
        for line in ("s0 1", "s1 1", "s2 1"):
            while not trained.exists() or line not in trained.read_text():
                assert federation.alive(LAB_SERVER)
                threading.Event().wait(0.02)
            match line[:2]:
                case "s0":  # s1 is next
                    federation.kill(LAB_SERVER)
                    federation.start(LAB_SERVER)
                case "s1":
                    federation.kill("s2")
                    federation.start("s2")
                case "s2":  # and s0 again
                    for worker in psutil.Process(federation.pid("s0")).children():
                        worker.kill()
        view = federation.federation.wait(id)
        assert view.line.state == "finished", view.line.error
        federation.federation.download(id, tmp_path / "results", names=["report.json"])
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    assert report["model"]["sha256"] == calm.report["model"]["sha256"]
    assert [record["accepted"] for record in view.records] == [list(SITES)] * 2


class Cheat:
    """A server that does one thing other than the protocol, with what passes through it."""

    def __init__(self, monkeypatch, federation: Loopback) -> None:
        self.how = ""
        self._federation = federation
        self._kept: Path = federation.made.server / "kept.hansa"
        self._patch(monkeypatch, "addressed", self._addressed)
        self._patch(monkeypatch, "_asked", self._asked)

    @staticmethod
    def _patch(monkeypatch, name: str, changed) -> None:
        original = getattr(RemotePeers, name)
        monkeypatch.setattr(RemotePeers, name, lambda peers, *rest: changed(peers, original, *rest))

    def _publish(self, peers: RemotePeers, path: Path) -> str:
        copy = path.with_suffix(".copy")
        shutil.copyfile(path, copy)
        return peers._engine._announce(copy, wire.cuts(copy))

    def _addressed(self, peers: RemotePeers, original, plan, site):
        given = original(peers, plan, site)
        if (site, self.how) == ("s0", "asks for an update"):
            return replace(given, outbox=None)
        if (site, self.how, plan.round) == ("s2", "redirected", 1):
            sent = mail._read(peers._note(plan, "s0", "s1"))
            return replace(given, inbox=topic(plan.job, "s0"), sealed=sent.plan)
        if site != "s1":
            return given
        path = peers._engine._plans / f"{given.sealed}.hansa"
        if plan.round == 1 and self.how in ("", "replayed"):
            shutil.copyfile(path, self._kept)
        if self.how == "of another job" or (self.how == "replayed" and plan.round == 2):
            return replace(given, sealed=self._publish(peers, self._kept))
        if self.how == "altered":
            with path.open("rb") as file:
                update = wire.read_update(file)
            parts = {name: {name: np.array(part[name])} for name, part in update.parts.items()}
            parts["message"]["message"][5000] ^= 1
            wire.spool(replace(update, parts=parts), self._kept)
            return replace(given, sealed=self._publish(peers, self._kept))
        if self.how == "another's name":
            return replace(given, inbox=topic(plan.job, "../../s0"))
        return given

    async def _asked(self, peers: RemotePeers, original, plan, kind, site, letter):
        if (kind, site) == ("post", "s0"):
            if self.how == "too early":
                letter = encode(Posting(SERVER, b""))
            if self.how == "for a stranger":
                letter = encode(Posting("eve", b""))
            if self.how == "for another key":
                thief = Identities(Kit(self._federation.site("s2")))
                forged = sealed.address(sealed.new_key(), peers._place(plan), "s1", thief)
                letter = encode(Posting("s1", forged))
        return await original(peers, plan, kind, site, letter)


async def test_a_server_that_cheats_is_refused_by_name_and_the_job_goes_on(tmp_path, monkeypatch):
    async with loopback(tmp_path, SITES) as federation:
        cheat = Cheat(monkeypatch, federation)
        await attended(federation)
        assert not absences(await federation.run(job(rounds=1)))
        for how, refusing, round, words in (
            ("of another job", "s1", 1, "round 1 of 'toy'; due is one from 's0' to 's1', for round 1 of 'toy', in the"),
            ("altered", "s1", 1, "altered on its way"),
            ("replayed", "s1", 2, "for round 1 of 'toy'; due is one from 's0' to 's1', for round 2"),
            ("redirected", "s2", 1, "is from 's0' to 's1', for round 1 of 'toy'; due is one from 's0' to 's2'"),
            ("another's name", "s1", 1, "'../../s0' is no peer of this site"),
            ("asks for an update", "s0", 1, "the model goes from site to site"),
            ("too early", "s0", 1, "after 1 turns; the signed job's quorum is 2"),
            ("for a stranger", "s0", 1, "'eve' is no peer of this site"),
            ("for another key", "s0", 1, "that of site/s2, not of site/s1"),
        ):
            cheat.how = how
            view = await federation.run(job(cohort={"quorum": 2}))
            assert view.line.state == "finished", f"{how}: {view.line.error}"
            assert absences(view, round).keys() == {refusing}, f"{how}: {view.records}"
            kind, reason = absences(view, round)[refusing]
            assert kind == "refused", how
            assert words in reason, how
            assert f"site/{refusing} " in refusals(federation), how
            assert words in refusals(federation), how


async def test_a_site_that_sends_rubbish_is_named_and_passed_over(tmp_path, monkeypatch):
    def rubbish(method, what):
        def send(self, course, round, *rest):
            if self._site != "s1":
                return method(self, course, round, *rest)
            return what(self, round, *rest)

        return send

    def no_message(self, round, posting, out):
        wire.spool(Update(self._site, round, 0, {"message": {"message": np.zeros(99, np.uint8)}}, 1.0, {}), out)

    def another_form(self, round, posting, out):
        wire.spool(Update(self._site, round, 0, {"params": {"w": np.zeros(9)}}, 1.0, {}), out)

    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        for name, what, sites, words in (
            ("address", lambda self, round: b"rubbish", SITES, "no address of sealed messages"),
            ("post", no_message, SITES, "This is no sealed message"),
            ("post", another_form, SITES[:2], "not of the model's form"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(Mail, name, rubbish(getattr(Mail, name), what))
                view = await federation.run(job(rounds=1, cohort={"sites": sites}))
            assert view.line.state == "finished", view.line.error
            kind, reason = absences(view)["s1"]
            assert kind == "rejected"
            assert words in reason
            assert words in refusals(federation)
