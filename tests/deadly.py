# SPDX-License-Identifier: Apache-2.0
"""Sites of a lab whose agents end themselves by SIGKILL, once in each phase of a secret sum.

:func:`doomed` names them in a folder, a file each; an agent that comes to such a phase removes the file and is gone,
when its state is durable and its answer is not.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hansa import lab

_FOLDER = "HANSA_TEST_DEATHS"


def doomed(monkeypatch, folder: Path, site: str, phases: Sequence[str]) -> Path:
    """Have the agent of ``site`` die in ``phases``, in labs made from here on; return what is left of those."""
    folder.mkdir()
    for phase in phases:
        (folder / f"{site} {phase}").touch()
    begin = "from hansa.lab import attend;"
    assert begin in lab._CODE, "what a lab's processes begin with"
    monkeypatch.setenv(_FOLDER, str(folder))
    monkeypatch.setattr(lab, "_CODE", lab._CODE.replace(begin, f"import deadly; deadly.prepare(); {begin}"))
    return folder


def prepare() -> None:
    """Be a process of such a lab."""
    if sys.argv[4] == lab.SERVER:
        return
    from hansa.site import joined

    exchange, perform = joined.JoinedJob._exchange, joined.JoinedJob._perform

    async def deadly_exchange(self, connection, job, given):
        answer = await exchange(self, connection, job, given)
        _die(self._site, given.kind)
        return answer

    async def deadly_perform(self, job, given, *rest):
        answer = await perform(self, job, given, *rest)
        _die(self._site, given.kind)
        return answer

    joined.JoinedJob._exchange, joined.JoinedJob._perform = deadly_exchange, deadly_perform


def _die(site: str, phase: str) -> None:
    due = Path(os.environ[_FOLDER]) / f"{site} {phase}"
    if due.exists():
        due.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
