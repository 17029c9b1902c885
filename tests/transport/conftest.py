# SPDX-License-Identifier: Apache-2.0
"""A federation with real certificates, and a server that keeps files in a folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from hansa.errors import HansaError, JobError
from hansa.pki.authority import Authority
from hansa.pki.identity import Identity, Role
from hansa.pki.kit import Kit
from hansa.transport import messages
from hansa.transport.client import Connection
from hansa.transport.messages import Attend, Follow, Get, JobEvent, Message, Offer, Ring
from hansa.transport.pieces import Incoming, Manifest, describe
from hansa.transport.server import Destination, Server, serve


class Federation:
    """An authority and the kits that it signed, each with the newest roster."""

    def __init__(self, directory: Path, name: str = "lab") -> None:
        self.directory = directory
        self.authority = Authority.create(directory / "authority", name)
        self.server = self.kit(Role.SERVER, "main")
        self.site = self.kit(Role.SITE, "riga")
        self.tell(self.server)

    def kit(self, role: Role, name: str, lifetime: timedelta | None = None) -> Kit:
        folder = self.directory / f"{role}-{name}"
        return self.authority.issue(folder, role, name, lifetime=lifetime)

    def age(self, kit: Kit) -> None:
        """Give a kit a certificate that expired four weeks ago."""
        then = self.authority.roster.issued - timedelta(29)
        early = Authority(self.authority.directory, clock=lambda: then)
        who = kit.identity
        pem = early.sign(kit.renewal(), who.role, who.name, lifetime=timedelta(1))
        (kit.directory / "certificate.pem").write_bytes(pem)
        self.tell(kit)

    def tell(self, kit: Kit) -> None:
        kit.update_roster(self.authority.roster.data)

    def renew(self, kit: Kit) -> None:
        """Give a kit another certificate, over another key."""
        who = kit.identity
        pem = self.authority.sign(kit.renewal(new_key=True), who.role, who.name, another_key=True)
        Kit.install(kit.directory, self.authority.reply(pem))


class Depot:
    """A server's handlers: files in a folder, a doorbell that the test rings.

    Attributes:
        calls: (member, request) of each call.
        gets: each Get that asked for pieces.
        num_bytes_sent: bytes of pieces that went out.
        max_bytes, max_manifest_bytes: what an upload may have.
        stored: the offers that came to an end.
        refusals: what was called by somebody who was not admitted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.calls: list[tuple[str, Message]] = []
        self.gets: list[Get] = []
        self.num_bytes_sent = 0
        self.max_bytes = 1 << 30
        self.max_manifest_bytes = 1 << 20
        self.stored: list[Offer] = []
        self.refusals: list[str] = []
        self.bell: asyncio.Queue[int] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.files: dict[str, tuple[Path, Manifest]] = {}

    def put(self, path: Path) -> Manifest:
        manifest = describe(path)
        self.files[manifest.digest] = (path, manifest)
        return manifest

    async def call(self, caller: Identity, request: Message) -> Message:
        self.calls.append((caller.member, request))
        match request:
            case messages.Poll():
                return Ring(request.since + 1, 1, 30.0)
            case messages.AskAgenda():
                return messages.Agenda(1, request.have, [])
            case messages.AskRoster():
                return messages.RosterText(b"roster")
            case messages.Submit(key="typo"):
                raise JobError("There is no strategy 'fedvag'.", job="a", site="riga", round=3)
            case messages.Submit(key="defect"):
                raise KeyError("secret detail")
            case messages.Submit():
                return messages.Submitted(request.key)
            case messages.ListJobs():
                return messages.JobLines([])
            case messages.ShowJob():
                line = messages.JobLine(request.job, "n", "s", "running", 3, 1, "", "", "", "", "")
                return messages.JobView(line, {"a": [1, None]}, [], {}, {}, {"model": ("0" * 64, 1)})
            case messages.ListSites():
                return messages.SiteLines([])
            case _:
                return messages.Done()

    async def attend(self, caller: Identity, request: Attend) -> AsyncIterator[Ring]:
        try:
            while True:
                yield Ring(await self.bell.get(), 1, 30.0)
        finally:
            self.closed.set()

    async def follow(self, caller: Identity, request: Follow) -> AsyncIterator[JobEvent]:
        for number in range(request.after, 3):
            yield JobEvent(number, "", "round", f"line {number}")

    async def source(self, caller: Identity, request: Get) -> tuple[Path, Manifest]:
        if request.digest not in self.files:
            raise JobError(f"Job {request.job} has no file {request.digest}.")
        if request.ranges is not None:
            self.gets.append(request)
        return self.files[request.digest]

    def sent(self, caller: Identity, num_bytes: int) -> None:
        self.num_bytes_sent += num_bytes

    async def offered(self, caller: Identity, offer: Offer) -> Destination | None:
        path = self.folder / offer.digest
        return None if path.exists() else Destination(path, self.max_bytes, self.max_manifest_bytes)

    async def refused(self, peer: str, action: str, error: HansaError) -> None:
        self.refusals.append(action)

    async def received(self, caller: Identity, offer: Offer, incoming: Incoming) -> None:
        assert incoming.path.exists()
        self.stored.append(offer)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "federation")


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(tmp_path / "depot")


@pytest.fixture
async def server(federation: Federation, depot: Depot) -> AsyncIterator[Server]:
    made = await serve(depot, federation.server, "127.0.0.1", 0)
    yield made
    await made.stop()


Dial = Callable[..., contextlib.AbstractAsyncContextManager[Connection]]


@pytest.fixture
def dial(federation: Federation, server: Server) -> Dial:
    """Return a function that connects the site, or another kit, to the server or to another port."""

    def connect(
        kit: Kit | None = None,
        port: int | None = None,
        *,
        proxy: str = "",
        patience_s: float | None = 30.0,
        stall_s: float = 30.0,
    ) -> Connection:
        address = f"127.0.0.1:{port or server.port}"
        return Connection(kit or federation.site, address, proxy=proxy, patience_s=patience_s, stall_s=stall_s)

    return connect
