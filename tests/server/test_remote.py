# SPDX-License-Identifier: Apache-2.0
"""Rounds over a real server: sites that come late, leave, answer late or answer garbage are named and outlived."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from federations import Loopback, loopback
from hansa import bundle
from hansa.core import wire
from hansa.core.storage import load_tree
from hansa.core.values import WEIGHT_SCALE, Update
from hansa.errors import AccessError, HansaError, JobError
from hansa.pki.identity import Role
from hansa.pki.kit import Kit
from hansa.server.service import Service
from hansa.simulation.run import run
from hansa.transport.client import Connection
from hansa.transport.messages import (
    INLINE_BYTES,
    PROTOCOL,
    AbortJob,
    Answer,
    AskAgenda,
    Assignment,
    Follow,
    Inspected,
    ListJobs,
    Missing,
    OfferRoster,
    Poll,
    Report,
    ResumeJob,
    ShowJob,
    Submit,
    WithdrawSite,
)
from hansa.transport.pieces import describe
from hansa.workflows.scatter_gather import sample
from toys import SITES, fixed_point_fedavg, job

pytestmark = pytest.mark.timeout(120)

Reply = Callable[[Assignment], Answer | None]


def absences(view) -> dict[int, dict[str, str]]:
    """Round -> site -> kind and reason."""
    return {
        record["round"]: {item["site"]: f"{item['kind']}: {item['reason']}" for item in record["absent"]}
        for record in view.records
    }


class Impostor:
    """A site that speaks the protocol and answers as a test tells it."""

    def __init__(self, federation: Loopback, site: str, reply: Reply) -> None:
        self._connection = Connection(Kit(federation.site(site)), f"127.0.0.1:{federation.port}")
        self._reply = reply

    async def attend(self) -> None:
        async with self._connection as connection:
            sequence = 0
            done: set[str] = set()
            while True:
                sequence = (await connection.call(Poll(PROTOCOL, "0.1.0", sequence, 5.0))).sequence
                agenda = await connection.call(AskAgenda([]))
                sequence = agenda.sequence
                for given in agenda.assignments:
                    if given.task not in done:
                        answer = self._reply(given)
                        if answer is not None:
                            done.add(given.task)
                            await connection.call(answer)


@contextlib.asynccontextmanager
async def impostor(federation: Loopback, site: str, reply: Reply) -> AsyncIterator[None]:
    task = asyncio.create_task(Impostor(federation, site, reply).attend())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ready(given: Assignment) -> Answer:
    return Answer(given.job, given.task, inspected=Inspected({"train": 1}, {}))


def inline(given: Assignment, site: str, **changes) -> Answer:
    """The update that the toy's site would give, with ``changes``."""
    plan = wire.read_plan(io.BytesIO(given.inline))
    parts = {"delta": {"w": np.full_like(plan.params["w"], 0.5)}} if given.kind == "train" else {}
    values = {"site": site, "round": given.round, "version": plan.version, "parts": parts, "weight": 1 / WEIGHT_SCALE}
    values |= {"sums": {"loss_sum": 1.0, "examples": 1.0}, **changes}
    file = io.BytesIO()
    wire.write_update(file, Update(**values))
    return Answer(given.job, given.task, inline=file.getvalue())


@pytest.fixture
async def federation(tmp_path) -> AsyncIterator[Loopback]:
    async with loopback(tmp_path, SITES, lease_s=30.0) as made:
        yield made


async def test_the_model_is_that_of_a_simulation(federation, tmp_path):
    for site in SITES:
        await federation.start(site)
    wanted = job(output={"dir": str(tmp_path / "runs")}, strategy="scaffold", filters=["cast"])
    view = await federation.run(wanted)
    assert view.line.state == "finished", view.line.error
    calm = await asyncio.to_thread(run, wanted)
    report = (federation.made.server / "jobs" / view.line.job / "report.json").read_text()
    assert calm.report["model"]["sha256"] in report


async def test_a_robust_rule_ends_with_the_model_of_a_simulation(federation, tmp_path):
    for site in SITES:
        await federation.start(site)
    rule = {"rule": "geometric-median", "malicious": 1, "max_norm": 0.5}
    wanted = job(output={"dir": str(tmp_path / "runs")}, strategy={"name": "fedavgm", "robust": rule})
    view = await federation.run(wanted)
    assert view.line.state == "finished", view.line.error
    calm = await asyncio.to_thread(run, wanted)
    report = (federation.made.server / "jobs" / view.line.job / "report.json").read_text()
    assert calm.report["model"]["sha256"] in report


