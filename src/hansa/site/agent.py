# SPDX-License-Identifier: Apache-2.0
"""The site's agent: hear the doorbell, fetch the agenda, do what is on it, and keep at it whatever happens.

Only this process speaks the network, and it only dials out. The agenda is the whole truth each time: what is on it
and not in hand is begun, what is in hand and no longer on it is stopped. So no message can get lost, and a server
or an agent that was killed goes on from what is on disk. A stream's rings bring the agenda; whenever it can't be told
whether one is the newest, it is asked for.

| case | result |
|---|---|
| the server can't be reached, the network stalls | tried again for ever; work in hand goes on |
| the server fails (its disk is full, a defect) | tried again with growing pauses; a finished answer waits meanwhile |
| the server does not take an answer, for good | after ``REFUSALS`` tries the answer is ``lost``, with the reason |
| a proxy cuts the stream each time, or lets nothing through | long polls in its place, and now and then a stream |
| the agent is killed | finished answers are sent again as they are; what was being trained starts again |
| the disk is full | tried again with growing pauses; after ``PATIENCE_S`` in which it got no further, it is ``lost`` |
| the disk is full when a round is done | the update is kept until there is room: nothing is retrained |
| a defect in one task | its answer is ``lost``, with the reason; the agent's log has the traceback |
| a task or job leaves the agenda and comes back at once | begun again when what it left behind has ended |
| more jobs than ``policy.max_jobs`` | those that came last wait until another is over or rests; submitters learn why |
| the same agenda again and again | asked for ever more slowly |
| an agenda comes by a ring while another is asked for | neither counts; it is asked for again |
| an agenda by a ring has what was answered meanwhile | begun again only if one that is asked for has it, too |
| an agenda does not have what is being answered | the answer may just have been taken: its reply says so |
| an agenda by a ring is no newer than the last that was taken up | passed over |
| a name that would lead out of the site's folder | that assignment is not taken up |
| the certificate was revoked or has expired | AccessError: the agent ends, and says what to do |
| the server speaks another protocol | VersionError: the agent ends |
| the certificate or roster is renewed, settings change | the first two are used at once, the last by the next start |
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from hansa import registry
from hansa.core import storage
from hansa.errors import AccessError, HansaError, JobError, StorageError, UnreachableError, VersionError, WireError
from hansa.pki.kit import Kit
from hansa.site import history
from hansa.site.joined import IDLE_S, JoinedJob, lost
from hansa.site.outbox import Entry, Outcome
from hansa.site.settings import FILE, SiteSettings, load
from hansa.site.telling import without_paths
from hansa.site.warm import whole
from hansa.transport.client import Connection
from hansa.transport.messages import (
    INLINE_BYTES,
    MAX_ACTIVITIES,
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
from hansa.transport.protocol import Pace
from hansa.version import VERSION

PATIENCE_S = 600.0
"""How long a site tries again when its own disk is full, from the first failure in the phase that it can't pass."""

REFUSALS = 3
"""How often an answer is sent that the server says it will not take."""

WORK = "work"

_LOG = logging.getLogger("hansa.site")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,199}")
_SHORT_S = 5.0
_LASTING_S = 0.25
_POLL_S = 25.0
_POLLS = 20
_SHORT_STREAMS = 3
_MAX_PAUSE_S = 30.0


def jobs_folder(directory: Path) -> Path:
    """Return the folder in which a site keeps a folder a job."""
    return directory / WORK / "jobs"


@dataclass
class _Doing:
    """A task in hand: the phase it is in, since when, and how long it had worked when that ended."""

    job: str
    task: asyncio.Task[None]
    withdrawn: bool = False
    answering: bool = False
    phase: str = "waiting"
    since: float = field(default_factory=time.monotonic)
    worked_s: float = 0.0

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        now = time.monotonic()
        if self.phase == "working":
            self.worked_s = now - self.since
        self.phase, self.since = phase, now

    def lasts(self, now: float) -> bool:
        """Say whether it is in its phase for so long that it is worth telling."""
        return now - self.since >= _LASTING_S / 2

    def seconds(self, now: float) -> float:
        """Return what the server holds deadlines against: the time at work, which stands still while it is sent."""
        return self.worked_s if self.phase == "sending" else now - self.since


