# SPDX-License-Identifier: Apache-2.0
"""The audit log: every kind of refusal is in it, and none can flood it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from federations import Loopback, loopback
from hansa.errors import AccessError, HansaError
from hansa.pki.kit import Kit
from hansa.server.store import AuditRow, Store
from hansa.transport.client import Connection
from hansa.transport.messages import AbortJob, AskAgenda, Follow
from toys import SITES, job

pytestmark = pytest.mark.timeout(60)


def refusals(federation: Loopback) -> list[AuditRow]:
    with contextlib.closing(Store.view(None, federation.made.server)) as store:
        return [row for row in store.audits() if row.outcome == "refused"]


async def test_refusals_are_noted_once_a_minute_each(tmp_path: Path) -> None:
    async with loopback(tmp_path, SITES) as federation, federation.lead() as lead:
        id = await lead.submit(job(cohort={"sites": ["s0"]}))
        stolen = federation.site("s2") / "stolen"
        async with Connection(Kit(federation.site("s2")), f"127.0.0.1:{federation.port}") as other:
            for _ in range(3):
                with pytest.raises(AccessError):
                    await other.download(id, "0" * 64, stolen)
                with pytest.raises(AccessError):
                    async for _ in other.follow(Follow(id, 0, False)):
                        pass
        await lead.connection.call(AbortJob(id))
        noted = [(row.actor, row.role, row.action, row.subject) for row in refusals(federation)]
    assert noted == [("site/s2", "site", "download", id), ("site/s2", "site", "follow", id)]


async def test_who_is_not_admitted_is_noted_by_address(tmp_path: Path) -> None:
    async with loopback(tmp_path, SITES) as federation:
        federation.authority.revoke("site/s2", "lost")
        (federation.made.server / "roster.json").write_bytes(federation.authority.roster.data)
        async with Connection(Kit(federation.site("s2")), f"127.0.0.1:{federation.port}") as other:
            for _ in range(3):
                with pytest.raises(HansaError):
                    await other.call(AskAgenda([]))
        noted = [(row.actor, row.action) for row in refusals(federation)]
    assert noted == [("ipv4:127.0.0.1", "AskAgenda")]
