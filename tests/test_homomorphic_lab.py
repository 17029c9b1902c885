# SPDX-License-Identifier: Apache-2.0
"""Homomorphic encryption over the network: the simulation's model, whoever is killed when, and whose keys count."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

import toys
from federations import loopback
from hansa.core.ports import KeyPhase
from hansa.homomorphic import ckks, protocol
from hansa.lab import lab
from hansa.pki.kit import Kit
from hansa.server import remote
from hansa.simulation.run import run
from hansa.transport.messages import ResumeJob
from hidden import METRICS, SITES, attended, equals_a_simulation, meddling, weights
from stuck import Stuck

pytestmark = pytest.mark.timeout(120)


def job(tmp_path: Path, **values):
    recipe = {"name": "toys:many", "num_sites": 4, **values.pop("recipe", {})}
    given = values.pop("homomorphic_encryption", {})
    section = {"metrics": METRICS, "key_site": "s01", "full_model": True, **given}
    output = {"dir": str(tmp_path / "runs")}
    return toys.job(recipe=recipe, output=output, **{"rounds": 1, "homomorphic_encryption": section, **values})


async def test_the_model_is_that_of_a_simulation_and_one_site_had_the_key(tmp_path):
    """Updates are files of several pieces, and the sum is opened in two parts, larger than what sites allow of a model.

    The key site was not drawn to train.
    """
    drawn = {"cohort": {"sites": list(SITES), "sample": 3}, "seed": 1}
    asked = job(tmp_path, recipe={"size": 140_000, "varied": True}, baselines={"base": True, "local": False}, **drawn)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation, max_model_bytes=1_300_000)
        async with federation.lead() as lead:
            id = await lead.submit(asked)
            view = await lead.wait(id)
        await equals_a_simulation(federation, view, asked)
        for record in view.records:
            assert record["accepted"] == ["s00", "s02", "s03"]
            assert record["site_metrics"] == {}
            assert {"loss", "train_loss"} <= record["metrics"].keys()
        assert not list((federation.made.server / "jobs" / id / "work").rglob("secure.*"))
        assert not list((tmp_path / "fed").rglob("identities.key")), "the mark of simulated identities"
        keys = {
            path.name for site in SITES for path in federation.site(site).rglob("*.key") if path.parent.name == "toy"
        }
        assert keys == {"s01.key"}


@pytest.mark.timeout(300)
def test_sigkill_of_key_site_and_server_in_every_phase(tmp_path, monkeypatch):
    """A job for each phase, in which the key site is killed with its answer on the tongue, and the server that waits.

    Whoever has answered does not train again: sessions and keys are the same.
    """
    phases = {f"toy-{number:04d}": phase for number, phase in enumerate((*get_args(KeyPhase), "train"), 1)}
    stuck = Stuck(monkeypatch, tmp_path / "stuck", "s01", phases)
    trained = tmp_path / "trained.txt"
    asked = job(tmp_path, recipe={"trained": str(trained), "num_sites": 3}, evaluation={"every": 0})
    with lab(asked, settings={"max_running_jobs": len(phases)}) as federation:
        assert [federation.federation.submit(asked) for _ in phases] == [*phases]
        stuck.wait()
        for name in ("s01", "server"):
            federation.kill(name)
        stuck.release()
        for name in ("server", "s01"):
            federation.start(name, wait=False)
        federation.wait("server")
        views = {phases[id]: federation.federation.wait(id) for id in phases}
        found = {phases[id]: weights(federation.folder("server") / "jobs" / id) for id in phases}
    calm = weights(run(job(tmp_path, recipe={"num_sites": 3})).directory)
    for phase, view in views.items():
        assert view.line.state == "finished", f"{phase}: {view.line.error}"
        assert view.records[0]["accepted"] == list(SITES[:3]), phase
        assert np.array_equal(found[phase], calm), phase
    counts = Counter(trained.read_text().splitlines())
    once_more = counts.pop("s01 1") - len(phases)
    assert once_more == 1, "it was killed when it had trained, before its update was durable"
    assert counts == {"s00 1": len(phases), "s02 1": len(phases)}


async def test_a_key_site_that_loses_its_folder_is_named_and_the_resumed_job_has_other_keys(tmp_path, monkeypatch):
    asked = job(tmp_path)
    async with loopback(tmp_path, SITES) as federation:

        def losing(phase, letters):
            if phase == "open" and not lost:
                (folder,) = federation.site("s01").rglob("*.secagg")
                shutil.rmtree(folder)
                lost.append(folder)
            return letters

        lost: list[Path] = []
        meddling(monkeypatch, losing)
        await attended(federation)
        async with federation.lead() as lead:
            id = await lead.submit(asked)
            view = await lead.wait(id)
            assert view.line.state == "failed"
            assert "s01 has lost the keys of this round's sum" in view.line.error
            await lead.connection.call(ResumeJob(id))
            view = await lead.wait(id)
        await equals_a_simulation(federation, view, asked)
    assert view.records[0]["accepted"] == list(SITES)


async def test_a_server_that_has_one_update_opened_is_told_nothing(tmp_path, monkeypatch):
    """Nor can it try again."""
    async with loopback(tmp_path, SITES) as federation:
        vectors: list[np.ndarray] = []
        add = remote.RemoteCohort.ask

        async def noting(self, plan, sites):
            async for reply in add(self, plan, sites):
                vectors.append(np.concatenate([chunk.values for chunk in reply.chunks()]))
                yield reply

        def lying(phase, letters):
            if phase != "open":
                return letters
            part = protocol.unpack(letters["s01"], protocol.Part)
            return {"s01": protocol.pack(msgspec.structs.replace(part, words=vectors[0].tobytes()))}

        monkeypatch.setattr(remote.RemoteCohort, "ask", noting)
        meddling(monkeypatch, lying)
        await attended(federation)
        async with federation.lead() as lead:
            id = await lead.submit(job(tmp_path))
            view = await lead.wait(id)
            assert "what is to be opened is no sum of the 4 sites named" in view.line.error
            monkeypatch.undo()
            await lead.connection.call(ResumeJob(id))
            view = await lead.wait(id)
    assert "something else was asked for as this part of the sum" in view.line.error


async def test_a_key_that_the_server_made_up_is_refused(tmp_path, monkeypatch):
    """It signs as another site; every site that is to encrypt with it refuses."""
    async with loopback(tmp_path, SITES) as federation:
        kit = Kit(federation.site("s02"))

        def forging(phase, letters):
            if phase != "accept":
                return letters
            terms = protocol.unpack(letters["s00"], protocol.Invitation).terms
            offer = protocol.Offer(terms.digest(), ckks.new_keys()[1], bytes(32), kit.certificate_pem())
            offer = msgspec.structs.replace(offer, signature=kit.sign(offer.content()))
            return dict.fromkeys(letters, protocol.pack(protocol.Invitation(terms, offer)))

        meddling(monkeypatch, forging)
        await attended(federation)
        view = await federation.run(job(tmp_path))
    assert view.line.state == "failed"
    assert view.line.error.count("refused: The public key was not signed by 's01'") == 4, view.line.error


async def test_a_mask_that_the_server_made_up_is_refused(tmp_path, monkeypatch):
    """It has two sites' masks be its own, so that what is left of the sum's would be one site's only."""
    async with loopback(tmp_path, SITES) as federation:
        kit = Kit(federation.site("s02"))

        def forging(phase, letters):
            if phase != "open":
                return letters
            part = protocol.unpack(letters["s01"], protocol.Part)
            own = msgspec.structs.replace(part.survivors[3], mask=part.survivors[2].mask)
            own = msgspec.structs.replace(own, credential=kit.certificate_pem(), signature=kit.sign(own.content()))
            survivors = (*part.survivors[:3], own)
            return {"s01": protocol.pack(msgspec.structs.replace(part, survivors=survivors))}

        meddling(monkeypatch, forging)
        await attended(federation)
        view = await federation.run(job(tmp_path))
    assert view.line.state == "failed"
    assert "The mask's key was not signed by the site that it is said to be of" in view.line.error


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"key_site": "s02"}, "another owner of the key"), ({"sites": SITES[:3]}, "has it ask s00, s01, s02, s03")],
)
async def test_a_server_that_proposes_other_terms_is_refused(tmp_path, monkeypatch, changes, reason):
    def proposing(phase, letters):
        if phase != "offer":
            return letters
        terms = msgspec.structs.replace(protocol.unpack(letters["s01"], protocol.Terms), **changes)
        return dict.fromkeys(letters, protocol.pack(terms))

    meddling(monkeypatch, proposing)
    async with loopback(tmp_path, SITES) as federation:
        await attended(federation)
        view = await federation.run(job(tmp_path, cohort={"sites": list(SITES)}))
    assert view.line.state == "failed"
    assert reason in view.line.error