class Agent:
    """One site of one federation.

    Args:
        directory: the site's folder: its kit and ``site.toml``; what it keeps goes to ``work`` inside it.

    Raises:
        HansaError: kit or settings can't be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kit = Kit(directory)
        self._settings: SiteSettings = load(directory / FILE)
        if self._settings.privacy.budgets:
            registry.load_object("dp_accounting:GaussianDpEvent")  # what is missing is said now, not by each job
        self.site = self._kit.identity.name
        self._jobs_folder = jobs_folder(directory)
        self._histories = directory / WORK / "history"
        self._jobs: dict[str, JoinedJob] = {}
        self._listed: frozenset[str] = frozenset()  # the jobs on the last agenda
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._doing: dict[str, _Doing] = {}
        self._held: dict[str, tuple[float, str]] = {}  # what waits for another job to end: since when, and why
        self._news = asyncio.Event()
        self._asking = True  # the agenda must be asked for
        self._brought: Agenda | None = None  # the last one that came by a ring and was not looked at yet
        self._answered: set[str] = set()  # what is acknowledged, and an agenda that is on its way may still have
        self._activity = asyncio.Event()
        self._lease_s = 60.0
        self._sequence = 0
        self._newest_roster = 0

    async def run(self, joined: asyncio.Event | None = None) -> None:
        """Take part until cancelled.

        Args:
            joined: set when the server has answered for the first time.

        Raises:
            AccessError: the server does not admit this site.
            VersionError: it speaks another protocol.
            StorageError: another agent works in this folder, or it can't be written.
        """
        with _locked(self._directory / WORK):
            self._jobs_folder.mkdir(exist_ok=True)
            settings = self._settings
            async with Connection(
                self._kit, settings.server, proxy=settings.proxy, patience_s=None, stall_s=settings.stall_s
            ) as connection:
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._persistent("The doorbell", lambda: self._listen(connection)))
                        group.create_task(self._persistent("A report", lambda: self._report(connection)))
                        group.create_task(
                            self._persistent("The agenda", lambda: self._follow_agenda(connection, joined))
                        )
                        group.create_task(self._let_rest())
                except BaseExceptionGroup as failed:
                    raise _first(failed) from None
                finally:
                    await self._end()

    async def _persistent(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work``, which never ends by itself, again and again whatever the server answers.

        Raises:
            AccessError, VersionError: no other try would help.
        """
        pauses = _pauses()
        while True:
            begun, shown = time.monotonic(), self._kit.pair()
            try:
                await work()
            except VersionError:
                raise
            except AccessError:
                if self._kit.pair() == shown:
                    raise
                _LOG.info("%s goes on with the certificate that is new.", what)
            except (HansaError, OSError) as error:
                _LOG.warning("%s failed and is tried again: %s", what, error)
            if time.monotonic() - begun > _MAX_PAUSE_S:
                pauses = _pauses()
            await asyncio.sleep(next(pauses))

    async def _end(self) -> None:
        """End all work, its processes too; what is finished waits on disk."""
        tasks = [doing.task for doing in self._doing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._leaving.values(), *(job.close() for job in self._jobs.values()))

    # The doorbell

    async def _listen(self, connection: Connection) -> None:
        """Hear the doorbell, by a stream while streams last."""
        short = 0
        while True:
            streams = self._settings.doorbell and short < _SHORT_STREAMS
            begun, rings = time.monotonic(), 0
            try:
                async for ring in self._rings(connection) if streams else self._polls(connection):
                    rings += 1
                    self._hear(ring)
            except UnreachableError as error:
                _LOG.info("The doorbell's line was cut: %s", error.message)
            self._ask_again()  # it may have rung unheard
            if not streams:
                short = 0
                continue
            short = short + 1 if rings < 2 or time.monotonic() - begun < _SHORT_S else 0
            if short == _SHORT_STREAMS:
                _LOG.warning("The doorbell's stream is cut each time; asking by long polls. (site.toml: doorbell)")
            await asyncio.sleep(min(1.0, 0.05 * 2**short))

    async def _rings(self, connection: Connection) -> AsyncIterator[Ring]:
        async with contextlib.aclosing(connection.attend(Attend(PROTOCOL, VERSION))) as stream:  # type: ignore[type-var]
            while True:
                try:
                    async with asyncio.timeout(self._lease_s / 2):
                        ring = await anext(stream)
                    yield ring
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise UnreachableError(f"no sign of life for {self._lease_s / 2:g} s") from None

    async def _polls(self, connection: Connection) -> AsyncIterator[Ring]:
        for _ in range(_POLLS):
            yield await connection.call(Poll(PROTOCOL, VERSION, self._sequence, min(_POLL_S, self._lease_s / 2)))

    def _hear(self, ring: Ring) -> None:
        self._lease_s = min(max(ring.lease_s, 1.0), 3600.0)
        if ring.agenda is not None and ring.sequence > self._sequence:
            self._brought = ring.agenda
            self._news.set()
        elif ring.sequence != self._sequence:
            self._ask_again()
        if ring.roster > self._newest_roster:
            self._newest_roster = ring.roster
            self._news.set()

    # The agenda

    def _ask_again(self) -> None:
        self._asking = True
        self._news.set()

    async def _follow_agenda(self, connection: Connection, joined: asyncio.Event | None) -> None:
        agenda: Agenda | None = None
        pace = Pace()
        self._asking = True
        while True:
            self._news.clear()
            if self._asking:
                self._asking, self._brought = False, None
                agenda = await self._asked(connection)
                if joined is not None:
                    joined.set()
            elif self._brought is not None:
                agenda, self._brought = self._brought, None
                if agenda.sequence > self._sequence:
                    self._take_up(connection, agenda, self._answered)
            await self._renew_roster(connection)
            await asyncio.sleep(pace.pause(agenda and agenda.shown))
            try:
                async with asyncio.timeout(self._lease_s):
                    await self._news.wait()
            except TimeoutError:
                self._ask_again()

    async def _asked(self, connection: Connection) -> Agenda | None:
        """Ask for the agenda and take it up; None if another came meanwhile, as either may be the newer one."""
        known = self._answered.copy()
        agenda = await connection.call(AskAgenda([*self._doing]))
        if self._brought is not None:
            self._ask_again()
            return None
        self._take_up(connection, agenda, self._answered - known)
        await whole(partial(self._sweep, self._listed, {given.task for given in agenda.assignments} | {*self._doing}))
        return agenda

    async def _renew_roster(self, connection: Connection) -> None:
        """Take over the server's roster if it told of a newer one; only its authority can have made that."""
        if self._newest_roster <= self._kit.roster().version:
            return
        try:
            self._kit.update_roster((await connection.call(AskRoster())).text)
        except (WireError, AccessError, StorageError) as error:
            _LOG.warning("The server's roster was not taken over: %s", error.message)
            self._newest_roster = 0

    def _take_up(self, connection: Connection, agenda: Agenda, answered: Collection[str]) -> None:
        """Begin what is new and stop what is gone; what was ``answered`` after the agenda was made is not new."""
        self._sequence = agenda.sequence
        jobs = self._listed = frozenset(id for id in agenda.jobs if _is_name(id))
        wanted = {given.task: given for given in agenda.assignments if given.job in jobs and _sound(given)}
        for name, doing in self._doing.items():
            if name not in wanted and name not in self._answered and not (doing.withdrawn or doing.answering):
                _LOG.info("%s is not wanted any more", name)
                doing.withdrawn = True
                doing.task.cancel()
        self._answered &= wanted.keys() & answered
        if self._answered:
            self._ask_again()
        for id in [id for id in self._jobs if id not in jobs]:
            self._leaving[id] = asyncio.create_task(self._leave(id, self._jobs.pop(id)))
        held, self._held = self._held, {}
        for given in wanted.values():
            if given.task not in (*self._doing, *self._answered) and given.job not in self._leaving:
                why = self._begin(connection, given)
                if why:
                    self._held[given.task] = held.get(given.task, (time.monotonic(), why))
        if self._held.keys() != held.keys():
            self._activity.set()

    def _begin(self, connection: Connection, given: Assignment) -> str:
        """Begin an assignment; return why it has to wait, which its submitter is told, or nothing."""
        warm = {id for id, job in self._jobs.items() if job.warm}
        at_work = warm | {doing.job for doing in self._doing.values()} | self._leaving.keys()
        if given.job not in at_work and len(at_work) >= self._settings.policy.max_jobs:
            most = self._settings.policy.max_jobs
            _LOG.info("Job %s waits: %d jobs are at work here. (site.toml: policy.max_jobs)", given.job, len(at_work))
            return f"the site is at work on as many jobs as it takes at once: {most} (policy.max_jobs)"
        try:
            job = self._joined(given.job)
        except StorageError as error:  # asked for again with the next agenda
            _LOG.warning("Job %s can't be joined: %s", given.job, error.message)
            return ""
        task = asyncio.create_task(self._do(connection, job, given))
        self._doing[given.task] = _Doing(given.job, task)
        task.add_done_callback(partial(self._done, given.task))
        return ""

    def _sweep(self, jobs: frozenset[str], tasks: set[str]) -> None:
        """Delete what jobs of an earlier life of this agent have left, and answers that nobody waits for."""
        for path in self._jobs_folder.iterdir():
            if path.name not in jobs and path.name not in self._jobs and path.name not in self._leaving:
                shutil.rmtree(path, ignore_errors=True)
        for job in [*self._jobs.values()]:
            job.outbox.keep_only(tasks)

    def _joined(self, id: str) -> JoinedJob:
        if id not in self._jobs:
            self._jobs[id] = JoinedJob(
                id, self.site, self._kit, self._settings, self._jobs_folder / id, self._histories
            )
        return self._jobs[id]

    async def _leave(self, id: str, job: JoinedJob) -> None:
        try:
            await job.close()
            if ending := [doing.task for doing in self._doing.values() if doing.job == id]:
                await asyncio.wait(ending)
            await whole(job.forget)
            _LOG.info("Job %s is over here", id)
            try:
                await whole(partial(history.prune, self._histories, self._listed, datetime.now(UTC)))
            except StorageError as error:
                _LOG.warning("What is old in the history was not forgotten: %s", error.message)
        finally:
            del self._leaving[id]
            self._ask_again()

    async def _let_rest(self) -> None:
        while True:
            await asyncio.sleep(IDLE_S / 10)
            for job in [*self._jobs.values()]:
                await job.rest()

    # Tasks

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        ended = self._doing.pop(name)
        failed = not task.cancelled() and task.exception() is not None
        if failed:
            _LOG.error("%s ended in a defect", name, exc_info=task.exception())
        if failed or ended.withdrawn:  # it may be wanted again meanwhile
            self._ask_again()

    async def _do(self, connection: Connection, job: JoinedJob, given: Assignment) -> None:
        """Bring one assignment to its acknowledged answer."""
        entry = await self._answer(connection, job, given)
        self._at(given.task, "sending")
        refusals = 0
        pauses = _pauses()
        while True:
            try:
                await self._send(connection, job, given, entry)
                break
            except (JobError, WireError) as error:
                refusals += 1
                self._ask_again()  # what was withdrawn while it was being answered is stopped now
                _LOG.warning("%s: the server does not take the answer: %s", given.task, error.message)
                if refusals == REFUSALS and entry.outcome.missing is None:
                    reason = f"The server did not take the site's answer: {error.message}"
                    entry = await self._concluded(job, given, lost(reason))
            except HansaError as error:
                _LOG.warning("%s: the answer waits: %s", given.task, error.message)
                self._ask_again()  # where this site is admitted no more, the agenda says so and the agent ends
            await asyncio.sleep(next(pauses))
        self._answered.add(given.task)
        await whole(lambda: job.outbox.acknowledged(given.task), entry.num_bytes)
        _LOG.info("%s: answered", given.task)

    async def _answer(self, connection: Connection, job: JoinedJob, given: Assignment) -> Entry:
        """Return the finished answer, durable: found on disk, or made now."""
        doing = self._doing[given.task]
        outcome: Outcome | None = None
        stuck, since = "", 0.0
        pauses = _pauses()
        while True:
            try:
                entry = job.outbox.find(given.task)
                if entry is not None:
                    return entry
                if outcome is None:
                    _LOG.info("%s: begun (%s, round %d of %s)", given.task, given.kind, given.round, given.job)
                    outcome = await job.answer(connection, given, lambda phase: self._at(given.task, phase))
                    self._at(given.task, "sending")
                return await whole(partial(job.finish, given, outcome))
            except HansaError as error:
                _LOG.warning("%s: tried again: %s", given.task, error.message)
                reason = error.message
                self._ask_again()
            except Exception as error:  # noqa: BLE001 - one task's defect must not end the others
                _LOG.exception("%s: a defect", given.task)
                return await self._concluded(job, given, lost(f"A defect at the site: {type(error).__name__}: {error}"))
            if doing.phase != stuck:
                stuck, since = doing.phase, time.monotonic()
            if time.monotonic() - since >= PATIENCE_S:
                return await self._concluded(job, given, lost(reason))
            if outcome is None:
                self._at(given.task, "waiting")
            await asyncio.sleep(next(pauses))

    async def _concluded(self, job: JoinedJob, given: Assignment, outcome: Outcome) -> Entry:
        """Return an answer that says why there is none; where not even that can be kept, it lives in memory."""

        def work() -> Entry:
            try:
                job.outbox.acknowledged(given.task)
                job.outbox.begin(given.task)
                return job.outbox.finish(given.task, outcome)
            except StorageError:
                return Entry(outcome, None)

        return await whole(work)

    async def _send(self, connection: Connection, job: JoinedJob, given: Assignment, entry: Entry) -> None:
        outcome = entry.outcome
        inline = upload = None
        path = entry.update
        if path is not None and outcome == Outcome():
            if path.stat().st_size <= INLINE_BYTES:
                inline = path.read_bytes()
            else:
                manifest = await whole(partial(job.manifest, given.task, path))
                await connection.upload(job.id, given.task, path, manifest)
                upload = manifest.digest
        missing = outcome.missing
        if missing is not None:
            missing = Missing(missing.kind, without_paths(missing.reason, self._settings, self._directory))
        doing = self._doing[given.task]
        doing.answering = True
        try:
            answer = Answer(job.id, given.task, inline, upload, missing, outcome.inspected, outcome.letter)
            await connection.call(answer)
        finally:
            doing.answering = False

    # Reports

    def _at(self, task: str, phase: str) -> None:
        self._doing[task].enter(phase)
        self._activity.set()

    async def _report(self, connection: Connection) -> None:
        """Tell what is being worked on, when it changes and lasts, and often enough to keep the lease."""
        told = False
        while True:
            due = False
            try:
                async with asyncio.timeout(self._lease_s / 4):
                    await self._activity.wait()
            except TimeoutError:
                due = True
            await asyncio.sleep(_LASTING_S)
            self._activity.clear()
            now = time.monotonic()
            if not (due or told or self._held or any(it.lasts(now) for it in self._doing.values())):
                if self._doing:
                    self._activity.set()
                continue
            activities = [Activity(task, it.phase, it.seconds(now)) for task, it in self._doing.items()]  # type: ignore[arg-type]
            activities += [Activity(task, "waiting", now - since, why) for task, (since, why) in self._held.items()]
            await connection.call(Report(activities[:MAX_ACTIVITIES]))
            told = bool(activities)


def _is_name(name: str) -> bool:
    """Say whether a name from the server may become a folder's."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def _sound(given: Assignment) -> bool:
    names = (given.task, given.job, given.course, *([given.plan] if given.plan else []))
    sound = all(map(_is_name, names)) and (bool(given.plan) or given.kind == "inspect")
    if not sound:
        _LOG.warning("The server assigns something that can't be: %.200r", (given.task, given.kind, given.course))
    return sound


def _pauses() -> Iterator[float]:
    """Yield ever longer pauses, in seconds."""
    pause = 0.5
    while True:
        yield pause
        pause = min(2 * pause, _MAX_PAUSE_S)


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that says most: that the site is not admitted, if that is among them."""
    error: BaseException = failed.split((AccessError, VersionError))[0] or failed
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be, against other agents."""
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise storage.full(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"Another agent is at work in {folder.parent}.") from None
        yield
