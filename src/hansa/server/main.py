# SPDX-License-Identifier: Apache-2.0
"""A server, from its folder to its last breath."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hansa.pki.kit import Kit
from hansa.server.desk import Desk
from hansa.server.jobs import Jobs
from hansa.server.service import Service
from hansa.server.settings import ServerSettings
from hansa.server.store import Store
from hansa.transport.server import serve


@dataclass(frozen=True)
class Running:
    """A server at work.

    Attributes:
        host, port: where sites and users reach it.
        jobs: the job queue; it ends only by being cancelled or by a defect.
    """

    host: str
    port: int
    jobs: asyncio.Task[None]


@contextlib.asynccontextmanager
async def running(directory: Path, settings: ServerSettings) -> AsyncIterator[Running]:
    """Run the server of ``directory`` while the body does.

    Raises:
        StorageError: the folder or database can't be used, or another server uses it.
        UnreachableError: the port is taken.
        AccessError: the kit is not a server's.
    """
    kit = Kit(directory)
    store = await asyncio.to_thread(Store.open, settings.database, directory)
    try:
        desk = Desk()
        members: list[Service] = []
        jobs = Jobs(directory, settings, store, desk, lambda: members[0].members())
        service = Service(directory, kit, settings, store, desk, jobs)
        members.append(service)
        host, port = settings.listen_address
        server = await serve(service, kit, host, port)
        queue = asyncio.create_task(jobs.run())
        try:
            yield Running(host, server.port, queue)
        finally:
            queue.cancel()
            await asyncio.gather(queue, return_exceptions=True)
            await server.stop(1.0)
    finally:
        await asyncio.to_thread(store.close)
