# SPDX-License-Identifier: Apache-2.0
"""The site's agent: hear the doorbell, fetch the agenda, do what is on it, and keep at it whatever happens.

Only this process speaks the network, and it only dials out. The agenda is the whole truth each time: what is on it
and not in hand is begun, what is in hand and no longer on it is stopped. So no message can get lost, and a server
or an agent that was killed goes on from what is on disk.

| case | result |
|---|---|
| the server can't be reached, the network stalls | tried again for ever; work in hand goes on |
| a proxy cuts the stream each time | long polls in their place |
| the agent is killed | finished answers are sent again as they are; what was being trained starts again |
| the disk is full | tried again with growing pauses; after ``PATIENCE_S`` the answer is ``lost``, with the reason |
| the certificate was revoked or has expired | AccessError: the agent ends, and says what to do |
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from hansa.core import wire
from hansa.errors import AccessError, HansaError, StorageError, UnreachableError, WireError
from hansa.pki.kit import Kit
from hansa.site.joined import JoinedJob
from hansa.site.outbox import Entry, Outcome
from hansa.site.settings import SiteSettings, load
from hansa.transport.client import Connection
from hansa.transport.messages import (
    INLINE_BYTES,
    PROTOCOL,
    Activity,
    Agenda,
    Answer,
    AskAgenda,
    AskRoster,
    Assignment,
    Attend,
    Missing,
    Poll,
    Report,
    Ring,
)
from hansa.transport.pieces import describe
from hansa.version import VERSION

PATIENCE_S = 600.0
"""How long a site tries again when its own disk is full."""

_LOG = logging.getLogger("hansa.site")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,199}")
_SHORT_S = 5.0
_LASTING_S = 0.25
_POLL_S = 25.0


class Agent:
    """One site of one federation.

    Args:
        directory: the site's folder: its kit and ``site.toml``; what it keeps goes to ``work`` inside it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kit = Kit(directory)
        self._settings: SiteSettings = load(directory / "site.toml")
        self.site = self._kit.identity.name
        self._jobs_folder = directory / "work" / "jobs"
        self._jobs: dict[str, JoinedJob] = {}
        self._doing: dict[str, asyncio.Task[None]] = {}
        self._phases: dict[str, tuple[str, float]] = {}
        self._news = asyncio.Event()
        self._activity = asyncio.Event()
        self._lease_s = 60.0
        self._sequence = 0
        self._roster = 0

    async def run(self, joined: asyncio.Event | None = None) -> None:
        """Take part until cancelled.

        Args:
            joined: set when the server has answered for the first time.

        Raises:
            AccessError: the server does not admit this site.
            StorageError: another agent works in this folder.
        """
        self._jobs_folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._directory / "work" / ".lock"):
            try:
                async with (
                    Connection(
                        self._kit, self._settings.server, proxy=self._settings.proxy, patience_s=None
                    ) as connection,
                    asyncio.TaskGroup() as group,
                ):
                    group.create_task(self._listen(connection))
                    group.create_task(self._report(connection))
                    group.create_task(self._follow_agenda(connection, joined))
            except BaseExceptionGroup as failed:
                found = failed.split(AccessError)[0]
                raise (found.exceptions[0] if found else failed.exceptions[0]) from None
            finally:
                for task in self._doing.values():
                    task.cancel()
                await asyncio.gather(*self._doing.values(), return_exceptions=True)
                await asyncio.gather(*(job.close() for job in self._jobs.values()))

    async def _listen(self, connection: Connection) -> None:
        """Hear the doorbell, by a stream while streams last."""
        short = 0
        while True:
            begun = time.monotonic()
            streams = self._settings.doorbell and short < 3
            try:
                async for ring in self._rings(connection) if streams else self._polls(connection):
                    self._hear(ring)
            except UnreachableError as error:
                _LOG.info("The doorbell's line was cut: %s", error.message)
            short = short + 1 if streams and time.monotonic() - begun < _SHORT_S else 0
            self._news.set()
            await asyncio.sleep(min(1.0, 0.05 * 2**short))

    async def _rings(self, connection: Connection) -> AsyncIterator[Ring]:
        stream = connection.attend(Attend(PROTOCOL, VERSION)).__aiter__()
        while True:
            try:
                yield await asyncio.wait_for(stream.__anext__(), self._lease_s)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise UnreachableError(f"no sign of life for {self._lease_s:g} s") from None

    async def _polls(self, connection: Connection) -> AsyncIterator[Ring]:
        for _ in range(20):
            yield await connection.call(Poll(PROTOCOL, VERSION, self._sequence, min(_POLL_S, self._lease_s / 2)))

    def _hear(self, ring: Ring) -> None:
        self._lease_s = max(ring.lease_s, 1.0)
        self._roster = max(self._roster, ring.roster)
        if ring.sequence != self._sequence or self._roster > self._kit.roster().version:
            self._news.set()

    async def _follow_agenda(self, connection: Connection, joined: asyncio.Event | None) -> None:
        while True:
            agenda = await connection.call(AskAgenda([*self._doing]))
            self._sequence = agenda.sequence
            if joined is not None:
                joined.set()
            await self._take_up(connection, agenda)
            if self._roster > self._kit.roster().version:
                await self._renew_roster(connection)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._lease_s)
            self._news.clear()

    async def _renew_roster(self, connection: Connection) -> None:
        text = (await connection.call(AskRoster())).text
        try:
            self._kit.update_roster(text)
        except HansaError as error:
            _LOG.warning("The server's roster was not taken over: %s", error.message)

    async def _take_up(self, connection: Connection, agenda: Agenda) -> None:
        wanted = {given.task: given for given in agenda.assignments if self._sound(given)}
        for name in [name for name in self._doing if name not in wanted]:
            _LOG.info("%s is not wanted any more", name)
            self._doing.pop(name).cancel()
        for id in [id for id in self._jobs if id not in agenda.jobs]:
            await self._leave(id)
        for path in self._jobs_folder.iterdir():
            if path.name not in agenda.jobs and path.name not in self._jobs:
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        for given in wanted.values():
            if given.task not in self._doing:
                job = self._joined(given.job)
                task = asyncio.create_task(self._do(connection, job, given))
                self._doing[given.task] = task
                task.add_done_callback(lambda task, name=given.task: self._done(name, task))  # type: ignore[misc]
        for id, job in self._jobs.items():
            job.outbox.keep_only(given.task for given in wanted.values() if given.job == id)

    def _sound(self, given: Assignment) -> bool:
        """Names become folders here, so a name that could lead elsewhere is refused."""
        names = (given.task, given.job, *([given.plan] if given.plan else []))
        return all(_NAME.fullmatch(name) and ".." not in name for name in names)

    def _joined(self, id: str) -> JoinedJob:
        if id not in self._jobs:
            folder = self._jobs_folder / id
            self._jobs[id] = JoinedJob(id, self.site, self._kit, self._settings, folder)
        return self._jobs[id]

    async def _leave(self, id: str) -> None:
        job = self._jobs.pop(id)
        _LOG.info("Job %s is over here", id)
        await job.close()
        await asyncio.to_thread(job.forget)

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        self._phases.pop(name, None)
        if self._doing.get(name) is task:
            del self._doing[name]
        if not task.cancelled() and task.exception() is not None:
            _LOG.error("%s ended in a defect", name, exc_info=task.exception())
            self._news.set()

    async def _do(self, connection: Connection, job: JoinedJob, given: Assignment) -> None:
        """Bring one assignment to its acknowledged answer."""
        entry = job.outbox.find(given.task)
        try:
            if entry is None:
                _LOG.info("%s: begun", given.task)
                entry = await self._answered(connection, job, given)
            self._at(given.task, "sending")
            await self._send(connection, job, given, entry)
        except asyncio.CancelledError:
            if entry is None:
                await job.stop("the task was withdrawn")
            raise
        job.outbox.acknowledged(given.task)
        _LOG.info("%s: answered", given.task)

    async def _answered(self, connection: Connection, job: JoinedJob, given: Assignment) -> Entry:
        begun = time.monotonic()
        pause = 1.0
        while True:
            try:
                outcome = await job.answer(connection, given, lambda phase: self._at(given.task, phase))
                return await asyncio.to_thread(job.outbox.finish, given.task, outcome)
            except StorageError as error:
                _LOG.warning("%s: %s", given.task, error.message)
                if time.monotonic() - begun > PATIENCE_S:
                    job.outbox.begin(given.task)
                    return job.outbox.finish(given.task, Outcome(missing=Missing("lost", error.message[:4096])))
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)
            except (WireError, AccessError) as error:
                job.outbox.begin(given.task)
                return job.outbox.finish(given.task, Outcome(missing=Missing("lost", error.message[:4096])))

    async def _send(self, connection: Connection, job: JoinedJob, given: Assignment, entry: Entry) -> None:
        outcome = entry.outcome
        inline = upload = None
        if entry.update is not None and outcome.missing is None and outcome.inspected is None:
            if entry.update.stat().st_size <= INLINE_BYTES:
                inline = entry.update.read_bytes()
            else:
                path = entry.update
                manifest = await asyncio.to_thread(lambda: describe(path, wire.cuts(path)))
                await connection.upload(job.id, given.task, path, manifest)
                upload = manifest.digest
        await connection.call(Answer(job.id, given.task, inline, upload, outcome.missing, outcome.inspected))

    def _at(self, task: str, phase: str) -> None:
        self._phases[task] = (phase, time.monotonic())
        self._activity.set()

    async def _report(self, connection: Connection) -> None:
        """Tell what is being worked on, when it changes and lasts, and often enough to keep the lease."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._activity.wait(), self._lease_s / 4)
            await asyncio.sleep(_LASTING_S)
            self._activity.clear()
            now = time.monotonic()
            activities = [
                Activity(task, phase, now - since)  # type: ignore[arg-type]
                for task, (phase, since) in self._phases.items()
            ]
            await connection.call(Report(activities))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"Another agent is at work in {path.parent.parent}.") from None
        yield
