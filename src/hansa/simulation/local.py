# SPDX-License-Identifier: Apache-2.0
"""The ``local`` engine: every site in this process, one after another, in the order of their names.

Sites stand for machines that work at the same time, so a deadline is held against each site's own time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from hansa import registry
from hansa.core import wire
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import SERVER, Handle, Peers, Program, Reply, SecureLine, SiteReport, topic
from hansa.core.tree import Parts, Tree
from hansa.core.values import Absence, Plan, Update
from hansa.workers.memory import Mailboxes
from hansa.workers.runner import Course, SimulatedLine, SiteRunner, num_threads, pin_threads

P = ParamSpec("P")
T = TypeVar("T")


class Local:
    """All sites in this process.

    Args:
        job: the resolved job.
        directory: the run's folder for memories, mail, spooled updates and error logs.
        program: the training code; built from the job's recipe by default.
    """

    needs_all = True

    def __init__(self, job: Job, directory: Path, program: Program | None = None) -> None:
        self._job = job
        self.directory = directory
        self._given = program
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Local:
        """Build the program. What recipes log of their sites goes to ``sites.log``."""
        self._log = logging.FileHandler(self.directory / "sites.log", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logging.getLogger("hansa").addHandler(self._log)
        logging.getLogger("hansa").setLevel(logging.INFO)
        if self._given is None:
            recipe = registry.load("recipes", self._job.recipe.name)
            self._program: Program = await self._do(None, recipe, self._job)
        else:
            self._program = self._given
        self.runner = SiteRunner(self._program, self.directory)
        self.sites: Sequence[str] = tuple(sorted(self._program.sites))
        self.traits: frozenset[Trait] = self._program.traits
        self.peers: Peers = LocalPeers(self.directory)
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Free the program, if it was built here."""
        try:
            if self._given is None:
                await asyncio.to_thread(self._program.close)
        finally:
            logging.getLogger("hansa").removeHandler(self._log)
            self._log.close()

    async def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        return await self._do(None, self._program.initial)

    async def inspect(self, site: str) -> SiteReport:
        """Check one site's data against the job."""
        return await self._do(site, self._program.inspect, site)

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        await self._do(None, self._program.export, params, directory)

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at: prompt -> what a model with ``params`` makes of it; or nothing."""
        return await self._do(None, self._program.show, params)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return self._program.summarise(sums)

    def cohort(self, course: Course) -> LocalCohort:
        """Return the sites of ``course`` as a workflow sees them."""
        return LocalCohort(self, course)

    async def perform(self, course: Course, plan: Plan, site: str) -> Update | Absence:
        """Carry ``plan`` out at ``site``."""
        return await self._do(site, self.runner.run, course, plan, site)

    async def _do(self, site: str | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` beside the event loop, one at a time, with the threads of ``site``."""
        found: list[T] = []  # a future's result would live on in its thread while the next site trains

        def pinned() -> None:
            pin_threads(num_threads(self._job.engine, site))
            found.append(function(*args, **kwargs))

        async with self._turn:
            await asyncio.to_thread(pinned)
        return found.pop()


class LocalCohort:
    """The port of the ``local`` engine."""

    def __init__(self, engine: Local, course: Course) -> None:
        self.sites: Sequence[str] = course.sites
        self._engine = engine
        self._course = course
        self._late: list[Handle] = []

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Carry ``plan`` out at each site in turn."""
        for site in sorted(sites):
            reply = await self._engine.perform(self._course, plan, site)
            if isinstance(reply, Update) and plan.deadline_s and reply.seconds > plan.deadline_s:
                yield self._postpone(plan, reply)
            else:
                yield reply
            del reply  # or it would be held while the next site trains

    def _postpone(self, plan: Plan, update: Update) -> Absence:
        if plan.task == "train":
            path = self._engine.directory / f"late.{plan.job}.{plan.round:06d}.{update.site}.hansa"
            self._late.append(wire.spool(update, path))
        reason = f"took {update.seconds:.2f} s, the deadline is {plan.deadline_s:g} s"
        return Absence(update.site, "late", reason)

    def late(self, round: int) -> Sequence[Handle]:
        """Return, and forget, the updates that overran their deadline."""
        late, self._late = self._late, []
        return late

    @property
    def secure(self) -> SecureLine | None:
        """The way of secure aggregation's messages."""
        return None if self._course.secure is None else SimulatedLine(self._engine.runner.secure, self._course)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return await self._engine.summarise(sums)


class LocalPeers:
    """Mailboxes in the run's folder."""

    def __init__(self, directory: Path) -> None:
        self._mail = Mailboxes(directory / "mail")

    async def put(self, plan: Plan, parts: Parts) -> None:
        """Let ``parts`` be the server's message."""
        await asyncio.to_thread(self._mail.put, SERVER, topic(plan.job, SERVER), plan.round, parts)

    async def send(self, plan: Plan, sender: str, recipient: str) -> None:
        """Put the message of ``sender`` into the mailbox of ``recipient``."""
        await asyncio.to_thread(self._mail.send, sender, recipient, topic(plan.job, sender))

    async def take(self, plan: Plan, sender: str) -> Parts:
        """Return what ``sender`` has sent to the server."""
        return await asyncio.to_thread(self._mail.take, SERVER, topic(plan.job, sender), plan.round)
