# SPDX-License-Identifier: Apache-2.0
"""Jobs at work: each in a thread and an event loop of its own, as many at once as the settings allow.

A job is a run folder, exactly as ``hansa run`` makes one, so a killed server goes on from its checkpoint.

    jobs/ID/                what every run has: job.json, metrics, checkpoints, model/, report.html
    jobs/ID/bundle.zip      what its submitter signed;  files/ what is in it
    jobs/ID/work/           plans, updates, and what passes to the worker beside the server

| case | result |
|---|---|
| the server is killed or stopped | jobs that were running go on when it starts again |
| the disk is full | tried again with growing pauses for ``PATIENCE_S``, then failed; ``hansa job resume`` goes on |
| killed while a job is taken in | before its row is there, nothing of it stays; after it, its folder is put in place |
| a folder in jobs/ that the database does not know | left as it is, and said in the log; its name is not given again |
| a plan larger than ``max_model_bytes``, a round beyond its submitter's quota | the job fails before it is written |
| a defect in one job | that job fails with its traceback in the log; others go on |
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from hansa import bundle as bundles
from hansa.core import storage
from hansa.core.config import Job
from hansa.core.ports import Reply
from hansa.core.values import Absence, Plan, RoundRecord
from hansa.errors import HansaError, InterruptedRunError, JobError, PolicyError, StorageError
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.runs import carrier
from hansa.runs.run import Run
from hansa.server import policy
from hansa.server.blobs import Blobs
from hansa.server.compute import Compute
from hansa.server.desk import Desk
from hansa.server.http import Metrics
from hansa.server.remote import MAIL, Remote
from hansa.server.settings import ServerSettings
from hansa.server.store import Store
from hansa.sinks.text import number
from hansa.transport.pieces import describe

PATIENCE_S = 600.0
"""How long a job is tried again when the server's own disk is full."""

RESULTS = "results.json"

_PAUSE_S = 5.0
_EVERY_ROUND = 1 << 62
_OWN = ("work", "checkpoints", "files", "bundle.zip", "bundle.manifest", ".lock")
"""What is in a job's folder and no result."""

_LOG = logging.getLogger("hansa.server.jobs")


