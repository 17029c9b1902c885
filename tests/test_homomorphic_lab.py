# SPDX-License-Identifier: Apache-2.0
"""Homomorphic encryption over the network: the simulation's model, whoever is stopped when, and whose key counts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

import toys
from federations import Loopback, loopback
from hansa.core.ports import KeyPhase
from hansa.core.storage import load_tree
from hansa.homomorphic import ckks, protocol
from hansa.pki.kit import Kit
from hansa.server import remote
from hansa.simulation.run import run
from hansa.site import joined

SITES = ("s00", "s01", "s02", "s03")
METRICS = {"loss_sum": 1e6, "examples": 1e6}
PHASES = get_args(KeyPhase)

pytestmark = pytest.mark.timeout(120)


def job(**values):
    recipe = {"name": "toys:many", "num_sites": 4, **values.pop("recipe", {})}
    given = values.pop("homomorphic_encryption", {})
    section = {"metrics": METRICS, "key_site": "s01", "full_model": True, **given}
    return toys.job(recipe=recipe, **{"rounds": 1, "homomorphic_encryption": section, **values})


def weights(folder: Path) -> np.ndarray:
    return load_tree(folder / "model" / "model.safetensors")["w"]


async def equals_a_simulation(tmp_path: Path, federation: Loopback, view, **values) -> None:
    """Integers are added, so all bits are the same."""
    assert view.line.state == "finished", view.line.error
    asked = job(output={"dir": str(tmp_path / "simulated")}, **values)
    simulated = weights((await asyncio.to_thread(run, asked)).directory)
    assert np.array_equal(weights(federation.made.server / "jobs" / view.line.job), simulated)


async def attended(federation: Loopback, **rules) -> None:
    for site in SITES:
        federation.write(site, recipes=["toys:many"], **rules)
    await asyncio.gather(*map(federation.start, SITES))


async def test_the_model_is_that_of_a_simulation_and_one_site_had_the_key(tmp_path):
    """Updates are files of several pieces, and the sum is opened in two parts."""
    large = {"size": 140_000, "varied": True}
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        asked = job(recipe=large, baselines={"base": True, "local": False})
        async with federation.lead() as lead:
            id = await lead.submit(asked)
            view = await lead.wait(id)
        await equals_a_simulation(tmp_path, federation, view, recipe=large)
        for record in view.records:
            assert record["accepted"] == list(SITES)
            assert record["site_metrics"] == {}
            assert {"loss", "train_loss"} <= record["metrics"].keys()
        assert not list((federation.made.server / "jobs" / id / "work").rglob("secure.*"))
        assert not list((tmp_path / "fed").rglob("identities.key")), "the mark of simulated identities"
        keys = {
            path.name for site in SITES for path in federation.site(site).rglob("*.key") if path.parent.name == "toy"
        }
        assert keys == {"s01.key"}


async def test_a_server_that_stops_in_every_phase_goes_on(tmp_path, monkeypatch):
    """Whoever has answered does not train again: the session and its key are the same."""
    due, struck, exchange = list(PHASES), threading.Event(), remote.RemoteLine.exchange

    async def deadly(self, plan, phase, letters):
        answers = await exchange(self, plan, phase, letters)
        if due and phase == due[0] and plan.task == "train":
            del due[0]
            struck.set()
            await asyncio.Event().wait()
        return answers

    monkeypatch.setattr(remote.RemoteLine, "exchange", deadly)
    trained = tmp_path / "trained.txt"
    federation = Loopback(tmp_path, SITES)
    try:
        async with federation.serving():
            await attended(federation)
            async with federation.lead() as lead:
                id = await lead.submit(job(recipe={"trained": str(trained)}))
            await asyncio.to_thread(struck.wait, 60)
        while due:
            struck.clear()
            async with federation.serving():
                await asyncio.to_thread(struck.wait, 60)
        async with federation.serving(), federation.lead() as lead:
            view = await lead.wait(id)
    finally:
        for site in list(federation.agents):
            await federation.stop(site)
    assert sorted(trained.read_text().split("\n")[:-1]) == [f"{site} 1" for site in SITES]
    await equals_a_simulation(tmp_path, federation, view)


async def test_a_key_site_that_dies_in_every_phase_goes_on(tmp_path, monkeypatch):
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


async def test_a_key_that_the_server_made_up_is_refused(tmp_path, monkeypatch):
    """It signs as another site; every site that is to encrypt with it refuses."""
    exchange = remote.RemoteLine.exchange
    async with loopback(tmp_path, SITES) as federation:
        kit = Kit(federation.site("s02"))

        async def forging(self, plan, phase, letters):
            if phase == "accept":
                _, public = ckks.new_keys()
                offer = protocol.Offer(protocol.unpack(letters["s00"], protocol.Invitation).terms.digest(), public, b"")
                offer = msgspec.structs.replace(offer, credential=kit.certificate_pem())
                offer = msgspec.structs.replace(offer, signature=kit.sign(offer.content()))
                terms = protocol.unpack(letters["s00"], protocol.Invitation).terms
                letters = dict.fromkeys(letters, protocol.pack(protocol.Invitation(terms, offer)))
            return await exchange(self, plan, phase, letters)

        monkeypatch.setattr(remote.RemoteLine, "exchange", forging)
        await attended(federation)
        view = await federation.run(job())
    assert view.line.state == "failed"
    assert view.line.error.count("refused: The public key was not signed by 's01'") == 4, view.line.error


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"key_site": "s02"}, "another owner of the key"), ({"sites": SITES[:3]}, "has it ask s00, s01, s02, s03")],
)
async def test_a_server_that_proposes_other_terms_is_refused(tmp_path, monkeypatch, changes, reason):
    exchange = remote.RemoteLine.exchange

    async def proposing(self, plan, phase, letters):
        if phase == "offer":
            terms = msgspec.structs.replace(protocol.unpack(letters["s01"], protocol.Terms), **changes)
            letters = dict.fromkeys(letters, protocol.pack(terms))
        return await exchange(self, plan, phase, letters)

    monkeypatch.setattr(remote.RemoteLine, "exchange", proposing)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(cohort={"sites": list(SITES)}))
    assert view.line.state == "failed"
    assert reason in view.line.error
