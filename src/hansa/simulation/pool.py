# SPDX-License-Identifier: Apache-2.0
"""Worker processes and who gets one next: started afresh, never forked, replaced when they die.

| case | result |
|---|---|
| a site waits | it gets a worker that served it before, if one is free; a new site goes before one at home elsewhere |
| three workers in a row end before they are ready | no more are started; what waits is refused with the cause |
| sites wait, and overdue ones hold all places | the longest overdue is ended: at once where late updates are
  discarded, else after ``PATIENCE`` more deadlines |
| the program trains out of sight (OPAQUE_STEPS) | a site never changes its worker, because its state may live there |
| the engine's process is killed | the socket closes, and every worker ends with all it started |
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hansa.core.config import Job
from hansa.core.fit import Trait
from hansa.errors import HansaError, SiteError
from hansa.simulation.shares import Machine, Share
from hansa.workers.messages import Close, Ready, Start
from hansa.workers.worker import Devices, Worker

PATIENCE = 4
"""How many more deadlines an overdue site keeps its place while others wait, if late updates are accepted."""

MAX_FAILED_STARTS = 3

_CLOSE_S = 20.0


class PoolWorker(Worker):
    """A worker in the pool: its slot, the place it works in, and the sites at home in it."""

    def __init__(self, slot: int, devices: Devices, threads: int, log: Path) -> None:
        super().__init__(threads, log, devices)
        self.slot = slot
        self.place: Place | None = None
        self.served: set[str] = set()
        self.own: dict[Waiter, None] = {}

    @property
    def idle(self) -> bool:
        """Whether it could start something now."""
        return self.ready and self.place is None and self.ending is None


class Place:
    """A worker and a share of the machine, held by one site."""

    def __init__(self, worker: PoolWorker, share: Share) -> None:
        self.worker = worker
        self.share = share
        self.evict_at: float | None = None


class Waiter:
    """Something that waits for a place. ``start`` is called with it, or ``refuse`` with the reason."""

    def __init__(
        self,
        site: str | None,
        share: Share,
        slot: int | None,
        start: Callable[[Place], object],
        refuse: Callable[[HansaError], object],
    ) -> None:
        self.site = site
        self.share = share
        self.slot = slot
        self.start = start
        self.refuse = refuse


class Pool:
    """The workers of one job."""

    def __init__(self, job: Job, directory: Path, machine: Machine) -> None:
        self._job = job
        self._directory = directory
        self._machine = machine
        self.workers: list[PoolWorker] = []
        self._retired: list[PoolWorker] = []
        self._waiting: dict[Waiter, None] = {}
        self._fresh: dict[Waiter, None] = {}
        self._limit = 1
        self._slots: dict[str, int] = {}
        self._failed_starts = 0
        self._failure: Exception | None = None
        self._closing = False
        self._news = asyncio.Event()
        self._first: Ready | None = None

    async def open(self) -> tuple[Sequence[str], frozenset[Trait]]:
        """Start workers, and return the program's sites and traits as soon as one is ready.

        How many there will be is known only then, so at first no more than two are started.
        """
        first = next((self._machine.share(site) for site in sorted(self._job.engine.sites)), self._machine.share(None))
        devices = self._machine.devices(first)
        wanted = self._job.engine.workers or self._machine.room()
        for slot in range(min(2, wanted) if devices is None else 1):
            self._start(devices, slot)
        while self._first is None:
            if isinstance(self._failure, SiteError):
                raise SiteError(f"The program could not be started: {self._failure.message}.", job=self._job.name)
            if self._failure is not None:
                raise self._failure
            await self._next_news()
        sites = tuple(sorted(self._first.sites))
        traits = frozenset(Trait[name] for name in self._first.traits)
        self._limit = min(wanted, max(1, len(sites)))
        if Trait.OPAQUE_STEPS in traits:
            self._slots = {site: i % self._limit for i, site in enumerate(sites)}
        self.workers.sort(key=lambda worker: not worker.ready)
        for worker in self.workers[self._limit :]:
            self._retire(worker)
        for slot, worker in enumerate(self.workers):
            worker.slot = slot
        if devices is None:
            for slot in range(len(self.workers), self._limit):
                self._start(None, slot)
        return sites, traits

    async def close(self) -> None:
        """End every worker: idle ones close their program first, others are killed."""
        self._closing = True
        everyone = [*self.workers, *self._retired]
        for worker in self.workers:
            if worker.idle:
                worker.send(Close())
            else:
                worker.kill("the run was stopped")
        try:
            if everyone:
                await asyncio.wait([w.serving for w in everyone if w.serving], timeout=_CLOSE_S)
        finally:
            for worker in everyone:
                worker.kill("the run was stopped")
        await asyncio.gather(*(w.serving for w in everyone if w.serving))

    def submit(
        self, site: str | None, start: Callable[[Place], object], refuse: Callable[[HansaError], object]
    ) -> Waiter:
        """Queue for a place; ``start`` gets it, or ``refuse`` the reason why there is none."""
        waiter = Waiter(site, self._machine.share(site), self._slots.get(site) if site else None, start, refuse)
        self._waiting[waiter] = None
        homes = [worker for worker in self.workers if site in worker.served]
        for worker in homes:
            worker.own[waiter] = None
        if not homes:
            self._fresh[waiter] = None
        self._pump()
        if not self.workers:
            self._refuse_all()
        return waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Leave the queue; nothing happens if the place was given already."""
        self._waiting.pop(waiter, None)
        self._fresh.pop(waiter, None)
        for worker in self.workers:
            worker.own.pop(waiter, None)

    def leave(self, place: Place) -> None:
        """Give a place back."""
        place.worker.place = None
        self._machine.give(place.share, place.worker.devices)
        self._pump()

    def overdue(self, place: Place, deadline_s: float) -> None:
        """Note that what runs in ``place`` has missed its deadline."""
        patience = 0.0 if self._job.cohort.late == "discard" else PATIENCE * deadline_s
        place.evict_at = time.monotonic() + patience
        self._pump()

    async def any_worker(self) -> PoolWorker:
        """Return a worker that is ready, an idle one if there is one."""
        while True:
            ready = [worker for worker in self.workers if worker.ready]
            if ready:
                return min(ready, key=lambda worker: not worker.idle)
            if not self.workers and self._failure is not None:
                raise self._failure
            await self._next_news()

    async def _next_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _pump(self) -> None:
        """Give places to those who wait, as far as shares and workers go round."""
        if self._closing:
            return
        for worker in self.workers:
            waiter = self._choose(worker) if worker.idle else None
            if waiter is not None:
                self.withdraw(waiter)
                self._machine.take(waiter.share, worker.devices)
                worker.place = Place(worker, waiter.share)
                if waiter.site:
                    worker.served.add(waiter.site)
                waiter.start(worker.place)
        self._grow()
        self._evict()

    def _choose(self, worker: PoolWorker) -> Waiter | None:
        for queue in (worker.own, self._fresh, reversed(self._waiting)):
            for waiter in queue:
                if waiter.slot in (None, worker.slot) and self._machine.fits(waiter.share, worker.devices):
                    return waiter
        return None

    def _grow(self) -> None:
        """Start workers for those who wait although their share is free, in place of idle ones if need be."""
        for waiter in self._waiting:
            idle = [worker for worker in self.workers if worker.idle]
            if self._failed_starts >= MAX_FAILED_STARTS or (len(self.workers) >= self._limit and not idle):
                return
            devices = self._machine.devices(waiter.share, [worker.devices for worker in self.workers])
            slot = self._free_slot() if waiter.slot is None else waiter.slot
            coming = (w for w in self.workers if not w.ready and w.devices == devices)
            if not self._machine.fits(waiter.share, devices) or any(waiter.slot in (None, w.slot) for w in coming):
                continue
            there = [worker for worker in self.workers if worker.slot == slot]
            if there or len(self.workers) >= self._limit:
                unfit = next((worker for worker in idle if not there or worker in there), None)
                if unfit is None:
                    continue
                slot = unfit.slot
                self._retire(unfit)
            self._start(devices, slot)

    def _free_slot(self) -> int:
        taken = {worker.slot for worker in self.workers}
        return next(slot for slot in itertools.count() if slot not in taken)

    def _start(self, devices: Devices, slot: int) -> PoolWorker:
        worker = PoolWorker(slot, devices, self._job.engine.threads, self._directory / "sites.log")
        self.workers.append(worker)
        start = Start(self._job.to_json(), str(self._directory.absolute()))
        worker.serving = asyncio.create_task(worker.serve(start, self._on_ready))
        worker.serving.add_done_callback(lambda _: self._on_end(worker))
        return worker

    def _on_ready(self, ready: Ready) -> None:
        self._failed_starts = 0
        self._first = self._first or ready
        self._news.set()
        self._pump()

    def _on_end(self, worker: PoolWorker) -> None:
        self._news.set()
        if worker in self._retired:
            self._retired.remove(worker)
            return
        self.workers.remove(worker)
        if self._closing:
            return
        if not worker.started:
            self._failed_starts += 1
        self._failure = worker.failure
        if self._first is None or self._failed_starts >= MAX_FAILED_STARTS:
            if not self.workers:
                self._refuse_all()
            return
        self._start(worker.devices, worker.slot)
        self._pump()

    def _refuse_all(self) -> None:
        cause = self._failure.message if isinstance(self._failure, HansaError) else str(self._failure)
        for waiter in list(self._waiting):
            self.withdraw(waiter)
            waiter.refuse(SiteError(f"no worker can be started any more: {cause}", job=self._job.name))

    def _retire(self, worker: PoolWorker) -> None:
        """End a worker that does nothing."""
        self.workers.remove(worker)
        self._retired.append(worker)
        if worker.idle:
            worker.send(Close())
        else:
            worker.kill("there is no use for it")

    def _evict(self) -> None:
        """End the longest overdue, if others wait and nothing but overdue work holds the machine."""
        busy = [worker.place for worker in self.workers if worker.place is not None]
        if not self._waiting or not busy or any(not worker.ready for worker in self.workers):
            return
        ends = [(place.evict_at, place.worker) for place in busy if place.evict_at is not None]
        if len(ends) < len(busy):
            return
        when, worker = min(ends, key=lambda end: end[0])
        if when <= time.monotonic():
            worker.kill("its time was up long ago, and other sites were waiting for its place")
        else:
            asyncio.get_running_loop().call_later(when - time.monotonic() + 0.01, self._pump)
