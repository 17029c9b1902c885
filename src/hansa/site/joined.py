# SPDX-License-Identifier: Apache-2.0
"""A job at a site: its bundle, checked by the site's policy, and the warm worker process that trains it.

    jobs/ID/bundle.zip  files/     what the submitter signed
    jobs/ID/plans/                 the last plan received; its unchanged pieces are not fetched again
    jobs/ID/outbox/                answers on their way
    jobs/ID/work/                  what the site remembers from round to round, errors, ``sites.log``

| case | result |
|---|---|
| the worker dies at work (killed, out of memory, segfault) | started anew, ``ATTEMPTS`` times in all |
| it dies each time | the answer is ``lost``, with the cause |
| the recipe or the data raise a Hansa error | the answer is ``refused``, with the reason |
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from hansa import bundle as bundles
from hansa.core import wire
from hansa.core.config import Job
from hansa.core.values import Update
from hansa.errors import HansaError, PolicyError, SiteError
from hansa.pki.kit import Kit
from hansa.runs.baselines import course_form
from hansa.site import policy
from hansa.site.outbox import UPDATE, Outbox, Outcome
from hansa.site.settings import SiteSettings
from hansa.transport.client import Connection
from hansa.transport.messages import Assignment, Inspected, Missing
from hansa.transport.pieces import Manifest, describe
from hansa.workers import messages
from hansa.workers.messages import Absent, Answer, Answered, Close, Failed, Inspect, Perform, Start, Work
from hansa.workers.runner import num_threads
from hansa.workers.worker import Worker

ATTEMPTS = 3
"""How often a task is tried when its worker dies of it."""


class JoinedJob:
    """One job at this site.

    Args:
        id: the job's id at the server.
        site: this site's name.
        kit: who the site is and whom it trusts.
        settings: what it allows.
        directory: the job's folder here.
    """

    def __init__(self, id: str, site: str, kit: Kit, settings: SiteSettings, directory: Path) -> None:
        self.id = id
        self._site = site
        self._kit = kit
        self._settings = settings
        self._directory = directory
        self._plans = directory / "plans"
        for folder in (self._plans, directory / "work"):
            folder.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(directory / "outbox")
        self._job: Job | None = None
        self._joining = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._worker: Worker | None = None

    async def answer(self, connection: Connection, given: Assignment, told: Callable[[str], None]) -> Outcome:
        """Do what is assigned, its update going to the outbox's folder of the task; every failure is an outcome.

        Args:
            connection: where bundle and plan come from.
            given: what to do.
            told: called with each phase: waiting, receiving, working.

        Raises:
            UnreachableError: the server went for good while something was being fetched.
        """
        folder = self.outbox.begin(given.task)
        try:
            told("receiving")
            job = await self._join(connection, given)
            plan = None if given.kind == "inspect" else await self._receive(connection, given)
            told("waiting")
            async with self._turn:
                told("working")
                if plan is None:
                    found = await self._ask(job, lambda ticket, n: Inspect(ticket, n, self._site))
                    assert isinstance(found, messages.Inspected), found
                    return Outcome(inspected=Inspected(found.counts, found.labels))
                return await self._perform(job, given, plan, folder / UPDATE)
        except PolicyError as error:
            return Outcome(missing=Missing("refused", error.message[:4096]))
        except SiteError as error:
            return Outcome(missing=Missing("lost", error.message[:4096]))

    async def _join(self, connection: Connection, given: Assignment) -> Job:
        async with self._joining:
            if self._job is None:
                path = self._directory / "bundle.zip"
                if not path.exists():
                    await connection.download(self.id, given.bundle, path)
                self._job = await asyncio.to_thread(self._admitted, path)
            return self._job

    def _admitted(self, path: Path) -> Job:
        try:
            bundle = bundles.read(path, self._kit.roster())
            policy.decide(bundle, self._settings)
            files = self._directory / "files"
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir()
            job = bundles.unpack(path, bundle, files)
            return policy.localised(job, self._site, self._settings, self._kit.directory)
        except PolicyError:
            raise
        except HansaError as error:
            raise PolicyError(f"The job's bundle was not accepted: {error.message}") from error

    async def _receive(self, connection: Connection, given: Assignment) -> Path:
        path = self._plans / f"{given.plan}.hansa"
        if path.exists():
            return path
        if given.inline:
            policy.check_size(len(given.inline), self._settings.policy)
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(given.inline)
            temporary.replace(path)
        else:
            limit = self._settings.policy.max_model_bytes
            await connection.download(self.id, given.plan, path, donors=await self._donors(), max_bytes=limit)
        for other in self._plans.iterdir():
            if other != path and other.suffix == ".hansa":
                other.unlink(missing_ok=True)
        return path

    async def _donors(self) -> list[tuple[Path, Manifest]]:
        return [
            (path, await asyncio.to_thread(lambda p=path: describe(p, wire.cuts(p))))  # type: ignore[misc]
            for path in self._plans.glob("*.hansa")
        ]

    async def _perform(self, job: Job, given: Assignment, plan: Path, out: Path) -> Outcome:
        form = course_form(job, given.course)

        def request(ticket: int, threads: int) -> Work:
            return Perform(ticket, form, str(plan), self._site, threads, str(out))

        limit = self._settings.policy.max_task_s
        try:
            async with asyncio.timeout(limit):
                answer = await self._ask(job, request)
        except TimeoutError:
            await self.stop("it took longer than the site allows")
            raise PolicyError(f"The round took longer than the {limit:g} s that this site allows.") from None
        if isinstance(answer, Absent):
            return Outcome(missing=Missing(answer.kind, answer.reason[:4096]))
        assert isinstance(answer, Answered), answer
        if not answer.spooled:
            empty = Update(
                self._site,
                answer.round,
                answer.version,
                {},
                answer.weight,
                answer.sums,
                answer.completed,
                answer.seconds,
            )
            await asyncio.to_thread(wire.spool, empty, out)
        return Outcome()

    async def _ask(self, job: Job, request: Callable[[int, int], Work]) -> Answer:
        """Ask the worker; when it dies of it, ask a new one."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                worker = await self._ready(job)
                answer = await worker.call(request(worker.ticket(), num_threads(job.engine, self._site)))
            except SiteError as error:
                if attempt == ATTEMPTS or self._worker is None:
                    raise SiteError(f"{error.message} (attempt {attempt} of {ATTEMPTS})") from error
                continue
            if isinstance(answer, Failed):
                problem = answer.as_error()
                raise PolicyError(problem.message) if isinstance(problem, HansaError) else SiteError(str(problem))
            return answer
        raise AssertionError("the last attempt returns or raises")

    async def _ready(self, job: Job) -> Worker:
        """Return the job's worker, started if need be.

        Raises:
            PolicyError: the recipe can't be built here, and why.
            SiteError: the worker died before it was ready.
        """
        if self._worker is not None and self._worker.ready and self._worker.ending is None:
            return self._worker
        await self.stop("another one is started")
        resources = self._settings.resources
        devices = None if resources.gpus is None else tuple(resources.gpus.split(","))
        worker = Worker(
            num_threads(job.engine, self._site),
            self._directory / "work" / "sites.log",
            devices,
            {"HANSA_ATTACH_DIR": str(self._directory / "attach")},
        )
        self._worker = worker
        ready = asyncio.Event()
        start = Start(job.to_json(), str((self._directory / "work").absolute()))
        worker.serving = asyncio.create_task(worker.serve(start, lambda _: ready.set()))
        worker.serving.add_done_callback(lambda _: ready.set())
        await ready.wait()
        if not worker.ready:
            failure = worker.failure
            if isinstance(failure, HansaError) and not isinstance(failure, SiteError):
                raise PolicyError(failure.message)
            raise failure if isinstance(failure, SiteError) else SiteError(str(failure))
        return worker

    async def stop(self, reason: str) -> None:
        """End the worker, whatever it is at."""
        worker, self._worker = self._worker, None
        if worker is not None and worker.serving is not None:
            worker.kill(reason)
            await worker.serving

    async def close(self) -> None:
        """Let the worker close its program, then end it."""
        worker, self._worker = self._worker, None
        if worker is None or worker.serving is None:
            return
        if worker.ready and not self._turn.locked():
            worker.send(Close())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(worker.serving), _CLOSE_S)
        worker.kill("the agent ends")
        await worker.serving

    def forget(self) -> None:
        """Delete everything of the job."""
        shutil.rmtree(self._directory, ignore_errors=True)


_CLOSE_S = 20.0