async def test_an_update_over_the_bound_is_rejected_by_name(federation):
    def lie(given: Assignment) -> Answer:
        if given.kind == "inspect":
            return ready(given)
        parts = {"delta": {"w": np.full(4, 100.0)}} if given.kind == "train" else {}
        return inline(given, "s1", parts=parts)

    for site in ("s0", "s2"):
        await federation.start(site)
    async with impostor(federation, "s1", lie):
        rule = {"rule": "median", "malicious": 0, "max_norm": 0.5}
        view = await federation.run(job(strategy={"name": "fedavg", "robust": rule}, rounds=1))
    assert view.line.state == "finished", view.line.error
    assert absences(view)[1]["s1"].startswith("rejected: The update's norm is 200; no site's may exceed 0.5")


async def test_baselines_side_by_side_are_those_of_a_simulation(federation, tmp_path):
    for site in SITES:
        await federation.start(site)
    wanted = job(baselines={"base": True, "local": True}, output={"dir": str(tmp_path / "runs")})
    view = await federation.run(wanted)
    assert view.line.state == "finished", view.line.error
    calm = await asyncio.to_thread(run, wanted)
    report = json.loads((federation.made.server / "jobs" / view.line.job / "report.json").read_text())
    assert report["failed_baselines"] == {}
    assert report["baselines"] == calm.report["baselines"]


async def test_who_joins_late_takes_part_from_then_on(federation):
    await federation.start("s0")
    await federation.start("s1")
    async with federation.lead() as lead:
        id = await lead.submit(job(rounds=40, recipe={"delay_s": 0.02}, cohort={"quorum": 2}))
        # The server waits for the third as long as it has not been silent for the lease.
        await federation.start("s2")
        view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error
    assert set(view.records[-1]["accepted"]) == set(SITES)


async def test_who_leaves_is_lost_after_the_lease_and_the_job_goes_on(tmp_path):
    async with loopback(tmp_path, SITES, lease_s=2.0) as federation:
        for site in SITES:
            await federation.start(site)
        async with federation.lead() as lead:
            id = await lead.submit(job(rounds=6, recipe={"delay_s": 0.05}, cohort={"quorum": 2}))
            await lead.until(id, "round 1:")
            await federation.stop("s1")
            view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error
    assert set(view.records[-1]["accepted"]) == {"s0", "s2"}
    assert "lost: not heard from" in absences(view)[6]["s1"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda given: Answer(given.job, given.task, inline=bytes(64)), "not a Hansa value"),
        (lambda given: Answer(given.job, given.task, inline=b""), "ends inside the preamble"),
        (lambda given: inline(given, "s0"), "The update is of site 's0'"),
        (lambda given: inline(given, "s1", round=99), "round 99"),
        (lambda given: inline(given, "s1", version=99), "claims to start from model version 99"),
        (lambda given: inline(given, "s1", parts={"delta": {"w": np.full(4, np.nan)}}), "NaN or an infinity"),
        (lambda given: inline(given, "s1", parts={"delta": {"w": np.zeros(5)}}), "the model has"),
        (lambda given: inline(given, "s1", parts={"gradient": {"w": np.zeros(4)}}), "has parts ['gradient']"),
        (lambda given: inline(given, "s1", weight=-1.0), "weight is -1.0"),
        (lambda given: Answer(given.job, given.task, missing=Missing("lost", "x" * 4096)), "xxxx"),
    ],
)
async def test_garbage_is_rejected_by_name_and_the_rest_goes_on(federation, reply, reason):
    await federation.start("s0")
    await federation.start("s2")

    def answer(given: Assignment) -> Answer:
        if given.kind == "inspect":
            return ready(given)
        return reply(given) if given.kind == "train" else inline(given, "s1")

    async with impostor(federation, "s1", answer):
        view = await federation.run(job(rounds=2, cohort={"quorum": 2}))
    assert view.line.state == "finished", view.line.error
    assert all(reason in absent["s1"] for absent in absences(view).values()), absences(view)
    assert all(set(record["accepted"]) == {"s0", "s2"} for record in view.records)


