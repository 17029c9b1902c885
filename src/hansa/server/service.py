# SPDX-License-Identifier: Apache-2.0
"""What the server does with each call: decided by who calls, answered from the store, noted in the audit log.

| case | result |
|---|---|
| a site answers what it was not asked, or what another was | JobError; nothing changes |
| an answer comes a second time | acknowledged; the first stands |
| an update that is no Hansa update, or of another site or round | the task is closed as ``rejected``, with the reason |
| a role or scope that does not allow the call | AccessError, and an audit entry: one a minute of a kind |
| an upload larger than the task's plan implies, or for a task that has no update | refused before anything is read |
| another file of the same update | it takes the first one's place until the task is answered, and is then refused |
| an answer that names another file than was uploaded | StorageError; the site sends it again |
| a bundle that is mostly one piece, repeated | WireError before anything is written |
| a bundle, an update or a resumed job beyond its submitter's quota | AccessError, JobError; nothing of it is written |
| a bundle that is uploaded and never submitted | deleted after a day of this process's time (`Unclaimed`) |
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from hansa import bundle as bundles
from hansa.core import storage, wire
from hansa.core.values import Header
from hansa.errors import AccessError, HansaError, JobError, StorageError, WireError
from hansa.pki.identity import Identity, Role
from hansa.pki.kit import Kit
from hansa.pki.roles import Permission, allowed
from hansa.runs.carrier import INITIAL
from hansa.runs.pieces import relays
from hansa.runs.run import Run, describe
from hansa.server import policy
from hansa.server.blobs import Blobs
from hansa.server.desk import Desk
from hansa.server.http import Metrics
from hansa.server.jobs import Jobs, results_of
from hansa.server.remote import manifest_of, update_key
from hansa.server.settings import ServerSettings
from hansa.server.store import JobRow, Said, Store, TaskRow, check_quota
from hansa.transport.messages import (
    INLINE_BYTES,
    LETTERS,
    MAIL,
    PROTOCOL,
    AbortJob,
    Agenda,
    Answer,
    AskAgenda,
    AskRoster,
    Assignment,
    Attend,
    DeleteJob,
    Done,
    Follow,
    Get,
    JobEvent,
    JobLine,
    JobLines,
    JobView,
    ListJobs,
    ListSites,
    Message,
    Missing,
    Offer,
    Poll,
    Report,
    ResumeJob,
    Ring,
    RosterText,
    ShowJob,
    SiteLine,
    SiteLines,
    Submit,
    Submitted,
    WithdrawSite,
)
from hansa.transport.pieces import Incoming, Manifest
from hansa.transport.protocol import Pace
from hansa.transport.server import Destination
from hansa.transport.threads import Together

FRESH_S = 900.0
"""How old a bundle's signature may be when the job is submitted."""

BUNDLE_MANIFEST_BYTES = 64 << 20
"""The longest manifest of a bundle: room for 1.8 million pieces."""

UNCLAIMED_S = 86400.0
"""For how long an uploaded bundle waits to be submitted."""

SWEEP_S = 3600.0

REPEATS, REPEATED_BYTES = 4, 64 << 20
"""A bundle larger than the second may be so many times the bytes that travel: equal pieces travel once."""

_PER_LISTED = 1 << 14
"""A manifest takes a byte for at least so many of its file."""

_SEEN_S = 10.0
_REFUSED_S = 60.0
_AUDITED = {Submit: "submit", AbortJob: "abort", WithdrawSite: "withdraw", ResumeJob: "resume", DeleteJob: "delete"}
_ACTIONS = {**_AUDITED, Get: "download", Offer: "upload", Follow: "follow", Attend: "attend"}


_LOG = logging.getLogger("hansa.server")


