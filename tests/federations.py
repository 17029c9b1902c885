# SPDX-License-Identifier: Apache-2.0
"""A federation on loopback in this process's event loop: real TLS, a real server, real agents and workers.

Where a process has to be killed, `hansa.lab` brings up the same with a process each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from hansa import bundle
from hansa.core.config import Job
from hansa.pki.authority import Authority
from hansa.pki.kit import Kit
from hansa.pki.provision import provision
from hansa.server.main import Running, running
from hansa.server.settings import ServerSettings
from hansa.site.agent import Agent
from hansa.transport.client import Connection
from hansa.transport.messages import Follow, JobEvent, JobView, ShowJob, Submit
from hansa.transport.pieces import describe


class Loopback:
    """Everybody's folders, the server's port, and the agents that were started, which end with its context."""

    def __init__(self, directory: Path, sites: Sequence[str]) -> None:
        self.made = provision(directory / "fed", "lab", "127.0.0.1:8470", sites, ["ana"])
        self.authority = Authority(self.made.authority)
        self.port = 0
        self.agents: dict[str, asyncio.Task[None]] = {}
        self._folder = directory

    async def __aenter__(self) -> Loopback:
        return self

    async def __aexit__(self, *_: object) -> None:
        for site in list(self.agents):
            await self.stop(site)

    @contextlib.asynccontextmanager
    async def serving(self, **settings: Any) -> AsyncIterator[Running]:
        """Run the server, on the port that it had before."""
        policy = {"signers": ["ana", "eve"]}
        chosen = ServerSettings(**{"listen": f"127.0.0.1:{self.port}", "http": "off", "policy": policy, **settings})
        async with running(self.made.server, chosen) as server:
            self.port = server.port
            yield server

    def site(self, name: str) -> Path:
        return self.made.sites[name]

    def write(self, site: str, text: str = "", *, port: int | None = None, **policy: Any) -> None:
        """Write ``site.toml``: ``text`` is what stands before the policy's table."""
        lines = [f'server = "127.0.0.1:{port or self.port}"', text, "[policy]"]
        rules = {"recipes": ["toys:build", "mischief:build"], "job_paths": True, **policy}
        lines += [f"{key} = {_toml(value)}" for key, value in rules.items()]
        (self.site(site) / "site.toml").write_text("\n".join(lines) + "\n")

    async def start(self, site: str) -> None:
        """Start a site's agent and wait until the server has answered it."""
        joined = asyncio.Event()
        agent = self.agents[site] = asyncio.create_task(Agent(self.site(site)).run(joined))
        waiting = asyncio.create_task(joined.wait())
        await asyncio.wait({agent, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if agent.done():
            agent.result()

    async def stop(self, site: str) -> None:
        """End a site's agent as SIGTERM does."""
        agent = self.agents.pop(site)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def lead(self) -> AsyncIterator[Lead]:
        async with Connection(Kit(self.made.users["ana"]), f"127.0.0.1:{self.port}") as connection:
            yield Lead(connection, Kit(self.made.users["ana"]), self._folder)

    async def run(self, job: Job) -> JobView:
        """Submit a job and wait for its end."""
        async with self.lead() as lead:
            return await lead.wait(await lead.submit(job))


class Lead:
    """Who submits jobs."""

    def __init__(self, connection: Connection, kit: Kit, folder: Path) -> None:
        self.connection = connection
        self._kit = kit
        self._folder = folder

    async def submit(self, job: Job) -> str:
        path = self._folder / f"{uuid.uuid4().hex}.zip"
        manifest = describe(path, bundle.pack(job, path, self._kit))
        await self.connection.upload("", "bundle", path, manifest)
        return (await self.connection.call(Submit(manifest.digest, path.stem))).job

    async def events(self, id: str) -> AsyncIterator[JobEvent]:
        """Yield the job's log until it ends."""
        async for event in self.connection.follow(Follow(id, 0, True)):
            yield event

    async def until(self, id: str, text: str) -> None:
        """Wait for a line of the job's log."""
        seen = []
        async for event in self.events(id):
            seen.append(f"{event.kind} {event.text}")
            if text in seen[-1]:
                return
        raise AssertionError(f"the job ended without {text!r}: {seen}")

    async def show(self, id: str) -> JobView:
        return await self.connection.call(ShowJob(id))

    async def wait(self, id: str) -> JobView:
        async for _ in self.events(id):
            pass
        return await self.show(id)


@contextlib.asynccontextmanager
async def loopback(directory: Path, sites: Sequence[str] = ("s0",), **settings: Any) -> AsyncIterator[Loopback]:
    """Make a federation and run its server; agents that are started end with it."""
    made = Loopback(directory, sites)
    async with made.serving(**settings), made:
        for site in sites:
            made.write(site)
        yield made


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)
