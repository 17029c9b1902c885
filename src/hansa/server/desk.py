# SPDX-License-Identifier: Apache-2.0
"""What a running server knows of its sites at this moment: who is there, what they are at, who has news to fetch.

Nothing here outlives the process; what must is in the store. Methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hansa.transport.messages import Activity


@dataclass
class _Site:
    sequence: int = 1
    heard: float | None = None
    release: str = ""
    streams: int = 0
    activities: dict[str, tuple[float, Activity]] = field(default_factory=dict)
    waiting: set[asyncio.Event] = field(default_factory=set)


class Desk:
    """The doorbells, and the last sign of life of every site."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._sites: dict[str, _Site] = {}
        self._listeners: dict[str, Callable[[], object]] = {}

    def _site(self, name: str) -> _Site:
        return self._sites.setdefault(name, _Site())

    def ring(self, sites: Iterable[str]) -> None:
        """Tell sites that there is news for them."""
        with self._lock:
            events: set[asyncio.Event] = set()
            for name in sites:
                site = self._site(name)
                site.sequence += 1
                events |= site.waiting

        def news() -> None:
            for event in events:
                event.set()

        self._loop.call_soon_threadsafe(news)

    def sequence(self, site: str) -> int:
        """Return the number of the last news for ``site``."""
        with self._lock:
            return self._site(site).sequence

    async def news(self, site: str, since: int, wait_s: float) -> int:
        """Wait until there is news after ``since``, at most ``wait_s``; return the last one's number."""
        event = asyncio.Event()
        with self._lock:
            self._site(site).waiting.add(event)
        try:
            if self.sequence(site) == since:
                async with asyncio.timeout(wait_s):
                    await event.wait()
        except TimeoutError:
            pass
        finally:
            with self._lock:
                self._site(site).waiting.discard(event)
        return self.sequence(site)

    def heard(self, site: str, release: str = "") -> None:
        """Note a sign of life."""
        with self._lock:
            entry = self._site(site)
            entry.heard = time.monotonic()
            entry.release = release or entry.release

    def attending(self, site: str, change: int) -> None:
        """Note that a doorbell's stream began (1) or ended (-1)."""
        with self._lock:
            self._site(site).streams += change

    def report(self, site: str, activities: Iterable[Activity]) -> None:
        """Note what a site is at."""
        now = time.monotonic()
        with self._lock:
            self._site(site).activities = {item.task: (now, item) for item in activities}

    def silent_s(self, site: str) -> float:
        """Return for how long a site was not heard from; one that never was counts from the server's start."""
        with self._lock:
            heard = self._site(site).heard
        return time.monotonic() - (self._begun if heard is None else heard)

    def worked_s(self, site: str, task: str) -> float:
        """Return for how long a site has worked on a task, by its own clock and what has passed since it told."""
        with self._lock:
            told, activity = self._site(site).activities.get(task, (0.0, None))
        if activity is None or activity.phase not in ("working", "sending"):
            return 0.0
        return activity.seconds + (time.monotonic() - told if activity.phase == "working" else 0.0)

    def seen(self, site: str) -> tuple[float | None, str, bool, list[Activity]]:
        """Return seconds since the site was heard from, its release, whether it attends, and what it is at now."""
        now = time.monotonic()
        with self._lock:
            entry = self._site(site)
            since = None if entry.heard is None else now - entry.heard
            said = entry.activities.values()
            doing = [Activity(item.task, item.phase, item.seconds + now - told, item.why) for told, item in said]
            return since, entry.release, entry.streams > 0, doing

    def connected(self, lease_s: float) -> int:
        """Return how many sites attend or were heard from within the lease."""
        now = time.monotonic()
        with self._lock:
            return sum(
                site.streams > 0 or (site.heard is not None and now - site.heard <= lease_s)
                for site in self._sites.values()
            )

    def listen(self, job: str, callback: Callable[[], object] | None) -> None:
        """Have ``callback`` called, in the server's loop, whenever an answer for ``job`` is durable; None ends it."""
        with self._lock:
            if callback is None:
                self._listeners.pop(job, None)
            else:
                self._listeners[job] = callback

    def answered(self, job: str) -> None:
        """Tell the job that an answer is durable."""
        with self._lock:
            callback = self._listeners.get(job)
        if callback is not None:
            callback()
