# SPDX-License-Identifier: Apache-2.0
"""Jobs of a lab led through the phases of secure aggregation, so that real processes can be killed in any of them.

Before a site answers in a phase it makes its state durable, under a file lock of its own. Whoever has that lock holds
the site there: what was asked has come and is worked out (an update is trained), and nothing of it is written or said.
Where the others stand is read from the server's database.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import BinaryIO

import psutil

from hansa import bundle
from hansa.lab import SERVER, Lab
from hansa.pki.kit import Kit
from hansa.server.store import Store, TaskRow

PHASES = ("advertise", "share", "receive", "train", "vote", "reveal")
"""In the order of a round."""


class Led:
    """A job of one masked round that has just been submitted.

    Args:
        federation: the lab, whose server knows the job.
        id: the job's id.
        phase: where it is to be led to.
        sites: who is to be held there.
        gates: two others, one of which is held at a time on the way, so that no phase ends too soon.
    """

    def __init__(self, federation: Lab, id: str, phase: str, sites: Collection[str], gates: Collection[str]) -> None:
        self.id = id
        self._lab, self._sites, self._gates = federation, sites, gates
        self._path = PHASES[: PHASES.index(phase) + 1]
        self._held: dict[str, BinaryIO] = {}
        folder = federation.folder(SERVER) / "jobs" / id
        self._states = f"{bundle.read(folder / 'bundle.zip', Kit(federation.user).roster()).digest}.secagg"
        self._store = Store.view(None, federation.folder(SERVER))
        self._course = federation.federation.job(id).line.name
        self._hold_for(PHASES[0])

    def hold(self, *sites: str) -> None:
        """Hold sites that are at nothing now in the phase that is asked for next."""
        for site in sites:
            folder = self._lab.folder(site) / "work" / "history" / self._states / self._course
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._held[site] = (folder / f"{site}.lock").open("wb")
            fcntl.flock(self._held[site], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, *sites: str) -> None:
        """Let sites go on, all by default."""
        for site in sites or [*self._held]:
            self._held.pop(site).close()

    def close(self) -> None:
        """Release all, and let go of the database."""
        self.release()
        self._store.close()

    def rows(self, phase: str) -> Mapping[str, TaskRow]:
        """Return what the sites were last asked in a phase, by site."""
        found = self._store.tasks(self.id, phase)  # type: ignore[arg-type]
        return {row.site: row for row in found if (row.course, row.round) == (self._course, 1)}

    def sessions(self, site: str) -> int:
        """Return to how many sessions a site was asked, by its log; that of the round's evaluation is one of them."""
        return self._lab.log(site).read_text().count(f"begun (advertise, round 1 of {self.id})")

    def lead(self) -> Mapping[str, TaskRow]:
        """Wait until the job is where its sites alone have not answered, held there; return what all were asked."""
        for now, following in pairwise(self._path):
            self._waited(now)
            passed = [*self._held]
            self._hold_for(following)
            self.release(*passed)
        return self._waited(self._path[-1])

    def _hold_for(self, phase: str) -> None:
        gate = next(site for site in self._gates if site not in self._held)
        self.hold(*(self._sites if phase == self._path[-1] else [gate]))

    def _waited(self, phase: str) -> Mapping[str, TaskRow]:
        """Wait until all but those that are held have answered, and return the rows."""
        while True:
            rows = self.rows(phase)
            waiting = {site for site, row in rows.items() if row.state == "open"}
            if rows and waiting <= self._held.keys():
                assert waiting == self._held.keys(), f"{phase}: all but {sorted(waiting)} have answered"
                return rows
            line = self._lab.federation.job(self.id).line
            assert line.state in ("queued", "running"), f"the job {line.state} before {phase}: {line.error}"
            threading.Event().wait(0.05)


def kill(federation: Lab, *sites: str) -> None:
    """End sites by SIGKILL: their agents, then what worked for them."""
    workers = [child for site in sites for child in psutil.Process(federation.pid(site)).children(recursive=True)]
    for site in sites:
        federation.kill(site)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
