# SPDX-License-Identifier: Apache-2.0
"""The ``processes`` engine: sites in warm worker processes that work at the same time.

This process imports no framework and builds no program: the first worker tells it the sites, and every call that
needs the program goes to a worker (:mod:`hansa.simulation.pool` starts them and hands them out).

Guarantees, each held by a test:

- the same job gives the same bits as in engine ``local``;
- the sum of running shares never exceeds the machine's (:mod:`hansa.simulation.shares`);
- no process outlives the engine, however it or this process ends.

| case | result |
|---|---|
| a worker dies (killed, out of memory, segfault) | its site is ``lost`` with the cause; a new worker replaces it |
| three workers in a row die before they are ready | no more are started; sites that wait are ``lost`` with the cause |
| a site overruns its deadline | ``late`` at once; it goes on, and the finished update is in a later ``late()`` |
| a site is asked while it still works on an earlier round | ``late`` |
| the consumer of ``ask`` stops early | sites that wait are not started; what others send is deleted |
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from hansa.core import wire
from hansa.core.config import Choice, Job
from hansa.core.fit import Trait
from hansa.core.ports import Handle, Peers, Reply, SecureLine, SiteReport
from hansa.core.tree import Parts, Tree
from hansa.core.values import Absence, Plan, Update
from hansa.errors import HansaError, JobError, SiteError, StorageError
from hansa.simulation import shares
from hansa.simulation.local import LocalPeers
from hansa.simulation.pool import Place, Pool
from hansa.simulation.shares import Machine
from hansa.workers.messages import (
    Absent,
    Answer,
    Answered,
    CourseForm,
    Done,
    Export,
    Failed,
    Initial,
    Inspect,
    Inspected,
    Metrics,
    Perform,
    Show,
    Shown,
    Summarise,
    Work,
)
from hansa.workers.runner import SECURE, Course, SecureSites, SimulatedLine, form_of, num_threads

_ATTEMPTS = 3
_SETTLE_S = 0.05
"""How long an answer may be on its way from the worker before its site counts as overdue."""

_A = TypeVar("_A", bound=Answer)


class Processes:
    """All sites in worker processes.

    Args:
        job: the resolved job; its recipe is built in every worker.
        directory: the run's folder, for memories, mail, spooled updates and ``sites.log``.
        cpus: the cores to divide; all that this process may use by default.
        gpus: the GPUs to divide, as in CUDA_VISIBLE_DEVICES; all visible ones by default.
    """

    needs_all = True

    def __init__(
        self, job: Job, directory: Path, *, cpus: int | None = None, gpus: Sequence[str] | None = None
    ) -> None:
        self._job = job
        self._exchange = directory / "exchange"
        self._machine = Machine(
            job.engine,
            shares.num_cores() if cpus is None else cpus,
            shares.visible_gpus() if gpus is None else gpus,
        )
        self.pool = Pool(job, directory, self._machine)
        self.secure = SecureSites(directory / SECURE, simulated=True)
        self.peers: Peers = LocalPeers(directory)
        self._files: Iterator[Path] = (self._exchange / f"{n}.hansa" for n in itertools.count())
        self._metrics: dict[frozenset[tuple[str, float]], dict[str, float]] = {}

    async def __aenter__(self) -> Processes:
        """Start the first worker, and then the others while it already works.

        Raises:
            HansaError: what the recipe raises in the worker, or why the worker could not start.
        """
        shutil.rmtree(self._exchange, ignore_errors=True)
        self._exchange.mkdir(parents=True)
        try:
            self.sites, self.traits = await self.pool.open()
            for site in sorted(self._job.engine.sites):
                if site not in self.sites:
                    raise JobError(f"engine.sites names {site!r}; the job's sites are: {', '.join(self.sites)}.")
        except BaseException:  # __aexit__ is not called when __aenter__ fails, and workers must not stay
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End all workers and free the space of their files."""
        try:
            await self.pool.close()
        finally:
            shutil.rmtree(self._exchange, ignore_errors=True)

    sites: Sequence[str]
    traits: frozenset[Trait]

    async def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        path = self.new_file()
        try:
            _expect(await self._somewhere(lambda ticket, threads: Initial(ticket, threads, str(path))), Done)
            return (await asyncio.to_thread(_read_parts, path))["params"]
        finally:
            path.unlink(missing_ok=True)

    async def inspect(self, site: str) -> SiteReport:
        """Check one site's data against the job."""
        answer = await self._call(site, lambda ticket, threads: Inspect(ticket, threads, site))
        inspected = _expect(answer, Inspected)
        return SiteReport(site, inspected.counts, inspected.labels)

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        path, target = self.new_file(), str(directory.absolute())
        try:
            await asyncio.to_thread(_write, path, lambda file: wire.write(file, "parameters", {}, {"params": params}))
            _expect(await self._somewhere(lambda ticket, threads: Export(ticket, threads, str(path), target)), Done)
        finally:
            path.unlink(missing_ok=True)

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at: prompt -> what a model with ``params`` makes of it; or nothing."""
        path = self.new_file()
        try:
            await asyncio.to_thread(_write, path, lambda file: wire.write(file, "parameters", {}, {"params": params}))
            return _expect(await self._somewhere(lambda t, threads: Show(t, threads, str(path))), Shown).texts
        finally:
            path.unlink(missing_ok=True)

    def cohort(self, course: Course) -> ProcessCohort:
        """Return the sites of ``course`` as a workflow sees them.

        Raises:
            JobError: the course holds a strategy or a filter as a value, which can't be sent to workers.
        """
        return ProcessCohort(self, course)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics. Those of single sites came with their answers and cost nothing."""
        known = self._metrics.get(frozenset(sums.items()))
        if known is not None:
            return dict(known)
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(SiteError):
                return await self._summarise(sums)
        return await self._summarise(sums)

    async def _summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        worker = await self.pool.any_worker()
        return _expect(await worker.call(Summarise(worker.ticket(), dict(sums))), Metrics).values

    def new_file(self) -> Path:
        """Return a new path for a file that passes between processes."""
        return next(self._files)

    def threads(self, site: str | None) -> int:
        """Return how many CPU threads ``site`` trains with."""
        return num_threads(self._job.engine, site)

    def remember(self, answer: Answered) -> None:
        """Keep the metrics that came with an answer until they are asked for."""
        if answer.metrics is not None:
            if len(self._metrics) > 2 * len(self.sites) + 16:
                del self._metrics[next(iter(self._metrics))]
            self._metrics[frozenset(answer.sums.items())] = answer.metrics

    async def _somewhere(self, request: Callable[[int, int], Work]) -> Answer:
        """Ask what any worker can answer; when one dies of it, ask another."""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(SiteError):
                return await self._call(None, request)
        return await self._call(None, request)

    async def _call(self, site: str | None, request: Callable[[int, int], Work]) -> Answer:
        granted: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def start(place: Place) -> None:
            answer = place.worker.call(request(place.worker.ticket(), self.threads(site)))
            answer.add_done_callback(partial(_pass_on, granted))
            answer.add_done_callback(lambda _: self.pool.leave(place))

        waiter = self.pool.submit(site, start, lambda error: None if granted.done() else granted.set_exception(error))
        try:
            return await granted
        finally:
            self.pool.withdraw(waiter)


