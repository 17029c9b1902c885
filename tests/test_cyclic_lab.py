# SPDX-License-Identifier: Apache-2.0
"""Cyclic weight transfer over the network: the simulation's bits, whoever stops when, and nothing to be read.

SIGKILL, networks that are cut or stall, and full disks are in ``test_chaos.py``.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import toys
from federations import Loopback, loopback
from hansa.core import wire
from hansa.core.ports import SERVER, topic
from hansa.core.storage import load_tree
from hansa.core.values import Update
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
from hansa.transport.lane import Lane
from hansa.transport.messages import Posting
from hansa.transport.pieces import describe
from hansa.transport.protocol import encode

SITES = ("s0", "s1", "s2")

pytestmark = pytest.mark.timeout(120)


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


async def attended(federation: Loopback, sites=SITES, **policy) -> None:
    for site in sites:
        federation.write(site, **policy)
    await asyncio.gather(*map(federation.start, sites))


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
        call, encrypt, seal = Connection.call, Lane._encrypt, sealed.seal

        async def calling(connection, message):
            self.sent += encode(message)
            return await call(connection, message)

        def encrypting(lane, data):
            if not lane._tls.server_side:
                self.sent += data
            encrypt(lane, data)

        def sealing(contents, *rest):
            data = contents.read_bytes()
            self.models += [data[at : at + 48] for at in range(1000, len(data) - 48, len(data) // 10)]
            return seal(contents, *rest)

        monkeypatch.setattr(Connection, "call", calling)
        monkeypatch.setattr(Lane, "_encrypt", encrypting)
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
    """Not on the server's disk, after each step, and not on the wire below TLS."""
    watch, looked, send = Watch(monkeypatch), [], RemotePeers.send

    async def looking(self, plan, sender, recipient):
        failed = await send(self, plan, sender, recipient)
        looked.append(watch.seen_in(federation.made.server))
        return failed

    monkeypatch.setattr(RemotePeers, "send", looking)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(recipe={"size": 400_000}))
        await equals_a_simulation(tmp_path, federation, view, recipe={"size": 400_000})
        assert [record["accepted"] for record in view.records] == [list(SITES)] * 2
        folder = federation.made.server / "jobs" / view.line.job
        assert not (folder / "work" / "mail").exists(), "notes of messages go with the job"
        looked.append(watch.seen_in(federation.made.server))
    assert len(watch.models) == 40, "two models a round"
    assert looked == [[]] * 9
    assert not any(model in watch.sent for model in watch.models)
    assert len(watch.sent) > 8 * 400_000


LOST = {1: ("s01", "train"), 2: ("s02", "post"), 3: ("s03", "post")}
"""Who is lost for good in a round, and what with: the last one's post is the model that the round ends with."""


async def test_a_site_that_is_lost_is_passed_over(tmp_path, monkeypatch):
    """In its turn, or after it and before it has handed its model on: its turn is undone then."""
    struck = asyncio.Event()

    def dying(method):
        async def die(self, *rest):
            given = next(item for item in rest if hasattr(item, "kind"))
            if LOST[given.round] == (self._site, given.kind):
                struck.set()
                await asyncio.Event().wait()
            return await method(self, *rest)

        return die

    sites = [f"s{number:02d}" for number in range(4)]
    faults = {f"{site}:{later}": "raise" for number, (site, _) in LOST.items() for later in range(number, 4)}
    monkeypatch.setattr(JoinedJob, "_perform", dying(JoinedJob._perform))
    monkeypatch.setattr(JoinedJob, "_correspond", dying(JoinedJob._correspond))
    common = {"rounds": 3, "cohort": {"sites": sites}}
    async with loopback(tmp_path, sites, lease_s=2.0) as federation, federation.lead() as lead:
        await attended(federation, sites, recipes=["toys:many"])
        id = await lead.submit(job(recipe={"name": "toys:many", "num_sites": 4}, **common))
        for site, _ in LOST.values():
            await struck.wait()
            struck.clear()
            await federation.stop(site)
        view = await lead.wait(id)
        recipe = {"name": "toys:many", "num_sites": 4, "faults": faults}
        await equals_a_simulation(tmp_path, federation, view, recipe=recipe, **common)
    for number in LOST:
        gone = [site for site, _ in [*LOST.values()][:number]]
        assert view.records[number - 1]["accepted"] == [site for site in sites if site not in gone]
        assert {site: kind for site, (kind, _) in absences(view, number).items()} == dict.fromkeys(gone, "lost")


STEPS = [
    *(("s0", "train"), ("s1", "address"), ("s0", "post")),
    *(("s1", "train"), ("s2", "address"), ("s1", "post")),
    *(("s2", "train"), ("s2", "post")),
]
"""What sites do in a round, in order."""


async def test_whoever_stops_between_any_two_steps_goes_on(tmp_path, monkeypatch):
    """Sites after what they do for a message is done and before it is answered; the server after each message."""
    due, stops = [*STEPS], ["s0", "s2"]
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

    async def performing(self, job, given, path, plan, out, connection):
        outcome = await perform(self, job, given, path, plan, out, connection)
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
    async with Loopback(tmp_path, SITES) as federation:
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
    await equals_a_simulation(tmp_path, federation, view)
    assert [record["accepted"] for record in view.records] == [list(SITES)] * 2


