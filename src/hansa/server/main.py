# SPDX-License-Identifier: Apache-2.0
"""A server, from its folder to its last breath."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hansa.pki.kit import Kit
from hansa.server.blobs import open_blobs
from hansa.server.desk import Desk
from hansa.server.http import Metrics, Watch
from hansa.server.jobs import Jobs
from hansa.server.service import Service
from hansa.server.settings import ServerSettings
from hansa.server.store import Store
from hansa.transport.server import serve

_LOG = logging.getLogger("hansa.server")


@dataclass(frozen=True)
class Running:
    """A server at work.

    Attributes:
        host, port: where sites and users reach it.
        http_port: where health and metrics are; None where the settings want none.
        jobs: the job queue; it ends only by being cancelled or by a defect.
    """

    host: str
    port: int
    http_port: int | None
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
    if settings.blobs is not None and not (settings.database or "").startswith("postgresql://"):
        _LOG.warning(
            "The bucket %s holds the files of jobs; the database lies on this disk alone (SQLite), and without it they "
            "are of no use. Use PostgreSQL (database in server.toml), or copy the database elsewhere.",
            settings.blobs,
        )
    store = await asyncio.to_thread(Store.open, settings.database, directory)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, store.close)
        blobs = open_blobs(settings, directory)
        desk = Desk()
        metrics = Metrics(store.count_jobs, lambda: desk.connected(settings.lease_s))
        jobs = Jobs(directory, settings, store, blobs, desk, metrics, kit)
        await asyncio.to_thread(jobs.recover)
        service = Service(directory, kit, settings, store, blobs, desk, jobs, metrics)
        host, port = settings.listen_address
        server = await serve(service, kit, host, port, stall_s=settings.stall_s)
        stack.push_async_callback(server.stop, 1.0)
        http_port = None
        if settings.http_address is not None:
            watch = Watch(metrics, {"database": store.ping, "files": blobs.ping})
            await watch.start(*settings.http_address)
            stack.push_async_callback(watch.stop)
            http_port = watch.port
        sweeping = asyncio.create_task(service.sweep())
        stack.push_async_callback(_end, sweeping)
        queue = asyncio.create_task(jobs.run())
        stack.push_async_callback(_end, queue)
        yield Running(host, server.port, http_port, queue)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
