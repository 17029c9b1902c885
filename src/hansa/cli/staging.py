# SPDX-License-Identifier: Apache-2.0
"""``hansa lab``: a job on a federation that exists for it alone, with the view that ``hansa run`` gives."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from hansa.cli import console, live, running
from hansa.core import config
from hansa.errors import InterruptedRunError
from hansa.lab import Lab, lab
from hansa.lab import down as take_down


def up(
    file: Path, overrides: Sequence[str], *, sites: int | None, directory: Path | None, keep: bool, as_json: bool
) -> None:
    """Bring a federation up, run the job of ``file`` on it, show what it gave, and take it down.

    Raises:
        HansaError: of the kind that says what went wrong; nothing is left running.
    """
    job = config.load(file, overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the lab in good order
    to = console.err()
    try:
        with (
            live.shown(to, job) as progress,
            lab(job, sites=sites, directory=directory, keep=keep, progress=progress) as federation,
        ):
            finished = federation.run(progress)
            if not keep:
                progress.stage("taking the federation down", 0)
    except (KeyboardInterrupt, InterruptedRunError):
        raise InterruptedRunError("Stopped; the federation is down. Its job is not finished.") from None
    if as_json:
        console.emit({**running.document(finished), "lab": _document(federation) if keep else None})
        return
    running.tell(console.out(), finished)
    if keep:
        _tell(federation)


def _document(federation: Lab) -> dict[str, Any]:
    return {
        "directory": str(federation.directory),
        "address": federation.address,
        "kit": str(federation.user),
        "processes": {name: federation.pid(name) for name in federation.names},
    }


def _tell(federation: Lab) -> None:
    to = console.out()
    to.print()
    for name, value in (
        ("server", federation.address),
        ("sites", ", ".join(federation.sites)),
        ("folder", str(federation.directory)),
    ):
        to.print(Text.assemble((f"  {name:<8}", "dim"), value), soft_wrap=True)
    to.print()
    to.print("The federation is still up. To talk to it, and to end it:")
    to.print(Text(f"  export HANSA_KIT={federation.user}\n  hansa sites; hansa job list"), soft_wrap=True)
    to.print(Text(f"  hansa lab down {federation.directory}"), soft_wrap=True)


def down(directory: Path, *, as_json: bool) -> None:
    """End the processes of a federation that was kept."""
    ended = take_down(directory)
    if as_json:
        console.emit({"directory": str(directory.absolute()), "ended": ended})
    else:
        what = f"Ended: {', '.join(ended)}." if ended else "Nothing was running."
        console.out().print(Text(f"{what} The folder {directory} is left."), soft_wrap=True)
