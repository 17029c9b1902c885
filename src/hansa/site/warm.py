# SPDX-License-Identifier: Apache-2.0
"""The warm worker process of a job at a site: started when it is needed, anew when it dies, and without the network.

It gets little of the agent's environment, none of its open files, and one end of a socket to the agent. It runs as
the same user, so code that is allowed to run here could read what that user can, the site's key included: whose code
may run is the site's decision (``policy.signers``).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.errors import HansaError, PolicyError, SiteError, StorageError, WireError
from hansa.site import memory
from hansa.site.settings import SiteSettings
from hansa.workers.messages import Answer, Close, DefectError, Failed, Ready, Start, Work
from hansa.workers.runner import num_threads
from hansa.workers.worker import INHERITED, Worker

ATTEMPTS = 3
"""How often a task is tried when its worker dies of it."""

_CLOSE_S = 20.0

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Only the agent speaks the network: what training needs is in the job's bundle or on this machine."""

_T = TypeVar("_T")


class WarmWorker:
    """The worker of one job.

    Args:
        site: this site's name.
        settings: what training may use.
        directory: the job's folder here; the worker keeps what it remembers in ``work``, and its output goes there.
        secagg: where the agent keeps the states of secure aggregation, of which the worker needs the masks' keys.
    """

    def __init__(self, site: str, settings: SiteSettings, directory: Path, secagg: Callable[[], Path]) -> None:
        self._site = site
        self._settings = settings
        self._directory = directory
        self._secagg = secagg
        self._closed = False
        self._worker: Worker | None = None
        self.traits: frozenset[Trait] = frozenset()
        """Of the training code, once a worker has built it."""

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._worker is not None and self._worker.serving is not None and not self._worker.serving.done()

    async def ask(self, job: Job, request: Callable[[int, int], Work]) -> Answer:
        """Ask the worker; when it dies of it, ask a new one. A worker whose task is withdrawn ends.

        Raises:
            PolicyError: the recipe or the data raise a Hansa error: this site can't do the job, and why.
            SiteError: the worker died each time, or met a defect of the job's code.
            WireError: the worker can't read what it was sent.
            StorageError: the disk is full.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                worker = await self._ready(job)
                answer = await worker.call(request(worker.ticket(), num_threads(job.engine, self._site)))
            except PolicyError:
                raise
            except SiteError as error:
                if attempt == ATTEMPTS or self._closed:
                    raise SiteError(f"{error.message} (attempt {attempt} of {ATTEMPTS})") from error
                continue
            except asyncio.CancelledError:
                await self._stop("the task was withdrawn")
                raise
            if isinstance(answer, Failed):
                failure = answer.as_error()
                raise _failure(failure) from failure
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
        await self._stop("another one is started")
        if self._closed:
            raise SiteError("The site has left the job.")
        resources = self._settings.resources
        devices = None if resources.gpus is None else tuple(filter(None, resources.gpus.split(",")))
        environment = {**OFFLINE, **resources.environment}
        if job.recipe.options.get("attached"):
            environment["HANSA_ATTACH_DIR"] = str(await whole(partial(attach_folder, self._directory, self._site)))
        try:
            worker = Worker(
                num_threads(job.engine, self._site),
                self._directory / "work" / "sites.log",
                devices,
                environment,
                INHERITED,
            )
        except OSError as error:
            raise StorageError(f"A worker can't be started: {error.strerror}. Free some space or memory.") from error
        self._worker = worker
        ready = asyncio.Event()
        start = Start(
            job.to_json(),
            str((self._directory / "work").absolute()),
            resources.max_memory_bytes,
            str(self._secagg().absolute()),
        )

        def serves(told: Ready) -> None:
            self.traits = frozenset(Trait[name] for name in told.traits)
            ready.set()

        worker.serving = asyncio.create_task(worker.serve(start, serves))
        worker.serving.add_done_callback(lambda _: ready.set())
        if resources.max_memory_bytes is not None:
            holding = asyncio.create_task(memory.hold(worker, resources.max_memory_bytes))
            worker.serving.add_done_callback(lambda _: holding.cancel())
        await ready.wait()
        if not worker.ready:
            failure = worker.failure or SiteError(worker.ending or "its worker ended")
            raise failure if isinstance(failure, SiteError) else _failure(failure) from failure
        return worker

    async def _stop(self, reason: str) -> None:
        """End the worker, whatever it is at."""
        worker, self._worker = self._worker, None
        if worker is not None and worker.serving is not None:
            worker.kill(reason)
            await asyncio.wait({worker.serving})

    async def rest(self) -> None:
        """End the worker, after its program has been closed if there is time; the next request starts another."""
        worker = self._worker
        if worker is not None and worker.serving is not None and worker.ready:
            worker.send(Close())
            await asyncio.wait({worker.serving}, timeout=_CLOSE_S)
        await self._stop("there was nothing to do")

    async def close(self, *, at_once: bool) -> None:
        """End the worker, as `rest` does or at once; none is started any more."""
        self._closed = True
        if not at_once:
            await self.rest()
        await self._stop("the site has left the job")


def _failure(error: Exception) -> HansaError:
    """Return what an error of the job's program means at a site."""
    if isinstance(error, StorageError | WireError):
        return error
    if isinstance(error, HansaError):
        return PolicyError(error.message)
    return SiteError(error.summary if isinstance(error, DefectError) else str(error))


def attach_folder(directory: Path, site: str) -> Path:
    """Return the folder in which attached processes find the job in ``directory``, made if need be.

    A Unix socket's path has at most 107 bytes, so under a long path the folder lies in the system's temporary one.

    Raises:
        StorageError: it can't be made, or is somebody else's.
    """
    place = directory.absolute() / "attach"
    if len(os.fsencode(place / site)) < 80:
        return place
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    found = Path(tempfile.gettempdir()) / f"hansa-{os.getuid()}-{name}"
    try:
        found.mkdir(mode=0o700, exist_ok=True)
        status = found.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o77 or not found.is_dir() or found.is_symlink():
            raise StorageError(f"{found} belongs to somebody else, so no process can attach there. Delete it.")
        place.unlink(missing_ok=True)
        place.symlink_to(found)
    except OSError as error:
        raise storage.full(found, error) from error
    return found


async def whole(work: Callable[[], _T], num_bytes: int | None = None) -> _T:
    """Do blocking work in a thread, and when cancelled wait for its end: nothing goes on behind one's back.

    Args:
        work: what to do.
        num_bytes: how much it moves. A little is moved at once: to hand it to a thread and be woken takes longer.
    """
    if num_bytes is not None and num_bytes <= trees.LARGE:
        return work()
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, as nobody else will
        raise
