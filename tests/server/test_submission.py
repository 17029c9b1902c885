# SPDX-License-Identifier: Apache-2.0
"""Taking jobs in: names that are given once, folders that are never deleted unasked, and what a crash leaves."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from federations import Loopback, loopback
from hansa.errors import AccessError, StorageError
from hansa.pki.identity import Role
from hansa.server.jobs import Jobs
from hansa.server.store import Store
from hansa.transport.messages import AbortJob, DeleteJob, Follow
from toys import SITES, job

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def federation(tmp_path: Path) -> AsyncIterator[Loopback]:
    async with loopback(tmp_path, SITES) as made:
        yield made


async def test_an_id_is_given_once(federation: Loopback) -> None:
    async with federation.lead() as lead:
        first = await lead.submit(job(recipe={"name": "no-such-recipe"}, cohort={"sites": ["s0"]}))
        await lead.wait(first)
        await lead.connection.call(DeleteJob(first))
        second = await lead.submit(job(cohort={"sites": ["s1"]}))
        assert (first, second) == ("toy-0001", "toy-0002")
        assert list((await lead.show(second)).sites) == ["s1"]
        await lead.connection.call(AbortJob(second))


async def test_a_folder_that_the_database_does_not_know_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The database was moved away, say, or its URL has a mistake."""
    async with loopback(tmp_path) as federation, federation.lead() as lead:
        id = await lead.submit(job(recipe={"name": "no-such-recipe"}))
        await lead.wait(id)
    for path in federation.made.server.glob("hansa.db*"):
        path.rename(path.with_name(f"{path.name}.away"))
    left = federation.made.server / "incoming" / "toy-0009"
    left.mkdir()
    async with federation.serving(), federation.lead() as lead:
        assert (federation.made.server / "jobs" / id / "job.json").exists()
        assert f"{id} is of no job in the database" in caplog.text
        assert not left.exists(), "a submission that never became a job"
        assert await lead.submit(job(recipe={"name": "no-such-recipe"})) == "toy-0002"


async def test_killed_between_the_row_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Jobs, id: str) -> None:
        raise StorageError("the server ends here")

    async with loopback(tmp_path) as federation:
        with monkeypatch.context() as patch:
            patch.setattr(Jobs, "place", killed)
            async with federation.lead() as lead:
                with pytest.raises(StorageError, match="ends here"):
                    await lead.submit(job())
        assert not (federation.made.server / "jobs" / "toy-0001").exists()
    async with federation.serving(), federation.lead() as lead:
        view = await lead.show("toy-0001")
        assert (view.line.state, list(view.sites)) == ("running", ["s0"])
        await lead.connection.call(AbortJob("toy-0001"))
    assert not [path for path in (federation.made.server / "incoming").iterdir() if path.is_dir()]


async def test_a_submission_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    async with loopback(tmp_path, quota={"jobs": 1}) as federation, federation.lead() as lead:
        id = await lead.submit(job())
        with pytest.raises(AccessError, match="may have 1"):
            await lead.submit(job())
        await lead.connection.call(AbortJob(id))
        assert [path.name for path in (federation.made.server / "jobs").iterdir()] == [id]
        assert not [path for path in (federation.made.server / "incoming").iterdir() if path.is_dir()]


async def test_who_takes_part_is_who_was_there_when_the_job_came(tmp_path: Path) -> None:
    async with loopback(tmp_path, ["s0", "s1"]) as federation, federation.lead() as lead:
        id = await lead.submit(job())
    federation.authority.issue(tmp_path / "s9", Role.SITE, "s9")
    (federation.made.server / "roster.json").write_bytes(federation.authority.roster.data)
    async with federation.serving(), federation.lead() as lead:
        assert list((await lead.show(id)).sites) == ["s0", "s1"]
        await lead.connection.call(AbortJob(id))


async def test_the_log_of_an_ended_job_is_given_whole(federation: Loopback) -> None:
    async with federation.lead() as lead:
        id = await lead.submit(job(recipe={"name": "no-such-recipe"}))
        await lead.wait(id)
    with contextlib.closing(Store.view(None, federation.made.server)) as store:
        known = len(store.events(id))
    with contextlib.closing(sqlite3.connect(federation.made.server / "hansa.db")) as database, database:
        lines = [(id, "t", "note", str(number)) for number in range(1500)]
        database.executemany("INSERT INTO events (job, time, kind, text) VALUES (?, ?, ?, ?)", lines)
    async with federation.lead() as lead:
        seen = [event.text async for event in lead.connection.follow(Follow(id, 0, False))]
    assert len(seen) == known + 1500
