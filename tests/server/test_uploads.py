# SPDX-License-Identifier: Apache-2.0
"""What may be uploaded, how large it may be, and what becomes of what nobody needs."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from federations import Lead, Loopback, loopback
from hansa import bundle
from hansa.errors import HansaError, JobError, StorageError, WireError
from hansa.pki.kit import Kit
from hansa.server.service import Service, implied_bytes
from hansa.transport.client import Connection
from hansa.transport.messages import (
    MAX_ACTIVITIES,
    PROTOCOL,
    Activity,
    Answer,
    AskAgenda,
    Assignment,
    ListSites,
    Missing,
    Poll,
    Report,
    Submit,
)
from hansa.transport.pieces import Manifest, describe
from server.test_remote import inline, ready
from toys import SITES, job

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20


@pytest.fixture
async def federation(tmp_path: Path) -> AsyncIterator[Loopback]:
    async with loopback(tmp_path, SITES, lease_s=30.0, max_bundle_bytes=8 * MIB) as made:
        yield made


@pytest.fixture
async def site(federation: Loopback) -> AsyncIterator[Connection]:
    async with Connection(Kit(federation.site("s1")), f"127.0.0.1:{federation.port}") as connection:
        yield connection


@pytest.fixture
async def lead(federation: Loopback) -> AsyncIterator[Lead]:
    async with federation.lead() as made:
        yield made


def random_bytes(path: Path, num_bytes: int, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(num_bytes))
    return path


async def asked(site: Connection, kind: str) -> Assignment:
    """Wait until the site is asked for ``kind``; it says that it is ready meanwhile."""
    sequence = 0
    while True:
        agenda = await site.call(AskAgenda([]))
        for given in agenda.assignments:
            if given.kind == kind:
                return given
            if given.kind == "inspect":
                await site.call(ready(given))
        sequence = (await site.call(Poll(PROTOCOL, "0.1.0", agenda.sequence or sequence, 5.0))).sequence


def arrived(federation: Loopback, id: str) -> set[str]:
    return {path.name for path in (federation.made.server / "jobs" / id / "work" / "updates").iterdir()}


async def test_an_update_is_no_larger_than_its_plan_implies(federation, site, lead, tmp_path):
    """One piece, listed two hundred times, is a file of 200 MiB: it counts as one before anything is written."""
    id = await lead.submit(job(cohort={"sites": ["s1"]}))
    file = random_bytes(tmp_path / "update", MIB)
    repeated = Manifest(describe(file).pieces * 200)
    given = await asked(site, "inspect")
    with pytest.raises(JobError, match="A task to inspect is answered in a message"):
        await site.upload(id, given.task, file, repeated)
    given = await asked(site, "train")
    most = f"{implied_bytes(len(given.inline)):,}"
    with pytest.raises(WireError, match=f"at most {most} are accepted"):
        await site.upload(id, given.task, file, repeated)
    crumbs = Manifest(tuple((1, index.to_bytes(32, "little")) for index in range(40_000)))
    with pytest.raises(WireError, match="too long"):
        await site.upload(id, given.task, file, crumbs)
    assert arrived(federation, id) == set()


async def test_a_bundle_has_a_largest_size(federation, lead, tmp_path):
    file = random_bytes(tmp_path / "bundle", MIB)
    with pytest.raises(WireError, match="at most 8,388,608 are accepted"):
        await lead.connection.upload("", "bundle", file, Manifest(describe(file).pieces * 300))
    assert list((federation.made.server / "incoming").iterdir()) == []


async def test_a_bundle_whose_manifest_was_not_kept_is_taken_when_it_is_offered_again(
    federation, lead, tmp_path, monkeypatch
):
    async def fail(self, *_):
        raise StorageError("The disk is full.")

    path = tmp_path / "bundle.zip"
    manifest = describe(path, bundle.pack(job(), path, Kit(federation.made.users["ana"])))
    with monkeypatch.context() as patch:
        patch.setattr(Service, "received", fail)
        with pytest.raises(StorageError):
            await lead.connection.upload("", "bundle", path, manifest)
    await lead.connection.upload("", "bundle", path, manifest)
    assert (await lead.connection.call(Submit(manifest.digest, "key"))).job


async def test_an_answer_names_the_very_file_that_it_means(federation, site, lead, tmp_path):
    """Of several files for one task the last stays, and only it can be answered with; nothing else is left over."""
    id = await lead.submit(job(rounds=1, cohort={"sites": ["s1"]}))
    given = await asked(site, "train")
    junk = random_bytes(tmp_path / "junk", 1000)
    await site.upload(id, given.task, junk, describe(junk))
    assert arrived(federation, id) == {f"{given.task}.{describe(junk).digest}.hansa"}
    update = tmp_path / "update"
    update.write_bytes(inline(given, "s1").inline or b"")
    digest = describe(update).digest
    with pytest.raises(StorageError, match="send it again"):
        await site.call(Answer(id, given.task, upload=digest))
    await site.upload(id, given.task, update, describe(update))
    assert arrived(federation, id) == {f"{given.task}.{digest}.hansa"}
    with pytest.raises(StorageError, match="send it again"):
        await site.call(Answer(id, given.task, upload=describe(junk).digest))
    await site.call(Answer(id, given.task, upload=digest))
    await site.upload(id, given.task, junk, describe(junk))
    assert describe(junk).digest not in "".join(arrived(federation, id))
    await site.call(inline(await asked(site, "evaluate"), "s1"))
    view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error


@pytest.mark.parametrize("unsynced", ["the file", "its entry"])
async def test_an_update_that_a_power_cut_could_take_is_not_acknowledged(federation, site, lead, monkeypatch, unsynced):
    """It is neither accepted nor refused: the task stays open, and the same answer is taken when the disk works."""
    id = await lead.submit(job(rounds=1, cohort={"sites": ["s1"]}))
    given = await asked(site, "train")
    answer = inline(given, "s1")
    updates = federation.made.server / "jobs" / id / "work" / "updates"
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == (updates / f"{given.task}.hansa" if unsynced == "the file" else updates):
            raise OSError(errno.EIO, "the disk failed")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StorageError, match="the disk failed"):
            await site.call(answer)
    agenda = await site.call(AskAgenda([]))
    assert [item.task for item in agenda.assignments] == [given.task]
    await site.call(answer)
    await site.call(inline(await asked(site, "evaluate"), "s1"))
    view = await lead.wait(id)
    assert view.line.state == "finished", view.line.error


async def test_what_came_in_part_goes_with_its_task(federation, site, lead, tmp_path):
    id = await lead.submit(job(rounds=1, cohort={"sites": ["s1"]}))
    given = await asked(site, "train")
    file = random_bytes(tmp_path / "update", 2000)
    manifest = describe(file, [0, 1000, 2000])
    file.write_bytes(file.read_bytes()[:1000] + bytes(1000))
    with pytest.raises(HansaError):
        await site.upload(id, given.task, file, manifest)
    assert arrived(federation, id) == {f"{given.task}.{manifest.digest}.hansa.part"}
    await site.call(Answer(id, given.task, missing=Missing("lost", "no")))
    assert arrived(federation, id) == set()


async def test_a_site_is_at_its_own_tasks_only(federation, site, lead):
    await lead.submit(job(cohort={"sites": ["s1"]}))
    given = await asked(site, "inspect")
    await site.call(Report([Activity(task, "working", 1.0) for task in ("another", given.task)]))
    (line,) = [line for line in (await lead.connection.call(ListSites())).sites if line.site == "s1"]
    assert len(line.activities) == 1
    with pytest.raises(WireError, match="This is no Report"):
        await site.call(Report([Activity(f"t{index}", "working", 1.0) for index in range(MAX_ACTIVITIES + 1)]))
