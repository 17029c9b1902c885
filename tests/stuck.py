# SPDX-License-Identifier: Apache-2.0
"""A site of a lab that stops in one phase of each job's secret sum, so that processes can be killed there.

Its agent goes no further when its state is durable and its answer is not said; its other jobs go on.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from hansa import lab

_FOLDER = "HANSA_TEST_STUCK"


class Stuck:
    """Where the agent of ``site`` is to stop, in labs made from here on.

    Args:
        folder: for notes that pass between the processes.
        phases: job's id -> phase.
    """

    def __init__(self, monkeypatch, folder: Path, site: str, phases: Mapping[str, str]) -> None:
        begin = "from hansa.lab import attend;"
        assert begin in lab._CODE, "what a lab's processes begin with"
        monkeypatch.setenv(_FOLDER, str(folder))
        monkeypatch.setattr(lab, "_CODE", lab._CODE.replace(begin, f"import stuck; stuck.prepare(); {begin}"))
        folder.mkdir()
        self._notes = [folder / _note(site, job, phase) for job, phase in phases.items()]
        for note in self._notes:
            note.touch()

    def wait(self) -> None:
        """Wait until it has stopped in every job."""
        while not all(note.read_text() for note in self._notes):
            threading.Event().wait(0.02)

    def release(self) -> None:
        """Have the agent stop nowhere, once it is started again."""
        for note in self._notes:
            note.unlink()


def prepare() -> None:
    """Be a process of such a lab."""
    if sys.argv[4] == lab.SERVER:
        return
    from hansa.site import joined

    exchange, perform = joined.JoinedJob._exchange, joined.JoinedJob._perform

    async def exchange_and_stop(self, connection, job, given):
        answer = await exchange(self, connection, job, given)
        await _stop(self._site, self.id, given.kind)
        return answer

    async def perform_and_stop(self, job, given, *rest):
        answer = await perform(self, job, given, *rest)
        await _stop(self._site, self.id, given.kind)
        return answer

    joined.JoinedJob._exchange, joined.JoinedJob._perform = exchange_and_stop, perform_and_stop


async def _stop(site: str, job: str, phase: str) -> None:
    note = Path(os.environ[_FOLDER]) / _note(site, job, phase)
    if note.exists():
        note.write_text("is there")
        await asyncio.Event().wait()


def _note(site: str, job: str, phase: str) -> str:
    return f"{site} {job} {phase}"
