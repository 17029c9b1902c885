# SPDX-License-Identifier: Apache-2.0
"""What one submitter may have at a server, held where space is taken and not only when a job is submitted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import pytest

from federations import Loopback, loopback
from hansa.errors import AccessError, JobError, WireError
from hansa.pki.kit import Kit
from hansa.server import service
from hansa.server.store import Store
from hansa.transport.client import Connection
from hansa.transport.messages import AbortJob, DeleteJob, Follow, ResumeJob
from hansa.transport.pieces import Manifest, describe
from server.test_remote import impostor, ready
from server.test_uploads import asked, random_bytes
from toys import job

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20


def one(**values):
    return job(**{"cohort": {"sites": ["s0"]}, "recipe": {"sites": ["s0"]}, **values})


async def test_a_job_that_grows_meets_the_quota_before_a_round_begins(tmp_path: Path) -> None:
    """It fails with its finished rounds; when there is room again it goes on from them."""
    federation = Loopback(tmp_path, ["s0"])
    async with federation.serving(quota={"bytes": 3 * MIB}), federation.lead() as lead:
        federation.write("s0")
        await federation.start("s0")
        large = await lead.submit(one(recipe={"sites": ["s0"], "size": 100_000}, rounds=1))
        view = await lead.wait(large)
        assert view.line.kind == "AccessError"
        assert "may hold 3,145,728 (quota.bytes in server.toml). Delete finished jobs" in view.line.error
        assert not list((federation.made.server / "jobs" / large / "work" / "plans").iterdir())
    try:
        async with federation.serving(quota={"bytes": 64 * MIB}), federation.lead() as lead:
            await lead.connection.call(ResumeJob(large))
            view = await lead.wait(large)
            assert view.line.state == "finished", view.line.error
            with contextlib.closing(Store.view(None, federation.made.server)) as store:
                held = store.held("ana")
        async with federation.serving(quota={"bytes": held + 50_000}), federation.lead() as lead:
            small = await lead.submit(one(recipe={"sites": ["s0"], "size": 4000}))
            view = await lead.wait(small)
            assert "(quota.bytes" in view.line.error
            await lead.connection.call(DeleteJob(large))
            await lead.connection.call(ResumeJob(small))
            view = await lead.wait(small)
            assert view.line.state == "finished", view.line.error
    finally:
        await federation.stop("s0")


async def test_jobs_that_grow_at_once_meet_it_together(tmp_path: Path) -> None:
    """Each alone has room, and all were submitted before any had grown."""
    async with loopback(tmp_path, quota={"bytes": 4 * MIB}) as federation, federation.lead() as lead:
        held = {"sites": ["s0"], "size": 100_000}

        def reply(given):
            return ready(given) if given.kind == "inspect" else None

        async with impostor(federation, "s0", reply):
            ids = [await lead.submit(one(recipe=held, rounds=1)) for _ in range(3)]
            ended = {asyncio.create_task(lead.wait(id)) for id in ids}
            try:
                done, ended = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
                assert "(quota.bytes" in done.pop().result().line.error
            finally:
                for task in ended:
                    task.cancel()
                await asyncio.gather(*ended, return_exceptions=True)
            states = [(await lead.show(id)).line.state for id in ids]
            assert "failed" in states
            with contextlib.closing(Store.view(None, federation.made.server)) as store:
                assert store.held("ana") <= 4 * MIB
            for id in ids:
                with contextlib.suppress(JobError):  # it has failed
                    await lead.connection.call(AbortJob(id))


async def test_bundles_that_were_not_submitted_count(tmp_path: Path) -> None:
    async with loopback(tmp_path, quota={"bytes": 3 * MIB}) as federation, federation.lead() as lead:
        for seed in (1, 2):
            file = random_bytes(tmp_path / f"bundle{seed}", MIB, seed)
            await lead.connection.upload("", "bundle", file, describe(file))
            await lead.connection.upload("", "bundle", file, describe(file))
        file = random_bytes(tmp_path / "bundle3", 2 * MIB, 3)
        with pytest.raises(AccessError, match=r"would hold 4,194,304 bytes.*quota.bytes"):
            await lead.connection.upload("", "bundle", file, describe(file))
        assert len([*(federation.made.server / "incoming").glob("*.zip*")]) == 2


async def test_an_update_larger_than_its_plan_meets_the_quota(tmp_path: Path) -> None:
    async with loopback(tmp_path, quota={"bytes": 5 * MIB}) as federation, federation.lead() as lead:
        id = await lead.submit(one(recipe={"sites": ["s0"], "size": 150_000}, rounds=1))
        async with Connection(Kit(federation.site("s0")), f"127.0.0.1:{federation.port}") as site:
            given = await asked(site, "train")
            file = random_bytes(tmp_path / "update", 4 * MIB)
            with pytest.raises(Exception, match=r"may hold 5,242,880 \(quota.bytes"):
                await site.upload(id, given.task, file, describe(file))
            assert not list((federation.made.server / "jobs" / id / "work" / "updates").iterdir())
        await lead.connection.call(AbortJob(id))


async def test_a_resumed_job_counts(tmp_path: Path) -> None:
    async with loopback(tmp_path, quota={"jobs": 1}) as federation, federation.lead() as lead:
        first = await lead.submit(one())
        await lead.connection.call(AbortJob(first))
        await lead.wait(first)
        second = await lead.submit(one())
        with pytest.raises(AccessError, match=r"may have 1 \(quota.jobs"):
            await lead.connection.call(ResumeJob(first))
        await lead.connection.call(AbortJob(second))
        await lead.connection.call(ResumeJob(first))
        await lead.connection.call(AbortJob(first))


async def test_a_plan_larger_than_a_model_may_be(tmp_path: Path) -> None:
    """The model is not too large; with the controls that SCAFFOLD sends it is."""
    async with loopback(tmp_path, max_model_bytes=12_000) as federation, federation.lead() as lead:
        await federation.start("s0")
        recipe = {"sites": ["s0"], "size": 1000}
        view = await lead.wait(await lead.submit(one(recipe=recipe, rounds=1)))
        assert view.line.state == "finished", view.line.error
        id = await lead.submit(one(recipe=recipe, strategy="scaffold", rounds=1))
        view = await lead.wait(id)
        assert f"job {id}, round 1: The plan" in view.line.error
        assert "allows 12,000 (max_model_bytes in server.toml)" in view.line.error


async def test_a_bundle_of_one_piece_repeated(tmp_path: Path) -> None:
    """It would travel as a MiB and lie there as a hundred."""
    async with loopback(tmp_path) as federation, federation.lead() as lead:
        file = random_bytes(tmp_path / "bundle", MIB)
        with pytest.raises(WireError, match="1,048,576 different ones, repeated"):
            await lead.connection.upload("", "bundle", file, Manifest(describe(file).pieces * 100))
        assert list((federation.made.server / "incoming").iterdir()) == []


async def test_no_call_reads_the_database_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.job
    seen: set[threading.Thread] = set()

    def noted(self: Store, id: str):
        seen.add(threading.current_thread())
        return real(self, id)

    monkeypatch.setattr(Store, "job", noted)
    async with loopback(tmp_path) as federation, federation.lead() as lead:
        id = await lead.submit(one())
        await lead.connection.call(AbortJob(id))
        await lead.wait(id)
        await lead.connection.call(ResumeJob(id))
        await lead.connection.call(AbortJob(id))
        await lead.wait(id)
        assert [event async for event in lead.connection.follow(Follow(id, 0, False))]
        await lead.connection.call(DeleteJob(id))
    assert seen
    assert threading.main_thread() not in seen


def test_what_was_uploaded_and_never_submitted_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aged by the process's own clock; what is written to or offered again is new."""
    clock = [0.0]
    monkeypatch.setattr(service.time, "monotonic", lambda: clock[0])
    old, offered, growing = (tmp_path / f"lead-ana-{name}.zip" for name in "abc")
    for path in (old, old.with_suffix(".manifest"), offered, growing.with_name(f"{growing.name}.part")):
        path.write_bytes(b"x")
    (tmp_path / "toy-0001").mkdir()
    waiting = service.Unclaimed(tmp_path)
    assert waiting.sweep() == []
    clock[0] = service.UNCLAIMED_S
    growing.with_name(f"{growing.name}.part").write_bytes(b"xy")
    waiting.touch(offered)
    assert set(waiting.sweep()) == {old, old.with_suffix(".manifest")}
    assert {path.name for path in tmp_path.iterdir()} == {offered.name, f"{growing.name}.part", "toy-0001"}
    assert waiting.sweep() == []
    clock[0] = 2 * service.UNCLAIMED_S
    assert set(waiting.sweep()) == {offered, growing}


async def test_a_clock_step_deletes_no_fresh_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SWEEP_S", 0.01)
    async with loopback(tmp_path) as federation, federation.lead() as lead:
        file = random_bytes(tmp_path / "bundle", 1000)
        await lead.connection.upload("", "bundle", file, describe(file))
        (kept,) = (federation.made.server / "incoming").glob("*.zip")
        os.utime(kept, (0, 0))
        swept = asyncio.Event()
        real = service.Unclaimed.sweep
        loop = asyncio.get_running_loop()

        def sweep(self):
            found = real(self)
            loop.call_soon_threadsafe(swept.set)
            return found

        monkeypatch.setattr(service.Unclaimed, "sweep", sweep)
        for _ in range(2):
            swept.clear()
            await asyncio.wait_for(swept.wait(), 60)
        assert kept.exists()


async def test_a_bucket_beside_sqlite_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Loopback(tmp_path, ["s0"]).serving(blobs="s3://bucket", s3={"endpoint": "http://127.0.0.1:1"}):
        pass
    assert "the database lies on this disk alone" in caplog.text
