# SPDX-License-Identifier: Apache-2.0
"""``hansa run``: from the words on the command line to a finished run, and what is said of it at the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hansa.cli import console, live
from hansa.core import config
from hansa.core.config import Job
from hansa.errors import InterruptedRunError, JobError
from hansa.runs import run as runs
from hansa.runs.progress import Progress
from hansa.runs.run import Run
from hansa.simulation.run import carry_out as simulate
from hansa.sinks.summary import Summary, federated_round, summary
from hansa.sinks.text import duration, number, size

JOB_FILES = (".toml", ".yaml", ".yml", ".json")


def run(words: Sequence[str], overrides: Sequence[str], *, resume: bool, as_json: bool) -> None:
    """Carry out what the command line asks for.

    Args:
        words: a job file, a run to resume, both, or neither.
        overrides: ``a.b=value`` changes to the job file.
        resume: whether to go on with an earlier run.
        as_json: whether to write one JSON document to stdout.
    """
    job, name = _asked(words, overrides, resume)
    finished = carry_out(job, resume=name if resume else False)
    if as_json:
        console.emit(document(finished))
    else:
        tell(console.out(), finished)


def carry_out(job: Job, *, resume: bool | str = False) -> Run:
    """Run a job with its progress on stderr; Ctrl-C ends it after the site at work, a second one at once.

    Raises:
        HansaError: of the kind that says what went wrong; finished rounds are on disk.
    """
    to = console.err()

    async def watched(progress: Progress) -> Run:
        task = asyncio.current_task()
        assert task is not None, "this is a task's own coroutine"

        def stop() -> None:
            if task.done() or task.cancelling():
                to.show_cursor()
                os._exit(InterruptedRunError.exit_code)  # training threads would hold up any other end
            progress.say("Stopping when the site at work is done. Ctrl-C again stops at once.")
            task.cancel()

        for kind in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(kind, stop)
        return await simulate(job, resume, progress)

    with live.shown(to, job) as progress:
        return asyncio.run(watched(progress))


def _asked(words: Sequence[str], overrides: Sequence[str], resume: bool) -> tuple[Job, bool | str]:
    """Return the job, and which run of it to go on with (True for its last unfinished one)."""
    files = [word for word in words if Path(word).suffix.lower() in JOB_FILES]
    names = [word for word in words if word not in files]
    if len(files) > 1 or len(names) > 1 or (names and not resume):
        if names and not resume and runs.is_run(Path(names[0])):
            raise JobError(f"{names[0]!r} is a run. `hansa run --resume {names[0]}` goes on with it.")
        wrong = names[0] if names and not resume else words[1]
        raise JobError(f"hansa run takes one .toml, .yaml or .json job; {wrong!r} is another thing.")
    if files:
        job = config.load(Path(files[0]), overrides)
        return job, names[0] if names else True
    if not resume:
        raise JobError("Which job? `hansa run JOB.toml` runs one, and `hansa init` writes one.")
    if overrides:
        raise JobError("--set changes a job file, and a resumed run keeps its job. Leave it out, or start a new run.")
    found = runs.find_run(Path("runs"), names[0]) if names else runs.last_unfinished(Path("runs"))
    return found.job, str(found.directory)


def document(finished: Run) -> dict[str, Any]:
    """Return what ``--json`` writes of a finished run."""
    report = finished.report
    return {
        "run": finished.id,
        "directory": str(finished.directory.absolute()),
        "state": finished.status["state"],
        "rounds": len(report["rounds"]),
        "seconds": report["seconds"],
        "model": report["model"],
        "comparison": comparison(summary(report)),
        "files": {name: str(path.absolute()) for name, path in _files(finished.directory).items()},
    }


def comparison(found: Summary | None) -> dict[str, Any] | None:
    """Return a comparison as JSON types."""
    if found is None:
        return None
    return {
        "metric": found.metric,
        "better": "lower" if found.mode == "min" else "higher",
        "sites": list(found.sites),
        "rows": {row.name: {"own": row.own, "everyone": row.everyone, "sites": row.sites} for row in found.rows},
    }


def tell(to: Console, finished: Run) -> None:
    """Print the comparison, where everything is, and what to do next."""
    report = finished.report
    found = summary(report)
    to.print()
    if found is not None:
        to.print(comparison_table(found, report))
        _explain(to, found)
    to.print()
    for name, path in _files(finished.directory).items():
        to.print(Text.assemble((f"  {name:<8}", "dim"), str(path)), soft_wrap=True)
    sent = sum(r["bytes_down"] + r["bytes_up"] for r in report["rounds"])
    rounds = len(report["rounds"])
    moved = f", {size(sent)} sent" if sent else ""  # a report that hides cohorts does not tell
    to.print(Text(f"  {rounds} rounds{moved}, {duration(report['seconds'])}", "dim"))
    to.print()
    to.print(Text(_next(finished.directory)), soft_wrap=True)


def comparison_table(found: Summary, report: Mapping[str, Any]) -> Table:
    """Return the comparison for a terminal; the best of each column is bold."""
    better = "lower is better" if found.mode == "min" else "higher is better"
    record = federated_round(report)
    after = f", round {record['round']}" if record else ""
    title = f"{found.metric} on held-out data ({better})"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, header_style="dim", padding=(0, 1)
    )
    table.add_column("model")
    table.add_column("sites' own", justify="right")
    table.add_column("everyone's", justify="right")
    for row in found.rows:
        cells = [
            Text(number(value), "bold green" if found.best(column) == row.name else "")
            for column, value in (("own", row.own), ("everyone", row.everyone))
        ]
        table.add_row(row.title + (after if row.name == "federated" else ""), *cells)
    return table


def _explain(to: Console, found: Summary) -> None:
    lines = [f"own: mean over {len(found.sites)} sites; everyone's: all sites' held-out data pooled"]
    if found.row("local"):
        lines[0] += "; local only: mean over the sites' models"
    if found.row("central"):
        lines.append("central: all data in one place, the ceiling; not part of the comparison for best")
    if found.left_out:
        lines.append(f"left out of own, not judged for every model: {', '.join(found.left_out)}")
    for line in lines:
        to.print(Text(f"  {line}", "dim"))


def _files(directory: Path) -> dict[str, Path]:
    names = {"report": "report.html", "numbers": "report.json", "model": "model", "adapter": "adapter"}
    return {name: directory / file for name, file in names.items() if (directory / file).exists()}


def _next(directory: Path) -> str:
    files = _files(directory)
    steps = []
    if "report" in files:
        steps.append(f"open {files['report']}")
    else:
        steps.append(f"pip install 'hansa[report]' && hansa report {directory} for a page with plots")
    if "model" in files:
        steps.append("load the model directory with its library's from_pretrained")
    return f"Next: {'; '.join(steps)}."
