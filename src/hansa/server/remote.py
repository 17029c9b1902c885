# SPDX-License-Identifier: Apache-2.0
"""Engine ``remote``: the sites of a federation, asked through the server's store and doorbells.

A plan is encoded once, whatever the number of sites, and lies in the job's folder under the address of its pieces.
Asked for again, after a restart say, the same plan is the same task, and what was accepted is not asked for again:

    ask ── open tasks in the store, ring ──>  site: agenda, plan, work  ── answer, durable ──> store ──> ask yields it

Updates stay on disk until a later round begins, for only then is the checkpoint that holds them durable.

| case | result |
|---|---|
| a site is not heard from for the lease | ``lost``; it may come back in a later round |
| a site overruns the plan's deadline, by its own clock | ``late``; by policy its update is taken in a later round |
| a site's update is not what it was asked for | ``rejected``, with the reason |
| the server is killed | the same tasks with the same answers, after the restart |
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.core.ports import Handle, Phase, Reply, SecureLine, SiteReport
from hansa.core.tree import Tree
from hansa.core.values import Absence, Plan, Task
from hansa.core.workflow import aside
from hansa.errors import HansaError, PolicyError, SiteError, StorageError
from hansa.pki.identities import Identities
from hansa.server.blobs import Blobs
from hansa.server.compute import Compute
from hansa.server.desk import Desk
from hansa.server.mail import RemotePeers, absence
from hansa.server.store import Store, TaskKind, TaskRow
from hansa.transport import describing
from hansa.transport.messages import Inspected, Missing
from hansa.transport.pieces import Manifest, describe
from hansa.workers.runner import Course

MAIL = "mail"
"""The folder, in a job's for what passes, of notes of the messages between its sites."""

_TICK_S = 0.5
_SETTLE_S = 0.25
"""How long an answer may be on its way from a site before the site counts as overdue."""