class Cheat:
    """A server that does one thing other than the protocol, with what passes through it."""

    def __init__(self, monkeypatch, federation: Loopback) -> None:
        self.begun = False
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
        return peers._engine._announce(copy, describe(copy, wire.cuts(copy)))

    def _how(self, plan) -> str:
        return [*CHEATS][plan.round - 1] if self.begun else ""

    def _addressed(self, peers: RemotePeers, original, plan, site):
        given, how = original(peers, plan, site), self._how(plan)
        if (site, how) == ("s0", "asks for an update"):
            return replace(given, outbox=None)
        if (site, how) == ("s2", "redirected"):
            sent = mail._read(peers._note(plan, "s0", "s1"))
            return replace(given, inbox=topic(plan.job, "s0"), sealed=sent.plan)
        if site != "s1" or given.sealed is None:
            return given
        path = peers._engine._plans / f"{given.sealed}.hansa"
        if how in ("of another job", "replayed"):
            given = replace(given, sealed=self._publish(peers, self._kept))
        if how != "replayed":
            shutil.copyfile(path, self._kept)
        if how == "altered":
            with path.open("rb") as file:
                update = wire.read_update(file)
            parts = {name: {name: np.array(part[name])} for name, part in update.parts.items()}
            parts["message"]["message"][5000] ^= 1
            wire.spool(replace(update, parts=parts), self._kept)
            return replace(given, sealed=self._publish(peers, self._kept))
        if how == "another's name":
            return replace(given, inbox=topic(plan.job, "../../s0"))
        return given

    async def _asked(self, peers: RemotePeers, original, plan, kind, site, letter):
        if (kind, site) == ("post", "s0"):
            if self._how(plan) == "too early":
                letter = encode(Posting(SERVER, b""))
            if self._how(plan) == "for a stranger":
                letter = encode(Posting("eve", b""))
            if self._how(plan) == "too long":
                letter = bytes(sealed.MAX_BYTES * 2)
            if self._how(plan) == "for another key":
                thief = Identities(Kit(self._federation.site("s2")))
                forged = sealed.address(sealed.new_key(), peers._place(plan), "s1", thief)
                letter = encode(Posting("s1", forged))
        return await original(peers, plan, kind, site, letter)


CHEATS = {
    "of another job": ("s1", "round 1 of 'toy'; due is one from 's0' to 's1', for round 1 of 'toy', in the same job"),
    "replayed": ("s1", "for round 1 of 'toy'; due is one from 's0' to 's1', for round 2"),
    "altered": ("s1", "altered on its way"),
    "redirected": ("s2", "is from 's0' to 's1', for round 4 of 'toy'; due is one from 's0' to 's2'"),
    "another's name": ("s1", "'../../s0' is no peer of this site"),
    "asks for an update": ("s0", "the model goes from site to site"),
    "too early": ("s0", "after 1 turns; the signed job's quorum is 2"),
    "for a stranger": ("s0", "'eve' is no peer of this site"),
    "too long": ("s0", "The message has 262,144 bytes; this site allows 132,096"),
    "for another key": ("s0", "that of site/s2, not of site/s1"),
}
"""What the server does, a round each: who refuses it, and what is said."""


async def test_a_server_that_cheats_is_refused_by_name_and_the_job_goes_on(tmp_path, monkeypatch):
    async with loopback(tmp_path, SITES) as federation:
        cheat = Cheat(monkeypatch, federation)
        await attended(federation)
        assert not absences(await federation.run(job(rounds=1)))
        cheat.begun = True
        view = await federation.run(job(rounds=len(CHEATS), cohort={"quorum": 2}))
        assert view.line.state == "finished", view.line.error
        told = refusals(federation)
    for number, (how, (refusing, words)) in enumerate(CHEATS.items(), 1):
        assert absences(view, number).keys() == {refusing}, f"{how}: {view.records[number - 1]}"
        kind, reason = absences(view, number)[refusing]
        assert kind == "refused", how
        assert words in reason, how
        assert words in told, how


async def test_a_site_that_sends_rubbish_is_named_and_passed_over(tmp_path, monkeypatch):
    def rubbish(name, method, ways):
        def send(self, course, round, *rest):
            if ways[round][:2] == (self._site, name):
                return ways[round][2](self, round, *rest)
            return method(self, course, round, *rest)

        return send

    def no_message(self, round, posting, out):
        wire.spool(Update(self._site, round, 0, {"message": {"message": np.zeros(99, np.uint8)}}, 1.0, {}), out)

    def another_form(self, round, posting, out):
        wire.spool(Update(self._site, round, 0, {"params": {"w": np.zeros(9)}}, 1.0, {}), out)

    ways = {
        1: ("s1", "address", lambda self, round: b"rubbish", "no address of sealed messages"),
        2: ("s1", "post", no_message, "This is no sealed message"),
        3: ("s2", "post", another_form, "not of the model's form"),
    }
    for name in ("address", "post"):
        monkeypatch.setattr(Mail, name, rubbish(name, getattr(Mail, name), ways))
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(rounds=3))
        assert view.line.state == "finished", view.line.error
        told = refusals(federation)
    for number, (site, _, _, words) in ways.items():
        kind, reason = absences(view, number)[site]
        assert kind == "rejected"
        assert words in reason
        assert words in told