async def test_garbage_in_place_of_an_evaluation_is_rejected_by_name(federation):
    await federation.start("s0")
    await federation.start("s2")

    def answer(given: Assignment) -> Answer:
        if given.kind == "inspect":
            return ready(given)
        return inline(given, "s1", **({"sums": {"loss_sum": 1.0}} if given.kind == "evaluate" else {}))

    async with impostor(federation, "s1", answer):
        view = await federation.run(job(rounds=2, cohort={"quorum": 2}))
    assert view.line.state == "finished", view.line.error
    assert "loss" in view.records[-1]["metrics"]
    assert "s1" not in {site for site, values in view.records[-1]["site_metrics"].items() if "loss" in values}


async def test_a_site_that_is_there_and_never_answers_is_outlived(tmp_path):
    async with loopback(tmp_path, SITES, lease_s=1.0) as federation:
        await federation.start("s0")
        await federation.start("s2")

        async def murmur() -> None:
            async with Connection(Kit(federation.site("s1")), f"127.0.0.1:{federation.port}") as connection:
                while True:
                    await connection.call(Report([]))
                    await asyncio.sleep(0.2)

        murmuring = asyncio.create_task(murmur())
        async with impostor(federation, "s1", lambda given: ready(given) if given.kind == "inspect" else None):
            view = await federation.run(job(rounds=1, cohort={"quorum": 2, "deadline_s": 0.5}))
        murmuring.cancel()
    assert view.line.state == "finished", view.line.error
    assert absences(view)[1]["s1"] == "late: not done 1.5 s after it was asked"


async def test_a_site_reaches_nothing_of_others(federation):
    """Neither another's tasks, nor files by their digest, nor what users may."""
    seen: list[Assignment] = []
    asked = asyncio.Event()

    def answer(given: Assignment) -> Answer | None:
        seen.append(given)
        asked.set()
        return None

    async with federation.lead() as lead, impostor(federation, "s1", answer):
        id = await lead.submit(job(cohort={"sites": ["s0", "s1"], "quorum": 1}))
        await asyncio.wait_for(asked.wait(), 30)
        (given,) = seen
        async with Connection(Kit(federation.site("s2")), f"127.0.0.1:{federation.port}") as other:
            with pytest.raises(JobError, match="was not asked"):
                await other.call(ready(given))
            with pytest.raises(AccessError, match="does not take part"):
                await other.download(id, given.bundle, federation.site("s2") / "stolen")
            with pytest.raises(AccessError):
                await other.call(ListJobs())
            with pytest.raises(AccessError):
                await other.call(AbortJob(id))
            assert not (await other.call(AskAgenda([]))).assignments
        async with Connection(Kit(federation.site("s1")), f"127.0.0.1:{federation.port}") as own:
            with pytest.raises(HansaError, match="not asked for"):
                await own.download(id, "0" * 64, federation.site("s1") / "guessed")
            with pytest.raises(JobError, match="another kind"):
                await own.call(Answer(given.job, given.task, inline=b"x"))
        await lead.connection.call(AbortJob(id))


async def test_a_late_update_is_used_in_a_later_round(federation):
    """s1 is asked in the first round only and overruns its deadline; its update counts in a round that asks others."""
    first = [True, False, False, False, False]
    seed = next(seed for seed in range(10_000) if ["s1" in sample(SITES, 2, seed, n) for n in range(1, 6)] == first)
    for site in SITES:
        await federation.start(site)
    cohort = {"deadline_s": 0.5, "late": "accept", "quorum": 1, "sample": 2}
    delays = {"s0": 0.08, "s1": 0.15, "s2": 0.08}
    view = await federation.run(job(rounds=5, seed=seed, recipe={"delay_s": delays}, cohort=cohort))
    assert view.line.state == "finished", view.line.error
    assert "late" in absences(view)[1]["s1"]
    assert [record["round"] for record in view.records if "s1" in record["accepted"]] in ([2], [3], [4], [5])


async def test_a_server_that_stops_in_the_middle_of_a_round_goes_on_with_what_it_had(tmp_path):
    trained = tmp_path / "trained.txt"
    asked = job(rounds=5, recipe={"delay_s": {"s2": 0.1}, "trained": str(trained)}, cohort={"quorum": 1.0})
    async with Loopback(tmp_path, SITES) as federation:
        async with federation.serving():
            for site in SITES:
                federation.write(site)
                await federation.start(site)
            async with federation.lead() as lead:
                id = await lead.submit(asked)
                await lead.until(id, "round 2:")
        async with federation.serving(), federation.lead() as lead:
            view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error
    lines = trained.read_text().split("\n")[:-1]
    assert sorted(lines) == sorted({f"{site} {number}" for site in SITES for number in range(1, 6)})


