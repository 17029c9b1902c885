# SPDX-License-Identifier: Apache-2.0
"""``hansa runs`` and ``hansa report``: what earlier runs came to."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hansa.cli import console
from hansa.cli.running import comparison, comparison_table
from hansa.errors import HansaError
from hansa.runs.run import Run, find_run, list_runs
from hansa.sinks import report as pages
from hansa.sinks.summary import summary
from hansa.sinks.text import number

_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "killed": "yellow"}


def runs(folder: Path, *, as_json: bool) -> None:
    """List the runs in a folder, oldest first."""
    entries = [_entry(run) for run in list_runs(folder)]
    if as_json:
        console.emit(entries)
        return
    to = console.out()
    if not entries:
        to.print(Text(f"There are no runs in {folder}. `hansa run JOB.toml` makes one."), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE, header_style="dim")
    for title in ("run", "job", "state", "rounds", "metric", "started"):
        table.add_column(title, justify="right" if title == "rounds" else "left", no_wrap=title == "run")
    for entry in entries:
        metric = f"{entry['metric']} {number(entry['value'])}" if entry["metric"] else ""
        metric = entry["error"].splitlines()[0] if entry["error"] and not metric else metric
        state = Text(entry["state"], _STYLES.get(entry["state"], ""))
        rounds = f"{entry['rounds']}/{entry['planned']}"
        started = entry["started"][:19].replace("T", " ")
        table.add_row(Text(entry["run"]), Text(entry["job"]), state, rounds, Text(metric), started)
    to.print(table)


def _entry(run: Run) -> dict[str, Any]:
    """Return a run as JSON types; one whose files can't be read is listed with the reason."""
    status = run.status
    try:
        report = run.report
    except HansaError as error:
        report = {"job": {"name": "", "rounds": 0}, "rounds": [], "baselines": {}}
        status["error"] = str(error)
    found = summary(report) if report["rounds"] else None
    federated = found.row("federated") if found else None
    return {
        "run": run.id,
        "job": report["job"]["name"],
        "state": run.state,
        "rounds": len(report["rounds"]),
        "planned": report["job"]["rounds"],
        "metric": found.metric if found and federated else None,
        "value": federated.everyone if federated else None,
        "started": status["started"],
        "error": status.get("error"),
        "directory": str(run.directory.absolute()),
    }


def report(folder: Path, name: str, *, as_json: bool, show: bool) -> None:
    """Write ``report.html`` of a run again, from what is on disk; of an unfinished run, what is known so far."""
    found = find_run(folder, name)
    values = found.report
    path = pages.write(found.directory, values)
    compared = summary(values)
    if as_json:
        finished = (found.directory / "report.json").exists()
        console.emit({"report": str(path.absolute()), "finished": finished, "comparison": comparison(compared)})
    else:
        to = console.out()
        if compared is not None:
            to.print(comparison_table(compared, values))
        to.print(Text(str(path)), soft_wrap=True)
    if show:
        webbrowser.open(path.absolute().as_uri())