def _pass_on(target: asyncio.Future[Answer], answer: asyncio.Future[Answer]) -> None:
    error = answer.exception()
    if target.done():
        return
    if error is None:
        target.set_result(answer.result())
    else:
        target.set_exception(error)


def _expect(answer: Answer, kind: type[_A]) -> _A:
    if isinstance(answer, Failed):
        raise answer.as_error()
    assert isinstance(answer, kind), answer
    return answer


def _read_parts(path: Path) -> Parts:
    return wire.open_parts(path)[1]


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        with path.open("wb") as file:
            write(file)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"Can't write {path}: {error.strerror}. Free some space or choose another output.dir; "
            "the finished rounds are safe, and resuming goes on from the last one."
        ) from error


class ProcessCohort:
    """The port of the ``processes`` engine."""

    def __init__(self, engine: Processes, course: Course) -> None:
        self.sites: Sequence[str] = course.sites
        self.engine = engine
        self.form = _form(course)
        self._course = course
        self.busy: dict[str, int] = {}
        self.overdue: list[Handle] = []

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Carry ``plan`` out at every site, as many at once as the machine has room for."""
        errand = _Errand(self, plan)
        await asyncio.to_thread(_write, errand.path, lambda file: wire.write_plan(file, plan))
        pool = self.engine.pool
        waiters = []
        try:
            for site in sorted(sites):
                if site in self.busy:
                    errand.reply(Absence(site, "late", f"still working on round {self.busy[site]}"))
                else:
                    refuse = partial(_lost, errand, site)
                    waiters.append(pool.submit(site, partial(_Visit, errand, site), refuse))
            for _ in sites:
                yield await errand.replies.get()
        finally:
            for waiter in waiters:
                pool.withdraw(waiter)
            errand.close()

    def late(self, round: int) -> Sequence[Handle]:
        """Return, and forget, the updates that came after their deadline."""
        late, self.overdue = self.overdue, []
        return late

    @property
    def secure(self) -> SecureLine | None:
        """The way of secure aggregation's messages; they are answered here, and updates masked in the workers."""
        return None if self._course.secure is None else SimulatedLine(self.engine.secure, self._course)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return await self.engine.summarise(sums)