class Remote:
    """The sites of one job.

    Args:
        id: the job's id.
        job: the job, its files in place, as the server's own worker runs it.
        directory: the job's folder for plans, updates, and what passes to the worker.
        sites: who takes part.
        compute: the worker beside the server, not yet entered.
        store, blobs: what is durable.
        desk: the doorbells.
        lease_s: how long a site may be silent.
        allow: told a round, how many bytes its plan has and how many sites answer it with updates, before any of it
            is written; raises what speaks against it.
        masks: the digest of what was signed, and what tells the sites' signatures, for secure aggregation.
    """

    needs_all = False

    def __init__(
        self,
        id: str,
        job: Job,
        directory: Path,
        sites: Sequence[str],
        compute: Compute,
        store: Store,
        blobs: Blobs,
        desk: Desk,
        lease_s: float,
        allow: Callable[[int, int, int], object],
        masks: tuple[str, Identities],
    ) -> None:
        self.id = id
        self.job = job
        self.sites: Sequence[str] = tuple(sorted(sites))
        self.store = store
        self.desk = desk
        self.lease_s = lease_s
        self.allow = allow
        self.masks = masks
        self._directory = directory
        self._plans = directory / "plans"
        self._updates = directory / "updates"
        self._spares = storage.Spares(directory / storage.SPARES)
        self._compute = compute
        self._blobs = blobs
        self._news = asyncio.Event()
        self._metrics: dict[frozenset[tuple[str, float]], dict[str, float]] = {}
        self._announced: set[str] = set()  # plans that are there, and whose tasks are about to be
        self.peers = RemotePeers(self, directory / MAIL)

    async def __aenter__(self) -> Remote:
        """Start the worker beside the server.

        Raises:
            HansaError: what the recipe raises.
        """
        for folder in (self._plans, self._updates):
            folder.mkdir(parents=True, exist_ok=True)
        self._spares.clear()
        self._sweep()
        await self._compute.__aenter__()
        loop = asyncio.get_running_loop()
        self.desk.listen(self.id, lambda: loop.call_soon_threadsafe(self._news.set))
        self.traits = self._compute.traits | {Trait.REMOTE}
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End the worker; what sites still work on stays on the agenda until the job's state says otherwise."""
        self.desk.listen(self.id, None)
        await self._compute.__aexit__()

    traits: frozenset[Trait]

    def _sweep(self) -> None:
        """Delete what came for tasks that nobody can answer any more, and is not their answer."""
        for path in self._updates.iterdir():
            row = self.store.task(path.name.partition(".")[0])
            is_open = row is not None and row.state in ("open", "late")
            if row is None or not (is_open or row.update == f"jobs/{self.id}/work/updates/{path.name}"):
                path.unlink(missing_ok=True)

    async def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        params = await self._compute.initial(self._directory / "initial.hansa")
        self.allow(0, trees.num_bytes(params), 0)
        return params

    async def inspect(self, site: str) -> SiteReport:
        """Have the site check the job against its policy and data.

        Raises:
            PolicyError: the site refuses, and why.
            SiteError: the site was not heard from, or could not.
        """
        async for row in self.answers(self.id, 0, "inspect", "", [site], None):
            if row.state == "done":
                told = msgspec.json.decode(row.answer, type=Inspected)
                return SiteReport(site, told.counts, told.labels)
            said = msgspec.json.decode(row.answer, type=Missing)
            raise (PolicyError if said.kind == "refused" else SiteError)(said.reason, site=site)
        raise AssertionError("every site that is asked is answered for")

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        await self._compute.export(params, directory)

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at: prompt -> what a model with ``params`` makes of it; or nothing."""
        return await self._compute.show(params)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics; those of the round at work are remembered."""
        key = frozenset(sums.items())
        if key not in self._metrics:
            if len(self._metrics) > 4 * len(self.sites) + 16:
                self._metrics.clear()
            self._metrics[key] = await self._compute.summarise(sums)
        return dict(self._metrics[key])

    def cohort(self, course: Course) -> RemoteCohort:
        """Return the sites of ``course`` as a workflow sees them."""
        return RemoteCohort(self, course)

    def kept(self, key: str) -> Kept:
        """Return an accepted update, from wherever it is kept."""
        return Kept(self._blobs.fetch(key))

    def publish(self, plan: Plan) -> str:
        """Put a plan where sites can fetch it, and return the address of its manifest.

        Raises:
            StorageError: the disk is full.
        """
        temporary = self._plans / f".{plan.job}.{plan.round}.{plan.task}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            self._spares.take(temporary)
            with storage.rewritten(temporary) as file:
                manifest = describing.write(file, wire.encoded_plan(plan))
            return self._announce(temporary, manifest)
        except OSError as error:
            raise storage.full(temporary, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def publish_letters(self, letters: Mapping[str, bytes]) -> dict[str, str]:
        """Put messages where sites can fetch them, and return the address of each one's manifest.

        Raises:
            StorageError: the disk is full.
        """
        digests: dict[bytes, str] = {}
        for letter in letters.values():
            if letter not in digests:
                temporary = self._plans / f".{hashlib.sha256(letter).hexdigest()}.tmp"
                try:
                    temporary.write_bytes(letter)
                    digests[letter] = self._announce(temporary, describe(temporary))
                except OSError as error:
                    raise storage.full(temporary, error) from error
                finally:
                    temporary.unlink(missing_ok=True)
        return {site: digests[letter] for site, letter in letters.items()}

    def publish_update(self, key: str, digest: str = "") -> str:
        """Put an accepted update where sites can fetch it, unless it is there already, and return its address.

        Raises:
            StorageError: the disk is full.
        """
        if not digest or not (self._plans / f"{digest}.manifest").exists():
            temporary = self._plans / f".{hashlib.sha256(key.encode()).hexdigest()}.tmp"
            path = self._blobs.fetch(key)
            try:
                temporary.unlink(missing_ok=True)
                storage.link(path, temporary)
                digest = self._announce(temporary, describe(temporary, wire.cuts(temporary)))
            except OSError as error:
                raise storage.full(temporary, error) from error
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def _announce(self, temporary: Path, manifest: Manifest) -> str:
        """Let a file be what sites fetch, and return the address of its manifest."""
        self._announced.add(manifest.digest)
        (self._plans / f"{manifest.digest}.manifest").write_bytes(manifest.encode())
        temporary.replace(self._plans / f"{manifest.digest}.hansa")
        return manifest.digest

    def forget(self, course: str, before: int) -> None:
        """Free the updates of rounds before ``before``, and the plans that nobody is asked for any more."""
        self.peers.forget(course, before)
        for key in self.store.forget(self.id, course, before):
            self._spares.give(self._blobs.path(key))
            self._blobs.delete(key)
        self._sweep()
        plans = list(self._plans.glob("*.hansa"))  # first: another course may be publishing one meanwhile
        announced = self._announced | self.peers.held()
        asked = {row.plan for row in self.store.tasks(self.id) if row.state in ("open", "late", "done")}
        for path in plans:
            if path.stem not in announced | asked:
                self._spares.give(path)
                path.with_suffix(".manifest").unlink(missing_ok=True)

    async def answers(
        self,
        course: str,
        round: int,
        kind: TaskKind,
        plan: str | Mapping[str, str],
        sites: Sequence[str],
        deadline_s: float | None,
        renewing: Task | None = None,
    ) -> AsyncGenerator[TaskRow, None]:
        """Ask ``sites`` and yield a row for each as soon as it is not open any more.

        Whatever ends this early leaves the tasks open: asked for again, after a restart or a full disk, they are the
        same tasks, and sites have gone on with them.
        """
        begun = time.monotonic()
        rows = self.store.open_tasks(self.id, course, round, kind, plan, sites, renewing)
        self._announced -= {plan} if isinstance(plan, str) else set(plan.values())
        self.desk.ring(sites)
        waiting = {row.task: row for row in rows.values()}
        while True:
            for row in sorted(waiting.values(), key=lambda row: row.site):
                settled = row if row.state != "open" else self._given_up(row, deadline_s, begun)
                if settled is not None:
                    del waiting[row.task]
                    yield settled
            if not waiting:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):  # not wait_for, which may swallow a cancellation (CPython 86296)
                    await self._news.wait()
            self._news.clear()
            now = self.store.tasks(self.id, kind)
            waiting |= {row.task: row for row in now if row.task in waiting}

    def _given_up(self, row: TaskRow, deadline_s: float | None, begun: float) -> TaskRow | None:
        """Close a task whose site has overrun its deadline or is gone, and return it; None while there is hope.

        A site counts the deadline from when it starts, but it may not put that off for longer than the lease.
        """
        bound_s = (self.job.cohort.deadline_s or math.inf) + self.lease_s
        if time.monotonic() - begun > bound_s:
            said = Missing("late", f"not done {bound_s:g} s after it was asked")
        elif deadline_s is not None and self.desk.worked_s(row.site, row.task) > deadline_s + _SETTLE_S:
            said = Missing("late", f"not done after the deadline of {deadline_s:g} s")
        elif self.desk.silent_s(row.site) > self.lease_s:
            said = Missing("lost", self._silence(row.site))
        else:
            return None
        state = "late" if self.job.cohort.late == "accept" and row.kind == "train" else "missing"
        self.store.answer(row.task, row.site, state, msgspec.json.encode(said))  # type: ignore[arg-type]
        self.desk.ring([row.site])
        return self.store.task(row.task)

    def _silence(self, site: str) -> str:
        since = self.desk.seen(site)[0]
        if since is None:
            return f"has never been heard from (the server waits {self.lease_s:g} s for a site)"
        return f"not heard from for {since:.0f} s (the server waits {self.lease_s:g} s for a site)"