class Service:
    """The server's half of :class:`hansa.transport.server.Handlers`.

    Args:
        directory: the server's folder.
        kit: who the server is, and the federation's roster.
        settings: what it allows.
        store, blobs: what is durable.
        desk, jobs: what is known now, what is at work.
        metrics: what is counted.
    """

    def __init__(
        self,
        directory: Path,
        kit: Kit,
        settings: ServerSettings,
        store: Store,
        blobs: Blobs,
        desk: Desk,
        jobs: Jobs,
        metrics: Metrics,
    ) -> None:
        self._home = directory
        self._incoming = directory / "incoming"
        self._kit = kit
        self._settings = settings
        self._store = store
        self._blobs = blobs
        self._desk = desk
        self._jobs = jobs
        self._metrics = metrics
        self._noted: dict[str, float] = {}
        self._refusals: dict[tuple[str, str, str], float] = {}
        self._submitting = asyncio.Lock()
        self._taking: dict[str, asyncio.Lock] = {}
        self._agendas = Together(self._read_agendas)
        self._answers = Together(self._take_all)
        self._waits: dict[str, set[str]] = {}  # site -> open tasks of which is noted that they wait
        self._unclaimed = Unclaimed(self._incoming)
        self._promising = threading.Lock()
        self._promised: dict[Path, int] = {}  # files on their way -> their bytes, where there is a quota

    async def call(self, caller: Identity, request: Message) -> Message:
        """Answer a request."""
        begun = time.perf_counter()
        outcome = "ok"
        try:
            async with self._refusals_noted(caller, request):
                reply = await self._answer(caller, request)
        except HansaError as error:
            outcome = type(error).__name__
            raise
        finally:
            if not isinstance(request, Poll):
                self._metrics.called(type(request).__name__, outcome, time.perf_counter() - begun)
        if type(request) in _AUDITED:
            member, role, action = caller.member, caller.role.value, _AUDITED[type(request)]
            detail = getattr(reply, "job", "")
            await asyncio.to_thread(self._store.audit, member, role, action, _subject(request), "done", detail)
        return reply

    async def refused(self, peer: str, action: str, error: HansaError) -> None:
        """Note that somebody was not admitted at all."""
        await self._note_refusal(peer, "", action, "", error)

    async def _note_refusal(self, actor: str, role: str, action: str, subject: str, error: HansaError) -> None:
        """Note a refusal, but not each of many: one a minute for the same caller, action and kind of reason."""
        now = time.monotonic()
        self._refusals = {key: since for key, since in self._refusals.items() if now - since < _REFUSED_S}
        key = (actor, action, type(error).__name__)
        if key not in self._refusals:
            self._refusals[key] = now
            await asyncio.to_thread(self._store.audit, actor, role, action, subject, "refused", error.message)

    @contextlib.asynccontextmanager
    async def _refusals_noted(self, caller: Identity, request: Message) -> AsyncIterator[None]:
        try:
            yield
        except HansaError as error:
            if isinstance(error, AccessError) or type(request) in _AUDITED:
                subject, action = _subject(request), _ACTIONS.get(type(request), type(request).__name__)
                await self._note_refusal(caller.member, caller.role.value, action, subject, error)
            raise

    async def _answer(self, caller: Identity, request: Message) -> Message:
        match request:
            case Poll():
                self._attends(caller)
                await self._heard(caller, request.release)
                sequence = await self._desk.news(caller.name, request.since, min(request.wait_s, 60.0))
                return self._ring(sequence)
            case AskAgenda():
                self._attends(caller)
                await self._heard(caller)
                return await self._agendas.do((caller.name, frozenset(request.have)))
            case Report():
                self._attends(caller)
                await self._heard(caller)
                await asyncio.to_thread(self._report, caller.name, request)
                return Done()
            case Answer():
                self._attends(caller)
                await self._heard(caller)
                async with self._taking.setdefault(caller.name, asyncio.Lock()):
                    if request.upload is None:
                        job = await self._answers.do((caller.name, request))
                    else:  # to keep a large one may take long, which small ones need not wait for
                        job = await asyncio.to_thread(self._take_one, caller.name, request)
                self._desk.answered(job)
                return Done()
            case AskRoster():
                return RosterText(self._kit.roster().data)
            case Submit():
                allowed(caller, Permission.SUBMIT)
                async with self._submitting:
                    job = await asyncio.to_thread(self._submit, caller, request)
                self._jobs.wake()
                return Submitted(job)
            case ListJobs():
                return await asyncio.to_thread(self._list, caller)
            case ShowJob():
                return await asyncio.to_thread(self._show, caller, request.job)
            case AbortJob():
                row = await asyncio.to_thread(self._row, caller, Permission.ABORT, request.job)
                await self._jobs.abort(row.id)
                return Done()
            case WithdrawSite():
                allowed(caller, Permission.WITHDRAW, sites=[request.site])
                await asyncio.to_thread(self._withdraw, caller, request)
                return Done()
            case ResumeJob():
                row = await asyncio.to_thread(self._row, caller, Permission.RESUME, request.job)
                if self._jobs.at_work(row.id):
                    raise JobError("The job is still ending; try again in a moment.", job=row.id)
                await asyncio.to_thread(self._queue_again, row.id)
                self._jobs.wake()
                return Done()
            case DeleteJob():
                row = await asyncio.to_thread(self._row, caller, Permission.DELETE, request.job)
                await asyncio.to_thread(self._delete, row)
                return Done()
            case ListSites():
                return await asyncio.to_thread(self._sites, caller)
        raise AssertionError(f"{type(request).__name__} has no answer")

    # Sites

    def _attends(self, caller: Identity) -> None:
        allowed(caller, Permission.ATTEND, sites=[caller.name])

    async def _heard(self, caller: Identity, release: str = "") -> None:
        self._desk.heard(caller.name, release)
        now = time.monotonic()
        if now - self._noted.get(caller.name, -_SEEN_S) >= _SEEN_S:
            self._noted[caller.name] = now
            await asyncio.to_thread(self._store.seen, caller.name, self._desk.seen(caller.name)[1])

    def _report(self, site: str, request: Report) -> None:
        """Note what a site is at, and once a task in its job's log what it waits for."""
        open = {row.task: row for row in self._store.agenda(site)}
        told = self._waits.get(site, set()) & open.keys()
        known = [item for item in request.activities if item.task in open]
        self._desk.report(site, known)
        for item in known:
            if item.why and item.task not in told:
                told.add(item.task)
                self._store.event(open[item.task].job, "note", f"{site} waits: {item.why}")
        self._waits[site] = told

    def _ring(self, sequence: int, agenda: Agenda | None = None) -> Ring:
        return Ring(sequence, self._kit.roster().version, self._settings.lease_s, agenda)

    async def attend(self, caller: Identity, request: Attend) -> AsyncIterator[Ring]:
        """Ring whenever there is news, with the agenda, and a few times a lease when there is none.

        Where the agenda can't be read the site is rung all the same: it asks, and is told why.
        """
        async with self._refusals_noted(caller, request):
            self._attends(caller)
        if request.protocol != PROTOCOL:
            raise JobError(
                f"The site speaks protocol {request.protocol}, this server {PROTOCOL}. Bring both to one release."
            )
        self._desk.attending(caller.name, 1)
        try:
            sequence, agenda = self._desk.sequence(caller.name), None
            sent: frozenset[str] = frozenset()
            pace = Pace()
            while True:
                await self._heard(caller, request.release)
                yield self._ring(sequence, agenda)
                if agenda is not None:
                    await asyncio.sleep(pace.pause(agenda.shown))
                before, agenda = sequence, None
                sequence = await self._desk.news(caller.name, sequence, self._settings.lease_s / 4)
                if sequence != before:
                    with contextlib.suppress(HansaError):
                        agenda = await self._agendas.do((caller.name, sent))
                        sequence, sent = agenda.sequence, frozenset(given.task for given in agenda.assignments)
        finally:
            self._desk.attending(caller.name, -1)

    def _read_agendas(self, asked: Sequence[tuple[str, frozenset[str]]]) -> list[Agenda | Exception]:
        """Return the agenda of each site that asks, with the tasks whose plans it has."""
        sequences = {site: self._desk.sequence(site) for site, _ in asked}
        unfinished, tasks = self._store.unfinished(*sequences), self._store.agenda(*sequences)
        open = _Open(sequences, unfinished, tasks)
        found: list[Agenda | Exception] = []
        for site, have in asked:
            try:
                found.append(self._agenda(site, have, open))
            except HansaError as error:
                found.append(error)
        return found

    def _agenda(self, site: str, have: frozenset[str], open: _Open) -> Agenda:
        jobs = {row.id: row for row in open.unfinished[site] if site in self._sites_of(row.id)}
        room = 16 * INLINE_BYTES
        assignments = []
        for row in open.tasks:
            if row.site != site or row.job not in jobs:  # it has ended, or the site has left it, a moment ago
                continue
            inline = b""
            if row.plan and row.task not in have and room > 0:
                inline = open.small(self._plan_path(row.job, row.plan))
                self._metrics.sent(len(inline))
                room -= len(inline)
            bundle = jobs[row.job].bundle
            assignments.append(Assignment(row.task, row.job, bundle, row.kind, row.course, row.round, row.plan, inline))
        return Agenda(open.sequences[site], list(jobs), assignments)

    def _sites_of(self, id: str) -> list[str]:
        try:
            return self._jobs.sites_of(id)
        except StorageError:
            if self._store.find_job(id) is not None:
                raise  # sites would forget a job that is only out of reach
            return []

    def _plan_path(self, job: str, plan: str) -> Path:
        return self._jobs.folder(job) / "work" / "plans" / f"{plan}.hansa"

    def _task(self, site: str, job: str, task: str, row: TaskRow | None) -> TaskRow:
        """Return a task that a site speaks of, if that is what it was asked for."""
        if row is None or row.site != site or row.job != job:
            raise JobError(f"Site {site!r} was not asked for {task!r}.", job=job, site=site)
        return row

    def _take_one(self, site: str, said: Answer) -> str:
        found = self._take_all([(site, said)])[0]
        if isinstance(found, Exception):
            raise found
        return found

    def _take_all(self, answers: Sequence[tuple[str, Answer]]) -> list[str | Exception]:
        """Take answers, whose updates and rows are made durable at once, and return each one's job."""
        rows = self._store.find_tasks(*(said.task for _, said in answers))
        results: list[str | Exception] = []
        taken: list[_Taken] = []
        for site, said in answers:
            try:
                row = self._task(site, said.job, said.task, rows.get(said.task))
                if row.state in ("open", "late"):
                    taken.append(self._take(site, said, row))
                results.append(row.job)
            except Exception as error:  # noqa: BLE001 - the others' answers are as good as they were
                results.append(error)
        keys = [item.said[-1].update for item in taken if item.said[-1].update]
        if keys:
            self._blobs.keep(*keys)
        counts = iter(self._store.answers([said for item in taken for said in item.said]))
        for item in taken:
            *_, counted = (next(counts) for _ in item.said)
            if item.said[-1].update and not counted:
                self._blobs.delete(item.said[-1].update)
            self._metrics.answered(item.kind)
            if item.problem:
                site = item.said[-1].site
                self._store.audit(f"site/{site}", Role.SITE.value, item.action, item.job, "refused", item.problem)
        return results

    def _take(self, site: str, said: Answer, row: TaskRow) -> _Taken:
        """Return what an answer to an open task comes to; its update lies in place, not yet durable.

        Raises:
            JobError: it is of another kind than was asked for.
            StorageError: its update is not here, or there is no room for it.
        """
        given = (said.inline, said.upload, said.missing, said.inspected, said.letter)
        told = (said.inspected is not None, said.letter is not None) == (row.kind == "inspect", row.kind in LETTERS)
        if sum(item is not None for item in given) != 1 or not (told or said.missing is not None):
            raise JobError("The answer is of another kind than was asked for.", job=row.job, site=site)
        if said.letter is not None:
            return _Taken(row.job, row.kind, [Said(row.task, site, "done", said.letter)])
        if said.missing is not None:
            self._forget_uploads(row)
            answer = msgspec.json.encode(said.missing)
            noted = said.missing.kind == "refused" and relays(self._jobs.job_of(row.job))
            why = said.missing.reason if noted else ""
            return _Taken(row.job, said.missing.kind, [Said(row.task, site, "missing", answer)], why, row.kind)
        if said.inspected is not None:
            return _Taken(row.job, "inspected", [Said(row.task, site, "done", msgspec.json.encode(said.inspected))])
        key = update_key(row.job, row.task, said.upload or "")
        path = self._blobs.path(key)
        if said.inline is not None:
            storage.write_whole(path, said.inline, self._spares(row.job))
            self._metrics.received(len(said.inline))
        elif not path.exists():
            raise StorageError("The update that the answer names is not here; send it again.", job=row.job, site=site)
        self._promised.pop(path, None)
        self._forget_uploads(row, path)
        update = Said(row.task, site, "done", b"", key)
        try:
            header = wire.Spooled(path).header
            problem = _problem(header, row)
        except HansaError as error:
            problem = error.message
        if problem is not None:
            path.unlink(missing_ok=True)
            answer = msgspec.json.encode(Missing("rejected", problem[:4096]))
            return _Taken(row.job, "rejected", [Said(row.task, site, "missing", answer)], problem)
        return _Taken(row.job, "update", [*self._overdue(header, row), update])

    def _overdue(self, header: Header, row: TaskRow) -> list[Said]:
        """Return what closes a task whose site took longer than the deadline, by its own clock, or nothing.

        By policy its update is overdue then.
        """
        job = self._jobs.job_of(row.job)
        deadline_s = job.cohort.deadline_s if row.kind == "train" and row.course == job.name else None
        if deadline_s is None or header.seconds <= deadline_s:
            return []
        said = Missing("late", f"took {header.seconds:.2f} s, the deadline is {deadline_s:g} s")
        state = "late" if job.cohort.late == "accept" else "missing"
        return [Said(row.task, row.site, state, msgspec.json.encode(said))]  # type: ignore[arg-type]

    # Files

    async def source(self, caller: Identity, request: Get) -> tuple[Path, Manifest]:
        """Return a file that belongs to a job: its bundle and plans for its sites, its results for its owner."""
        async with self._refusals_noted(caller, request):
            return await asyncio.to_thread(self._source, caller, request)

    def sent(self, caller: Identity, num_bytes: int) -> None:
        """Count what went out."""
        self._metrics.sent(num_bytes)

    def _source(self, caller: Identity, request: Get) -> tuple[Path, Manifest]:
        row = self._store.job(request.job)
        folder = self._jobs.folder(row.id)
        if caller.role is Role.SITE:
            allowed(caller, Permission.ATTEND, sites=[caller.name])
            if caller.name not in self._jobs.sites_of(row.id):
                raise AccessError(f"Site {caller.name!r} does not take part in job {row.id!r}.")
            if request.digest == row.bundle:
                return folder / "bundle.zip", Manifest.decode((folder / "bundle.manifest").read_bytes())
            path = self._plan_path(row.id, request.digest)
            if not path.exists():
                raise JobError("This plan is not asked for any more.", job=row.id, site=caller.name)
            return path, manifest_of(path)
        allowed(caller, Permission.DOWNLOAD, owner=row.submitter)
        for name, (digest, _) in results_of(folder).items():
            if digest == request.digest:
                if request.ranges is None:
                    self._store.audit(caller.member, caller.role.value, "download", row.id, "done", name)
                manifest = (folder / "work" / "results" / digest).read_bytes()
                return folder / name, Manifest.decode(manifest)
        raise JobError(f"Job {row.id!r} has no such file.", job=row.id)

    async def offered(self, caller: Identity, offer: Offer) -> Destination | None:
        """Say where an upload goes: a new job's bundle, or the update that answers a task."""
        turn = self._taking.setdefault(caller.name, asyncio.Lock())  # no file goes while an answer is made of it
        async with turn, self._refusals_noted(caller, offer):
            return await asyncio.to_thread(self._offered, caller, offer)

    def _offered(self, caller: Identity, offer: Offer) -> Destination | None:
        if offer.task == "bundle" and not offer.job:
            allowed(caller, Permission.SUBMIT)
            path = self._bundle_path(caller, offer.digest)
            self._unclaimed.touch(path)
            if path.exists() and path.with_suffix(".manifest").exists():
                return None
            check = partial(self._check_bundle, caller, path)
            return Destination(path, self._settings.max_bundle_bytes, BUNDLE_MANIFEST_BYTES, check=check)
        self._attends(caller)
        row = self._task(caller.name, offer.job, offer.task, self._store.task(offer.task))
        if row.state not in ("open", "late"):
            return None
        if row.kind not in ("train", "post"):
            raise JobError(f"A task to {row.kind} is answered in a message, not by a file.", job=row.job, site=row.site)
        path = self._blobs.path(update_key(row.job, row.task, offer.digest))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._forget_uploads(row, path)
        if path.exists():
            return None
        num_bytes, manifest_bytes = self._implied(row)
        job = self._jobs.job_of(row.job)
        most = implied_bytes(num_bytes, encrypted=job.homomorphic_encryption is not None)
        if job.secret_sums is None:  # else it is wider than the model that it is of
            most = min(self._settings.max_model_bytes or most, most)
        planned = 0 if row.kind == "post" else num_bytes
        check = partial(self._check_update, row, path, planned, most)
        manifest = implied_bytes(manifest_bytes, encrypted=job.homomorphic_encryption is not None)
        return Destination(path, most, manifest, check=check, spares=self._spares(row.job))

    def _implied(self, row: TaskRow) -> tuple[int, int]:
        """Return how large the file is, and its manifest, that an answer's size is held against.

        A plan has the model with it; where sites send it to each other, it is as large as the first one.

        Raises:
            StorageError: it can't be read.
        """
        post = row.kind == "post"
        path = self._jobs.folder(row.job) / INITIAL if post else self._plan_path(row.job, row.plan)
        try:
            num_bytes = path.stat().st_size
            return num_bytes, num_bytes // _PER_LISTED if post else path.with_suffix(".manifest").stat().st_size
        except OSError as error:
            raise StorageError(f"Can't read {path.name}: {error.strerror}.", job=row.job) from error

    def _spares(self, job: str) -> storage.Spares:
        return storage.Spares(self._jobs.folder(job) / "work" / storage.SPARES)

    def _check_bundle(self, caller: Identity, path: Path, manifest: Manifest) -> None:
        """Refuse a bundle that is mostly repetition, or more than its submitter may have at the server.

        Raises:
            WireError, AccessError: the first, the second.
        """
        num_bytes, most = manifest.num_bytes, self._settings.quota.bytes
        if num_bytes > self._settings.max_bundle_bytes:
            return  # whoever receives it says so
        sent = sum(length for length, _ in set(manifest.pieces))
        if num_bytes > max(REPEATS * sent, REPEATED_BYTES):
            raise WireError(
                f"A bundle of {num_bytes:,} bytes would consist of {sent:,} different ones, repeated; at most "
                f"{REPEATS} times as many are accepted. Leave files of zeros out of it, or make them smaller."
            )
        if most is None:
            return
        with self._promising:
            held = self._store.held(caller.name)
            waiting = {**self._promised, path: num_bytes}
            prefix = f"{caller.role.value}-{caller.name}-"
            for file in self._incoming.glob(f"{glob.escape(prefix)}*.zip*"):
                place = file.with_name(file.name.removesuffix(".part"))
                with contextlib.suppress(FileNotFoundError):
                    waiting[place] = max(waiting.get(place, 0), file.stat().st_size)
            mine = sum(size for place, size in waiting.items() if place.name.startswith(prefix))
            check_quota(caller.name, held + mine, most)
            self._promised[path] = num_bytes

    def _check_update(self, row: TaskRow, path: Path, planned: int, largest: int, manifest: Manifest) -> None:
        """Account for what an update has beyond its plan's size, which was when the round began.

        Raises:
            JobError: the submitter's jobs would hold more than the quota.
        """
        num_bytes, most = manifest.num_bytes, self._settings.quota.bytes
        if most is None or not planned < num_bytes <= largest:
            return
        with self._promising:
            if path in self._promised:
                return
            try:
                self._store.grow(row.job, num_bytes - planned, most)
            except AccessError as error:
                raise JobError(error.message, job=row.job, site=row.site) from None
            self._promised[path] = num_bytes

    async def sweep(self) -> None:
        """Delete bundles that were uploaded and never submitted, once an hour, until cancelled."""
        while True:
            async with self._submitting:
                for path in await asyncio.to_thread(self._unclaimed.sweep):
                    self._promised.pop(path, None)
                    _LOG.info("%s was uploaded and never submitted; it is deleted.", path.name)
            await asyncio.sleep(SWEEP_S)

    def _forget_uploads(self, row: TaskRow, but: Path | None = None) -> None:
        """Delete what has come for a task, whole or in part, but one file."""
        folder = self._blobs.path(update_key(row.job, row.task)).parent
        kept = () if but is None else (but.name, f"{but.name}.part")
        with contextlib.suppress(FileNotFoundError):  # the job's folder for updates goes with the job
            for name in [entry.name for entry in os.scandir(folder) if entry.name.startswith(f"{row.task}.")]:
                if name not in kept:
                    (folder / name).unlink(missing_ok=True)
                    self._promised.pop(folder / name, None)

    async def received(self, caller: Identity, offer: Offer, incoming: Incoming) -> None:
        """Note a bundle's manifest; what an update is worth is decided when it is answered with."""
        if offer.task == "bundle":
            path = incoming.path.with_suffix(".manifest")
            await asyncio.to_thread(storage.write_atomic, path, incoming.manifest.encode())
        else:
            self._metrics.received(incoming.manifest.num_bytes)
            await self._heard(caller)

    def _bundle_path(self, caller: Identity, digest: str) -> Path:
        return self._incoming / f"{caller.role.value}-{caller.name}-{digest}.zip"

    # Users

    def _submit(self, caller: Identity, request: Submit) -> str:
        for row in self._store.jobs(caller.name):
            if row.key == request.key:
                self._jobs.place(row.id)
                return row.id
        path = self._bundle_path(caller, request.bundle)
        if not path.exists() or not path.with_suffix(".manifest").exists():
            raise JobError("The job's bundle was not uploaded.")
        bundle = bundles.read(path, self._kit.roster())
        if bundle.signer.member != caller.member:
            raise AccessError(f"The bundle was signed by {bundle.signer.member}, and {caller.member} submits it.")
        age = (datetime.now(UTC) - bundle.created).total_seconds()
        if abs(age) > FRESH_S:
            raise AccessError(f"The bundle was signed {age:.0f} s ago; sign it anew and submit it at once.")
        policy.decide(bundle, self._settings, self._home)
        known = self._kit.roster().sites
        unknown = sorted(set(bundle.job.cohort.sites or ()) - set(known))
        if unknown:
            raise JobError(f"cohort.sites names {unknown[0]!r}; the federation's sites are: {', '.join(known)}.")
        if not known:
            raise JobError("The federation has no sites yet.")
        quota = self._settings.quota
        size = path.stat().st_size + sum(size for size, _ in bundle.files.values())
        if quota.bytes is not None:
            check_quota(caller.name, self._store.held(caller.name) + size, quota.bytes)
        id = self._jobs.new_id(bundle.job.name)
        staged, folder = self._jobs.staged(id), self._jobs.folder(id)
        building = staged.with_name(f".{id}")
        try:
            job = bundles.unpack(path, bundle, building / "files")
            changes = {
                "output": job.output.model_copy(update={"dir": str(folder.parent)}),
                "cohort": job.cohort.model_copy(update={"sites": sorted(job.cohort.sites or known)}),
                "directory": str((folder / "files").absolute()),
            }
            building.mkdir(exist_ok=True)
            describe(building, id, job.model_copy(update=changes))
            for suffix in (".zip", ".manifest"):
                (building / f"bundle{suffix}").hardlink_to(path.with_suffix(suffix))
            storage.publish(building, staged)
            self._store.add_job(
                id,
                job.name,
                caller.name,
                request.bundle,
                request.key,
                job.rounds,
                size=size,
                most_jobs=quota.jobs,
                most_bytes=quota.bytes,
            )
        except BaseException as error:
            shutil.rmtree(building, ignore_errors=True)
            if not isinstance(error, StorageError):  # after which the job may be in the database all the same
                shutil.rmtree(staged, ignore_errors=True)
            raise
        self._jobs.place(id)
        for suffix in (".zip", ".manifest"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        self._promised.pop(path, None)
        return id

    def _row(self, caller: Identity, permission: Permission, id: str) -> JobRow:
        row = self._store.job(id)
        allowed(caller, permission, owner=row.submitter, sites=self._sites_of(id))
        return row

    def _queue_again(self, id: str) -> None:
        self._store.set_state(id, "queued", most_jobs=self._settings.quota.jobs)

    def _visible(self, caller: Identity, row: JobRow) -> bool:
        try:
            allowed(caller, Permission.LIST, owner=row.submitter, sites=self._sites_of(row.id))
        except AccessError:
            return False
        return True

    def _list(self, caller: Identity) -> JobLines:
        rows = self._store.jobs()
        visible = [row for row in rows if self._visible(caller, row)]
        if not visible:
            allowed(caller, Permission.LIST, owner=caller.name, sites=[caller.at_site or ""])
        return JobLines([_line(row) for row in visible])

    def _show(self, caller: Identity, id: str) -> JobView:
        row = self._row(caller, Permission.SHOW, id)
        run = Run(self._jobs.folder(id))
        answers = {task.site: task for task in self._store.tasks(id, "inspect")}
        sites = {}
        activities = {}
        for site in self._sites_of(id):
            task = answers.get(site)
            sites[site] = "not asked yet" if task is None else _said(task)
            activities[site] = "; ".join(self._doing(site, row)) if row.state == "running" else ""
        document = run.job.model_dump(mode="json")
        for private in ("directory", "output"):
            document.pop(private)
        records = [{**record, "logged": {}} for record in run.records]  # that may be a lot: it is in metrics.jsonl
        return JobView(_line(row), document, records, sites, activities, results_of(run.directory))

    def _doing(self, site: str, job: JobRow | None = None) -> list[str]:
        """Return what a site is at now, in words; for one job, or for all with their ids before it."""
        texts = []
        for activity in self._desk.seen(site)[3]:
            task = self._store.task(activity.task)
            if task is None or task.site != site or (job is not None and task.job != job.id):
                continue
            work = {"inspect": "checking", "train": "training", "evaluate": "evaluating"}.get(
                task.kind, "handing on" if task.kind in MAIL else "masking"
            )
            round = f", round {task.round}" if task.round else ""
            whose = "" if job is not None else f"{task.job}: "
            why = f" ({activity.why})" if activity.why else ""
            texts.append(f"{whose}{work}{round}: {activity.phase} for {activity.seconds:.0f} s{why}")
        return texts

    def _withdraw(self, caller: Identity, request: WithdrawSite) -> None:
        if request.site not in self._sites_of(request.job):
            raise JobError(f"Site {request.site!r} does not take part.", job=request.job)
        said = Missing("refused", f"withdrawn from the job by {caller.member}")
        self._store.leave(request.job, request.site, msgspec.json.encode(said))
        self._desk.ring([request.site])
        self._desk.answered(request.job)

    def _delete(self, row: JobRow) -> None:
        if row.state in ("queued", "running") or self._jobs.at_work(row.id):
            raise JobError("The job is under way; abort it first.", job=row.id)
        sites = self._sites_of(row.id)
        self._store.delete_job(row.id)
        self._jobs.forget(row.id)
        self._blobs.delete(self._jobs.key(row.id))
        self._desk.ring(sites)

    async def follow(self, caller: Identity, request: Follow) -> AsyncIterator[JobEvent]:
        """Yield a job's log."""
        async with self._refusals_noted(caller, request):
            await asyncio.to_thread(self._row, caller, Permission.LOGS, request.job)
        after = request.after
        while True:
            state = (await asyncio.to_thread(self._store.job, request.job)).state
            lines = await asyncio.to_thread(self._store.events, request.job, after)
            for line in lines:
                after = line.number
                yield JobEvent(line.number, line.time, line.kind, line.text)
            if lines:  # there may be more than one reading gives
                continue
            if not request.wait or (state not in ("queued", "running") and not self._jobs.at_work(request.job)):
                return
            await asyncio.sleep(_FOLLOW_S)

    def _sites(self, caller: Identity) -> SiteLines:
        lines = []
        for site in self._kit.roster().sites:
            try:
                allowed(caller, Permission.SITES, sites=[site])
            except AccessError:
                continue
            since, release, attends, _ = self._desk.seen(site)
            connected = since is not None and (attends or since <= self._settings.lease_s)
            lines.append(SiteLine(site, "connected" if connected else "gone", since, release, self._doing(site)))
        if not lines:
            allowed(caller, Permission.SITES, sites=[caller.at_site or ""])
        return SiteLines(lines)


@dataclass(frozen=True)
class _Open:
    """What is open for the sites that ask at once.

    Attributes:
        sequences: the last news of each, from before the rest was read.
        unfinished: the jobs of each.
        tasks: what all of them have to do.
    """

    sequences: Mapping[str, int]
    unfinished: Mapping[str, Sequence[JobRow]]
    tasks: Sequence[TaskRow]
    _read: dict[Path, bytes] = field(default_factory=dict)

    def small(self, path: Path) -> bytes:
        """Return a plan's file if it is there and small enough to travel inside a message, else nothing."""
        if path not in self._read:
            self._read[path] = b""
            with contextlib.suppress(OSError):  # whoever fetches it is told
                if path.stat().st_size <= INLINE_BYTES:
                    self._read[path] = path.read_bytes()
        return self._read[path]


@dataclass(frozen=True)
class _Taken:
    """An answer that is about to be noted.

    Attributes:
        job: the job's id.
        kind: as what it is counted.
        said: what is to be noted of the task, in order; the last says whether the answer counts.
        problem: what the audit log is to say of it, if anything.
        action: as what the audit log knows it.
    """

    job: str
    kind: str
    said: list[Said]
    problem: str = ""
    action: str = "answer"


class Unclaimed:
    """Uploaded bundles that wait to be submitted.

    They are aged by this process's monotonic clock, from when it first saw them as they are: a clock step makes
    nothing old, and whatever is written or offered again is new.

    Args:
        folder: where they lie; folders in it are jobs that are being taken in, and not looked at.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[tuple[int, int, int], float]] = {}

    def touch(self, path: Path) -> None:
        """Let a bundle, and all that belongs to it, be new: it is offered again."""
        with self._lock:
            for seen in [seen for seen in self._seen if seen.name.startswith(path.stem)]:
                del self._seen[seen]

    def sweep(self) -> list[Path]:
        """Delete what nobody has touched for ``UNCLAIMED_S``, and return its paths, whole names for what is in part."""
        now = time.monotonic()
        gone = []
        with self._lock:
            seen, self._seen = self._seen, {}
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.is_dir():
                        continue
                    status = path.stat()
                    signature = (status.st_ino, status.st_size, status.st_mtime_ns)
                    before, since = seen.get(path, (signature, now))
                    if before == signature and now - since >= UNCLAIMED_S:
                        path.unlink()
                        gone.append(path.with_name(path.name.removesuffix(".part")))
                    else:
                        self._seen[path] = (signature, since if before == signature else now)
        return gone


_FOLLOW_S = 0.25


def _subject(request: Message) -> str:
    return str(getattr(request, "job", "") or getattr(request, "bundle", ""))


def implied_bytes(num_bytes: int, *, encrypted: bool = False) -> int:
    """Return how large an update, or its manifest, may be at most where its plan, or that one's manifest, is so large.

    Sites hold their updates to the plan tensor by tensor; this is what bounds a site that does not: two parts, such as
    SCAFFOLD's, of tensors that are sent at twice the plan's precision, and a header. Encrypted, both take 32 bytes for
    each element of at least two.
    """
    return (32 if encrypted else 4) * num_bytes + (1 << 20)


def _problem(header: Header, row: TaskRow) -> str | None:
    """Return why an update is not the one that was asked for, or None."""
    if header.site != row.site or header.round != row.round:
        return (
            f"The update is of site {header.site!r}, round {header.round}; site {row.site!r}, round {row.round} is due."
        )
    return None


def _line(row: JobRow) -> JobLine:
    return JobLine(
        row.id,
        row.name,
        row.submitter,
        row.state,
        row.rounds,
        row.round,
        row.error,
        row.kind,
        row.created,
        row.started,
        row.ended,
    )


def _said(task: TaskRow) -> str:
    if task.state == "done":
        return "ready"
    if not task.answer:
        return "asked"
    said = msgspec.json.decode(task.answer, type=Missing)
    return f"{said.kind}: {said.reason}"