class Jobs:
    """The queue and the jobs at work.

    Args:
        directory: the server's folder.
        settings: how many jobs at once, how long a site may be silent.
        store, blobs: what is durable.
        desk: the doorbells.
        metrics: what is counted.
        kit: the federation's roster, which says whose jobs may go on.
    """

    def __init__(
        self,
        directory: Path,
        settings: ServerSettings,
        store: Store,
        blobs: Blobs,
        desk: Desk,
        metrics: Metrics,
        kit: Kit,
    ) -> None:
        self._home = directory
        self.directory = directory / "jobs"
        for folder in (self.directory, directory / "incoming"):
            folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._store = store
        self._blobs = blobs
        self._desk = desk
        self._metrics = metrics
        self._kit = kit
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._running: dict[str, _Running] = {}
        self._signed: dict[str, Job] = {}
        self._placing = threading.Lock()
        self.stopping = threading.Event()

    def new_id(self, name: str) -> str:
        """Return an id that no job has had, and that no folder is called by: this database may not know of it."""
        while self.folder(id := self._store.next_id(name)).exists():
            pass
        return id

    def staged(self, id: str) -> Path:
        """Return where a job's folder waits, whole and durable, for the job to be in the database."""
        return self._home / "incoming" / id

    def place(self, id: str) -> None:
        """Bring the folder of a job that is in the database to its place; done already, it changes nothing."""
        staged, folder = self.staged(id), self.folder(id)
        with self._placing:
            if not staged.exists():
                return
            try:
                staged.rename(folder)
                storage.sync_directory(folder.parent)
                storage.sync_directory(staged.parent)
            except OSError as error:
                raise storage.full(folder, error) from error
            self._blobs.mirror(self.key(id))

    def recover(self) -> None:
        """Bring back what a crash has cut short, or this disk has lost; called before the server listens.

        Raises:
            StorageError: the disk or the blob store can't be used.
        """
        known = {row.id for row in self._store.jobs()}
        for id in known:
            self.place(id)
            self._blobs.restore(self.key(id))
        for path in (self._home / "incoming").iterdir():
            if path.is_dir():  # a submission that never became a job
                shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.iterdir():
            if path.name not in known and not path.name.startswith("."):
                _LOG.warning(
                    "%s is of no job in the database; it is left as it is. Delete it if nobody needs it.", path
                )

    def forget(self, id: str) -> None:
        """Forget a job that is deleted."""
        self._signed.pop(id, None)

    async def run(self) -> None:
        """Carry out what is queued, and first what was running when the server ended, until cancelled."""
        for row in self._store.jobs(state="running"):
            self._start(row.id)
        try:
            while True:
                self._wake.clear()
                try:
                    self._start_queued()
                except StorageError as error:
                    _LOG.warning("The queue waits: %s", error.message)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                await self._wake.wait()
        finally:
            self.stopping.set()
            for running in self._running.values():
                running.cancel()
            await asyncio.to_thread(self._join)

    def _start_queued(self) -> None:
        for row in self._store.jobs(state="queued"):
            if len(self._running) >= self._settings.max_running_jobs:
                return
            if row.id not in self._running:
                with contextlib.suppress(JobError):  # it was aborted a moment ago
                    self._store.set_state(row.id, "running")
                    self._start(row.id)

    def wake(self) -> None:
        """Look at the queue again."""
        self._wake.set()

    async def abort(self, id: str) -> None:
        """Stop a job, whether it waits or works; finished rounds stay (JobError if it has ended)."""
        await asyncio.to_thread(self._store.set_state, id, "aborted")
        running = self._running.get(id)
        if running is not None:
            running.cancel()
        self._desk.ring(self.sites_of(id))

    def at_work(self, id: str) -> bool:
        """Say whether a job's thread is still there."""
        return id in self._running

    def folder(self, id: str) -> Path:
        """Return a job's folder."""
        return self.directory / id

    def key(self, id: str) -> str:
        """Return the name of a job's folder among the files that must survive."""
        return f"jobs/{id}"

    def sites_of(self, id: str) -> list[str]:
        """Return the sites that take part in a job: those of the moment at which it was taken in."""
        sites = self.job_of(id).cohort.sites
        assert sites is not None, "written down when the job was taken in"
        return sorted(sites)

    def job_of(self, id: str) -> Job:
        """Return a job as it was signed, its files in place."""
        if id not in self._signed:
            self._signed[id] = Run(self.folder(id)).job
        return self._signed[id]

    def _join(self) -> None:
        for running in list(self._running.values()):
            running.thread.join()

    def _start(self, id: str) -> None:
        running = _Running(id, self)
        self._running[id] = running
        running.thread.start()

    def ended(self, id: str) -> None:
        """A job's thread has ended; called from it."""

        def note() -> None:
            del self._running[id]
            self._wake.set()

        with contextlib.suppress(RuntimeError):  # the server's loop is closed already
            self._loop.call_soon_threadsafe(note)

    async def carry_out(self, id: str) -> None:
        """Bring one job to its end, in its own loop."""
        await asyncio.to_thread(self.place, id)
        run = Run(self.folder(id))
        sites = self.sites_of(id)
        bundle = bundles.read(run.directory / "bundle.zip", self._kit.roster())
        policy.decide(bundle, self._settings, self._home)
        job = policy.at_server(run.job, sites, self._settings, self._home)
        notes = _Notes(self, self._store, self._blobs, self._metrics, id)
        compute = self._settings.compute

        def engine(work: Path) -> Remote:
            beside = Compute(job, work / "compute", compute.environment, self._settings.max_model_bytes)
            allow = partial(self._allow, id)
            lease_s = self._settings.lease_s
            masks = bundle.digest, Identities(self._kit)
            return Remote(id, job, work, sites, beside, self._store, self._blobs, self._desk, lease_s, allow, masks)

        failing, pause, rounds = math.inf, 1.0, -1
        while True:
            try:
                await carrier.carry_out(run, engine, notes)
                break
            except StorageError as error:
                _LOG.warning("%s: %s", id, error.message)
                storage.Spares(run.directory / "work" / storage.SPARES).clear()
                if notes.rounds != rounds:  # there was progress since it last failed
                    failing, pause, rounds = time.monotonic(), 1.0, notes.rounds
                if time.monotonic() - failing > PATIENCE_S:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)
        await asyncio.to_thread(publish_results, run.directory)
        await asyncio.to_thread(self._blobs.mirror, self.key(id))
        await asyncio.to_thread(self._clear, id)

    def _allow(self, id: str, round: int, num_bytes: int, updates: int) -> None:
        """Account for what a plan's round takes: the plan, a model, and an update of the plan's size a site.

        Raises:
            PolicyError: the plan is larger than a model may be.
            AccessError: the submitter's jobs would hold more than the quota.
        """
        largest, most = self._settings.max_model_bytes, self._settings.quota.bytes
        if largest is not None and num_bytes > largest:
            raise PolicyError(
                f"The plan, which is the model and what the strategy sends with it, has {num_bytes:,} bytes; this "
                f"server allows {largest:,} (max_model_bytes in server.toml).",
                job=id,
                round=round,
            )
        if most is not None:
            self._store.hold(id, size_of(self.folder(id)) + (2 + updates) * num_bytes, most)

    def _clear(self, id: str) -> None:
        """Free what a finished job needs no more: its updates, its plans, its first parameters."""
        for course in {row.course for row in self._store.tasks(id)}:
            for key in self._store.forget(id, course, _EVERY_ROUND):
                self._blobs.delete(key)
        work = self.folder(id) / "work"
        for name in ("plans", "updates", "compute", MAIL, storage.SPARES):
            shutil.rmtree(work / name, ignore_errors=True)
        for path in [work / "initial.hansa", *work.rglob("secure.*")]:
            path.unlink(missing_ok=True)

    def settle(self, id: str, error: BaseException | None) -> None:
        """Write down how a job ended, and what it still holds."""
        if self.stopping.is_set() and isinstance(error, InterruptedRunError | asyncio.CancelledError):
            return
        self._store.hold(id, size_of(self.folder(id)))
        if error is None:
            self._store.set_state(id, "finished")
            self._store.event(id, "state", "finished")
        elif isinstance(error, InterruptedRunError | asyncio.CancelledError):
            self._store.event(id, "state", "aborted")
        else:
            text = str(error) if isinstance(error, HansaError) else f"a defect: {type(error).__name__}: {error}"
            if not isinstance(error, HansaError):
                _LOG.error("Job %s ended in a defect", id, exc_info=error)
            self._store.set_state(id, "failed", text, type(error).__name__)
            self._store.event(id, "state", f"failed: {text}")
        self._desk.ring(self.sites_of(id))