class RemoteCohort:
    """The port of the ``remote`` engine."""

    def __init__(self, engine: Remote, course: Course) -> None:
        self.sites: Sequence[str] = course.sites
        self._engine = engine
        self._course = course

    async def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Ask sites to carry a plan out."""
        engine = self._engine
        if plan.task == "train":
            engine.forget(plan.job, plan.round)
            if plan.inbox is not None:
                plan = await asyncio.to_thread(engine.peers.addressed, plan, sites[0])
        num_bytes = sum(trees.num_bytes(tree) for tree in (plan.params, *plan.parts.values()))
        engine.allow(plan.round, num_bytes, len(sites) if plan.task == "train" else 0)
        digest = await aside(num_bytes, engine.publish, plan)
        answers = engine.answers(plan.job, plan.round, plan.task, digest, sorted(sites), plan.deadline_s)
        async with contextlib.aclosing(answers):
            async for row in answers:
                yield await self._checked(self._reply(row))

    async def _checked(self, reply: Reply) -> Reply:
        """Reject an update whose metrics can't be summed up: they would end the round for everybody."""
        if isinstance(reply, Absence) or not reply.header.sums:
            return reply
        try:
            await self._engine.summarise(reply.header.sums)
        except SiteError:
            raise
        except (HansaError, RuntimeError) as error:
            reason = str(error).strip().rpartition("\n")[2]
            return Absence(reply.header.site, "rejected", f"its metrics can't be summed up: {reason[:200]}")
        return reply

    def _reply(self, row: TaskRow) -> Reply:
        if row.state == "done":
            return self._engine.kept(row.update)
        if row.state == "overdue":
            return Absence(row.site, "late", "came after the deadline")
        return absence(row)

    def late(self, round: int) -> Sequence[Handle]:
        """Return the updates that came after their deadline and that ``round`` is to use."""
        rows = self._engine.store.overdue(self._engine.id, self._course.name, round)
        return [self._engine.kept(row.update) for row in rows]

    @property
    def secure(self) -> SecureLine | None:
        """The way of messages to the sites' agents."""
        return RemoteLine(self._engine)

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums into metrics."""
        return await self._engine.summarise(sums)


class RemoteLine:
    """The way of messages of secret sums: each is a task of the site's, and its answer the task's."""

    def __init__(self, engine: Remote) -> None:
        self._engine = engine

    @property
    def checker(self) -> Identities:
        """The server's roster."""
        return self._engine.masks[1]

    @property
    def scope(self) -> str:
        """The digest of what was signed."""
        return f"{self._engine.masks[0]}/"

    async def attempts(self, plan: Plan) -> int:
        """Return how many different sets of keys the round's sites were asked for, by the store."""
        engine = self._engine
        return engine.store.num_plans(engine.id, plan.job, plan.round, "advertise")

    async def exchange(self, plan: Plan, phase: Phase, letters: Mapping[str, bytes]) -> dict[str, bytes | Absence]:
        """Have the sites' agents answer; asked again with the same, they have answered already."""
        engine = self._engine
        digests = engine.publish_letters(letters)
        renewing = plan.task if phase in ("advertise", "accept") else None
        found: dict[str, bytes | Absence] = {}
        answers = engine.answers(plan.job, plan.round, phase, digests, sorted(letters), None, renewing)
        async with contextlib.aclosing(answers):
            async for row in answers:
                found[row.site] = row.answer if row.state == "done" else absence(row)
        return found


class Kept(wire.Spooled):
    """An accepted update; it stays on disk until the round that it is in is durable."""

    def release(self) -> None:
        """Leave the file: :meth:`Remote.forget` frees it."""


def update_key(job: str, task: str, digest: str = "") -> str:
    """Return the name, among the files that must survive, of the update that answers ``task``.

    Args:
        job, task: the names of both.
        digest: its manifest's, if it was uploaded; an answer names the very file that it means.
    """
    return f"jobs/{job}/work/updates/{task}.{digest}.hansa" if digest else f"jobs/{job}/work/updates/{task}.hansa"


def manifest_of(path: Path) -> Manifest:
    """Return the manifest beside a published plan.

    Raises:
        StorageError: it can't be read.
    """
    try:
        return Manifest.decode(path.with_suffix(".manifest").read_bytes())
    except OSError as error:
        raise StorageError(f"Can't read the manifest of {path}: {os.strerror(error.errno or 0)}.") from error
