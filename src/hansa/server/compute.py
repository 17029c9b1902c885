# SPDX-License-Identifier: Apache-2.0
"""What needs a job's framework at the server: the first parameters, the finished model, metrics out of sums.

It happens in a worker process beside the server, which itself loads no framework. The worker sees no site's data.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hansa.core import storage, wire
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.tree import Tree
from hansa.errors import HansaError, PolicyError, SiteError
from hansa.workers.messages import (
    Answer,
    Close,
    Done,
    Export,
    Failed,
    Initial,
    Metrics,
    Ready,
    Show,
    Shown,
    Start,
    Summarise,
    Work,
)
from hansa.workers.worker import INHERITED, Worker

_A = TypeVar("_A", bound=Answer)
_ATTEMPTS = 3
_CLOSE_S = 20.0


class Compute:
    """The worker of one job at the server. An async context manager.

    Args:
        job: the job with its files in place.
        directory: for what passes between the processes, and the worker's log.
        environment: what is set in the worker's environment, beside the little that it gets of this process's own.
        max_model_bytes: the largest model that may be trained.
    """

    def __init__(
        self,
        job: Job,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        max_model_bytes: int | None = None,
    ) -> None:
        self._job = job
        self._threads = job.engine.threads
        self._max_model_bytes = max_model_bytes
        self._directory = directory
        self._environment = environment
        self._files = itertools.count()
        self._worker: Worker | None = None
        self._starting = asyncio.Lock()

    traits: frozenset[Trait]
    sites: Sequence[str]

    async def __aenter__(self) -> Compute:
        """Start the worker and build the program.

        Raises:
            HansaError: what the recipe raises, or why the worker could not start.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            await self._ready()
        except BaseException:  # __aexit__ is not called when __aenter__ fails, and the worker must not stay
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is None or worker.serving is None:
            return
        if worker.ready:
            worker.send(Close())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await asyncio.shield(worker.serving)
        worker.kill("the job has ended")
        await worker.serving

    async def initial(self, path: Path) -> Tree:
        """Return the parameters that training starts from, read from ``path`` as they are needed.

        Raises:
            PolicyError: they are larger than the server allows.
        """
        await self._ask(lambda ticket, n: Initial(ticket, n, str(path)), Done)
        num_bytes = path.stat().st_size
        if self._max_model_bytes is not None and num_bytes > self._max_model_bytes:
            path.unlink()
            raise PolicyError(f"The model has {num_bytes:,} bytes; this server allows {self._max_model_bytes:,}.")
        params = wire.open_parts(path)[1]["params"]
        path.unlink()  # it is held open where it is large; a model's space is then free as soon as it was read
        return params

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        target = str(directory.absolute())
        with self._written(params) as path:
            await self._ask(lambda ticket, n: Export(ticket, n, str(path), target), Done)

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at: prompt -> what a model with ``params`` makes of it; or nothing."""
        with self._written(params) as path:
            return (await self._ask(lambda ticket, n: Show(ticket, n, str(path)), Shown)).texts

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return (await self._ask(lambda ticket, _: Summarise(ticket, dict(sums)), Metrics)).values

    @contextlib.contextmanager
    def _written(self, params: Tree) -> Iterator[Path]:
        path = self._directory / f"{next(self._files)}.hansa"
        try:
            with path.open("wb") as file:
                wire.write(file, "parameters", {}, {"params": params})
            yield path
        except OSError as error:
            raise storage.full(path, error) from error
        finally:
            path.unlink(missing_ok=True)

    async def _ask(self, request: Callable[[int, int], Work | Summarise], kind: type[_A]) -> _A:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                worker = await self._ready()
                answer = await worker.call(request(worker.ticket(), self._threads))
            except SiteError:
                if attempt == _ATTEMPTS:
                    raise
                continue
            if isinstance(answer, Failed):
                raise answer.as_error()
            assert isinstance(answer, kind), answer
            return answer
        raise AssertionError("the last attempt returns or raises")

    async def _ready(self) -> Worker:
        async with self._starting:
            worker = self._worker
            if worker is not None and worker.ready and worker.ending is None:
                return worker
            ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
            worker = Worker(
                self._threads,
                self._directory / "compute.log",
                environment=self._environment,
                inherited=INHERITED,
            )
            self._worker = worker
            start = Start(self._job.to_json(), str(self._directory.absolute()))
            worker.serving = asyncio.create_task(worker.serve(start, ready.set_result))
            worker.serving.add_done_callback(lambda _: ready.done() or ready.cancel())
            await asyncio.wait([ready])
            if ready.cancelled():
                failure = worker.failure
                raise failure if isinstance(failure, HansaError) else SiteError(str(failure))
            told = ready.result()
            self.sites, self.traits = told.sites, frozenset(Trait[name] for name in told.traits)
            return worker