def _form(course: Course) -> CourseForm:
    choices = []
    for choice in (course.strategy, *course.filters):
        if not isinstance(choice, Choice):
            raise JobError(
                f"Engine 'processes' can't send {choice.name!r} to its workers as a value. "
                "Name it in the job as 'module:builder', or use engine.name = 'local'.",
                job=course.name,
            )
        choices.append(choice.model_dump(mode="json"))
    secure = None if course.secure is None else course.secure.model_dump(mode="json")
    return CourseForm(course.name, choices[0], choices[1:], form_of(course.terms), secure)


class _Errand:
    """One plan on its way: the file that workers read it from, and the replies so far."""

    def __init__(self, cohort: ProcessCohort, plan: Plan) -> None:
        self.cohort = cohort
        self.plan = plan
        self.path = cohort.engine.new_file()
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()
        self._open = True
        self._holders = 1

    def reply(self, reply: Reply) -> None:
        """Hand ``reply`` to the workflow; if it has gone, delete what the reply holds."""
        if self._open:
            self.replies.put_nowait(reply)
        elif not isinstance(reply, Absence):
            reply.release()

    def hold(self) -> None:
        """Keep the plan's file for one site more."""
        self._holders += 1

    def let_go(self) -> None:
        """Delete the plan's file once nobody needs it."""
        self._holders -= 1
        if not self._holders:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """The workflow has gone."""
        self._open = False
        while not self.replies.empty():
            self.reply(self.replies.get_nowait())
        self.let_go()


def _lost(errand: _Errand, site: str, error: HansaError) -> None:
    errand.reply(Absence(site, "lost", error.message))


class _Visit:
    """A plan that is being carried out at one site, from its start to its answer."""

    def __init__(self, errand: _Errand, site: str, place: Place) -> None:
        self._errand = errand
        self._cohort = errand.cohort
        self._site = site
        self._place = place
        self._late = False
        self._cohort.busy[site] = errand.plan.round
        errand.hold()
        engine = self._cohort.engine
        self._out = engine.new_file()
        request = Perform(
            place.worker.ticket(),
            self._cohort.form,
            str(errand.path),
            site,
            engine.threads(site),
            str(self._out),
        )
        deadline = errand.plan.deadline_s
        self._timer = asyncio.get_running_loop().call_later(deadline + _SETTLE_S, self._overrun) if deadline else None
        place.worker.call(request).add_done_callback(self._finish)

    def _overrun(self) -> None:
        self._late = True
        reason = f"not done after the deadline of {self._errand.plan.deadline_s:g} s"
        self._errand.reply(Absence(self._site, "late", reason))
        self._cohort.engine.pool.overdue(self._place, self._errand.plan.deadline_s or 0.0)

    def _finish(self, future: asyncio.Future[Answer]) -> None:
        if self._timer:
            self._timer.cancel()
        del self._cohort.busy[self._site]
        self._errand.let_go()
        reply = self._reply(future)
        deadline = self._errand.plan.deadline_s
        if self._late or (deadline and not isinstance(reply, Absence) and reply.header.seconds > deadline):
            self._postpone(reply)
        else:
            self._errand.reply(reply)
        self._cohort.engine.pool.leave(self._place)

    def _postpone(self, reply: Reply) -> None:
        if isinstance(reply, Absence):
            return
        if not self._late:
            reason = f"took {reply.header.seconds:.2f} s, the deadline is {self._errand.plan.deadline_s:g} s"
            self._errand.reply(Absence(self._site, "late", reason))
        if self._errand.plan.task == "train":
            self._cohort.overdue.append(reply)

    def _reply(self, future: asyncio.Future[Answer]) -> Reply:
        ended = future.exception()
        if ended is not None:
            self._out.unlink(missing_ok=True)
            return Absence(self._site, "lost", ended.message if isinstance(ended, HansaError) else str(ended))
        answer = future.result()
        if isinstance(answer, Absent):
            self._out.unlink(missing_ok=True)
            return Absence(self._site, answer.kind, answer.reason)
        if isinstance(answer, Failed):
            return Absence(self._site, "lost", answer.message)
        assert isinstance(answer, Answered), answer
        self._cohort.engine.remember(answer)
        if answer.spooled:
            try:
                return wire.Spooled(self._out)
            except HansaError as error:
                return Absence(self._site, "lost", error.message)
        return Update(
            answer.site,
            answer.round,
            answer.version,
            {},
            answer.weight,
            answer.sums,
            answer.completed,
            answer.seconds,
            answer.logged,
        )
