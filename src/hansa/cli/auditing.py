# SPDX-License-Identifier: Apache-2.0
"""``hansa audit privacy``: attacks on a job or a run, and what is said of them at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hansa import registry
from hansa.audit import report
from hansa.audit.audit import Audit, carry_out
from hansa.audit.finding import Finding, Measure
from hansa.audit.subject import opened
from hansa.cli import console, live
from hansa.cli.running import JOB_FILES
from hansa.core import config
from hansa.core.config import Job
from hansa.errors import AuditError, JobError
from hansa.runs.run import Run, find_run
from hansa.sinks.text import duration, number

_STYLES = {"holds": "green", "leaks": "yellow", "fails": "bold red"}


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; see :func:`hansa.cli.audit.privacy`."""

    target: str
    attacks: Sequence[str]
    overrides: Sequence[str]
    seed: int
    out: Path | None
    folder: Path


def audit(wish: Wish, *, as_json: bool) -> None:
    """Attack, write the report, and say what was found.

    Raises:
        AuditError: a promise is broken; the report is written.
        HansaError: of the kind that says why the job can't be attacked.
    """
    job, run = _asked(wish)
    for name in wish.attacks:
        registry.load("attacks", name)
    to = wish.out or (Path(job.output.dir) / f"{job.name}-audit" if run is None else run.directory / "audit")
    with live.shown(console.err(), job) as progress:
        progress.stage("loading the job and its data", 0)
        with opened(job, run) as subject:
            found = carry_out(subject, wish.attacks or registry.names("attacks"), wish.seed, progress)
        written = report.write(to, found, progress)
    if as_json and not found.broken:
        console.emit({**found.as_json(), "files": {name: str(path.absolute()) for name, path in written.items()}})
    elif not as_json:
        tell(console.out(), found, written)
    if found.broken:
        lines = "\n".join(f"  {line}" for line in found.broken)
        where = written.get("report", written["numbers"])
        raise AuditError(f"A privacy promise is broken:\n{lines}\nThe report is {where}.", job=job.name)


def _asked(wish: Wish) -> tuple[Job, Run | None]:
    if Path(wish.target).suffix.lower() in JOB_FILES:
        return config.load(Path(wish.target), wish.overrides), None
    run = find_run(wish.folder, wish.target)
    if wish.overrides:
        raise JobError("--set changes a job file, and a run is audited as it was. Leave it out, or audit a job file.")
    return run.job, run


def tell(to: Console, found: Audit, written: Mapping[str, Path]) -> None:
    """Print what was found and where the report is."""
    for finding in found.findings:
        to.print()
        to.print(_table(finding))
        to.print(Text(finding.says), soft_wrap=True)
    to.print()
    for item in found.skipped:
        to.print(Text(f"{_capital(item.attack)}: not carried out. {item.because}", "dim"), soft_wrap=True)
    to.print()
    for name, path in written.items():
        to.print(Text.assemble((f"  {name:<8}", "dim"), str(path)), soft_wrap=True)
    to.print(Text(f"  {duration(found.seconds)}", "dim"))


def _table(finding: Finding) -> Table:
    title = Text.assemble(
        (_capital(finding.attack), "bold"), f", by {finding.adversary}: ", (finding.verdict, _STYLES[finding.verdict])
    )
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE, header_style="dim")
    table.add_column("measure")
    for name in ("found", "95 % interval", "guessing", "promised"):
        table.add_column(name, justify="right", no_wrap=True)
    for measure in finding.measures:
        table.add_row(Text(measure.name), *_cells(measure))
    return table


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cells(measure: Measure) -> tuple[Text, Text, Text, Text]:
    unit = f" {measure.unit}" if measure.unit else ""
    between = "" if measure.low is None or measure.high is None else f"{number(measure.low)} to {number(measure.high)}"
    value, baseline, bound = (
        Text("" if item is None else f"{number(item)}{unit}")
        for item in (measure.value, measure.baseline, measure.bound)
    )
    if measure.is_broken:
        value.stylize("bold red")
    return value, Text(between), baseline, bound