async def test_jobs_queue_run_side_by_side_and_can_be_aborted_and_resumed(tmp_path):
    async with loopback(tmp_path, SITES, max_running_jobs=2) as federation:
        for site in SITES:
            await federation.start(site)
        async with federation.lead() as lead:
            slow = {"delay_s": 0.05}
            first, second, third = [await lead.submit(job(name=f"job-{n}", rounds=30, recipe=slow)) for n in "abc"]
            await lead.until(first, "round 1:")
            await lead.until(second, "round 1:")
            assert (await lead.show(third)).line.state == "queued"
            await lead.connection.call(AbortJob(first))
            await lead.until(third, "round 1:")
            view = await lead.wait(first)
            assert view.line.state == "aborted"
            for id in (second, third):
                await lead.connection.call(AbortJob(id))
                await lead.wait(id)
            await lead.connection.call(ResumeJob(first))
            view = await lead.wait(first)
            assert view.line.state == "finished", view.line.error
            assert [record["round"] for record in view.records] == list(range(1, 31))


async def test_a_job_that_its_quorum_refuses_fails_with_every_reason(federation):
    for site in SITES:
        await federation.start(site)
    view = await federation.run(job(recipe={"faults": {"s1:0": "data"}}, cohort={"quorum": 1.0}))
    assert view.line.state == "failed"
    assert "s1: The site has no examples" in view.line.error
    assert view.sites["s1"] == "refused: The site has no examples."


async def test_a_sites_admin_takes_it_out_of_a_job(federation, tmp_path):
    for site in SITES:
        await federation.start(site)
    admin = federation.authority.issue(tmp_path / "bo", Role.ADMIN, "bo", site="s1")
    async with federation.lead() as lead:
        id = await lead.submit(job(rounds=20, recipe={"delay_s": 0.03}, cohort={"quorum": 2}))
        await lead.until(id, "round 1:")
        async with Connection(admin, f"127.0.0.1:{federation.port}") as connection:
            with pytest.raises(AccessError, match="for site s1 alone"):
                await connection.call(WithdrawSite(id, "s0"))
            with pytest.raises(AccessError):
                await connection.call(AbortJob(id))
            await connection.call(WithdrawSite(id, "s1"))
        view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error
    assert absences(view)[20]["s1"] == "refused: withdrawn from the job by admin/bo"
    assert set(view.records[-1]["accepted"]) == {"s0", "s2"}


async def test_the_fixed_point_is_fedavgs(federation, tmp_path):
    for site in SITES:
        await federation.start(site)
    view = await federation.run(job(rounds=60, evaluation={"every": 0}))
    assert view.line.state == "finished", view.line.error
    digest, _ = view.files["model/model.safetensors"]
    async with federation.lead() as lead:
        path = tmp_path / "model.safetensors"
        await lead.connection.download(view.line.job, digest, path)
        with pytest.raises(JobError, match="no such file"):
            await lead.connection.download(view.line.job, describe(federation.made.server / "server.toml").digest, path)
    assert load_tree(path)["w"][0] == pytest.approx(fixed_point_fedavg(), rel=1e-6)


async def test_a_new_credential_brings_the_roster_that_lists_it(federation, tmp_path):
    """A submitter's credential for eight hours works at a server that has not heard of it; sites learn of it, too."""
    for site in SITES:
        await federation.start(site)
    short = federation.authority.issue(
        tmp_path / "short", Role.LEAD, "eve", lifetime=timedelta(hours=8), scopes=["submit", "show", "logs"]
    )
    for site in SITES:
        federation.write(site, signers=["eve"])
    path = tmp_path / "job.zip"
    async with Connection(short, f"127.0.0.1:{federation.port}") as connection:
        manifest = describe(path, bundle.pack(job(), path, short))
        await connection.upload("", "bundle", path, manifest)
        id = (await connection.call(Submit(manifest.digest, "once"))).job
        with pytest.raises(AccessError, match="not to abort"):
            await connection.call(AbortJob(id))
        async for _ in connection.follow(Follow(id, 0, True)):
            pass
        view = await connection.call(ShowJob(id))
    assert view.line.state == "finished", view.line.error
    assert view.line.submitter == "eve"
    older = Kit(federation.made.users["ana"]).roster().data
    async with Connection(short, f"127.0.0.1:{federation.port}") as connection:
        with pytest.raises(AccessError, match="older than"):
            await connection.call(OfferRoster(older))
        with pytest.raises(HansaError):
            await connection.call(OfferRoster(b"{}"))