class _Running:
    """The thread of one job."""

    def __init__(self, id: str, jobs: Jobs) -> None:
        self._id = id
        self._jobs = jobs
        self._lock = threading.Lock()
        self._cancelled = False
        self._cancel: Callable[[], object] | None = None
        self.thread = threading.Thread(target=self._work, name=f"job {id}", daemon=True)

    def cancel(self) -> None:
        """Stop the job at its next await."""
        with self._lock:
            self._cancelled = True
            if self._cancel is not None:
                self._cancel()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._main())
        except BaseException as caught:  # noqa: BLE001 - whatever ended the job is written down
            error = caught
        while True:
            try:
                self._jobs.settle(self._id, error)
                break
            except StorageError as full:
                _LOG.warning("How job %s ended can't be written down yet: %s", self._id, full.message)
                if self._jobs.stopping.wait(_PAUSE_S):
                    break
            except HansaError:
                _LOG.exception("How job %s ended could not be written down", self._id)
                break
        self._jobs.ended(self._id)

    async def _main(self) -> None:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        assert task is not None, "asyncio.run makes a task"
        with self._lock:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self._cancelled:
                task.cancel()
        try:
            await self._jobs.carry_out(self._id)
        finally:
            with self._lock:
                self._cancel = None


class _Notes:
    """A job's progress, as lines in its log; what a round has left on disk is made to survive."""

    def __init__(self, jobs: Jobs, store: Store, blobs: Blobs, metrics: Metrics, id: str) -> None:
        self._jobs = jobs
        self._store = store
        self._blobs = blobs
        self._metrics = metrics
        self._id = id
        self.rounds = 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Note a stage."""
        self._store.event(self._id, "stage", name)

    def advance(self, detail: str = "") -> None:
        """Steps are not noted."""

    def ask(self, plan: Plan, sites: Sequence[str]) -> None:
        """Requests are not noted."""

    def reply(self, plan: Plan, reply: Reply) -> None:
        """Note who gave no update, and why."""
        if isinstance(reply, Absence):
            text = f"{plan.job}, round {plan.round}, {plan.task}: {reply.site}: {reply.kind}: {reply.reason}"
            self._store.event(self._id, "absent", text)

    def round(self, record: RoundRecord) -> None:
        """Note a finished round, which is on disk."""
        self.rounds += 1
        self._blobs.mirror(self._jobs.key(self._id))
        self._metrics.finished_round(record.seconds)
        metrics = ", ".join(f"{name} {number(value)}" for name, value in record.metrics.items())
        text = f"round {record.round}: {len(record.accepted)} of {len(record.asked)} sites, {metrics}"
        self._store.progressed(self._id, record.round, size_of(self._jobs.folder(self._id)), text)

    def doing(self, site: str, text: str) -> None:
        """What sites are at is on the desk."""

    def say(self, text: str) -> None:
        """Note it."""
        self._store.event(self._id, "note", text)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:  # updates come and go
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += size_of(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def publish_results(directory: Path) -> dict[str, tuple[str, int]]:
    """Describe a finished run's files for download: name -> manifest and bytes; manifests lie beside."""
    manifests = directory / "work" / "results"
    shutil.rmtree(manifests, ignore_errors=True)
    manifests.mkdir(parents=True)
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and name.parts[0] not in _OWN:
            manifest = describe(path)
            (manifests / manifest.digest).write_bytes(manifest.encode())
            found[name.as_posix()] = (manifest.digest, manifest.num_bytes)
    storage.write_json(directory / "work" / RESULTS, found)
    return found


def results_of(directory: Path) -> dict[str, tuple[str, int]]:
    """Return the files of a finished job: name -> manifest and bytes; none before it has finished."""
    path = directory / "work" / RESULTS
    if not path.exists():
        return {}
    return msgspec.convert(storage.read_json(path), dict[str, tuple[str, int]])