async def test_a_job_that_is_resumed_while_its_round_is_evaluated(federation):
    """A site that had no update then would change the model, and sites that have evaluated it refuse another one."""
    lost, judging = True, asyncio.Event()

    def reply(given: Assignment) -> Answer | None:
        if given.kind == "inspect":
            return ready(given)
        if given.kind == "evaluate":
            judging.set()
            return None if lost else inline(given, "s1")
        return Answer(given.job, given.task, missing=Missing("lost", "no power")) if lost else inline(given, "s1")

    await federation.start("s0")
    async with impostor(federation, "s1", reply), federation.lead() as lead:
        cohort = {"sites": ["s0", "s1"], "quorum": 1}
        id = await lead.submit(job(rounds=2, recipe={"sites": ["s0", "s1"]}, cohort=cohort))
        await asyncio.wait_for(judging.wait(), 60)
        with contextlib.closing(sqlite3.connect(federation.made.server / "hansa.db")) as database:
            judged = "SELECT 1 FROM tasks WHERE kind = 'evaluate' AND site = 's0' AND state = 'done'"
            async with asyncio.timeout(60):
                while database.execute(judged).fetchone() is None:
                    await asyncio.sleep(0.02)
        await lead.connection.call(AbortJob(id))
        await lead.wait(id)
        lost = False
        await lead.connection.call(ResumeJob(id))
        view = await lead.wait(id)
        said = [event.text async for event in lead.connection.follow(Follow(id, 0, False)) if event.kind == "absent"]
    assert view.line.state == "finished", view.line.error
    assert [line for line in said if "another plan" in line] == []
    assert [list(at) for at in absences(view).values()] == [["s1"], []]


async def test_answers_to_messages_are_taken_once_and_of_the_kind_that_was_asked(federation):
    """A site that answers a message of secure aggregation with an update, or a huge one, or nonsense, is one less."""
    told: list[str] = []

    def reply(given: Assignment) -> Answer:
        return ready(given) if given.kind == "inspect" else Answer(given.job, given.task, letter=b"nonsense")

    def other(given: Assignment) -> Answer:
        if given.kind == "inspect":
            return ready(given)
        told.append(given.kind)
        return Answer(given.job, given.task, missing=Missing("refused", "no"))

    asked = job(secure_aggregation={}, rounds=1)
    async with (
        impostor(federation, "s0", reply),
        impostor(federation, "s1", reply),
        impostor(federation, "s2", other),
    ):
        view = await federation.run(asked)
    id = view.line.job
    assert view.line.state == "failed"
    assert told == ["advertise"]
    assert view.line.error.count("s0: rejected: Secure aggregation: this is no Advert") == 1, view.line.error
    assert "s2: refused: no" in view.line.error
    async with Connection(Kit(federation.site("s0")), f"127.0.0.1:{federation.port}") as connection:
        with pytest.raises(JobError, match="was not asked"):
            await connection.call(Answer(id, "unknown", letter=b"late"))
        with pytest.raises(HansaError):
            await connection.call(Answer(id, "unknown", letter=bytes(INLINE_BYTES + 1)))


async def test_an_inline_plan_is_the_one_that_was_announced(federation, monkeypatch):
    """A site remembers plans by their digests, so a server may not call two by one."""
    agenda = Service._agenda

    def swapping(self, site, have, open):
        told = agenda(self, site, have, open)
        for given in told.assignments:
            if given.kind == "train" and site == "s1":
                plan = wire.read_plan(io.BytesIO(given.inline))
                file = io.BytesIO()
                wire.write_plan(file, replace(plan, params={**plan.params, "w": plan.params["w"] + 1}))
                given.inline = file.getvalue()
        return told

    monkeypatch.setattr(Service, "_agenda", swapping)
    for site in SITES:
        await federation.start(site)
    view = await federation.run(job(rounds=1, cohort={"quorum": 2}))
    assert absences(view) == {1: {"s1": "refused: The server sent another plan than it announced."}}
