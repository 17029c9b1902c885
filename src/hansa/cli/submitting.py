# SPDX-License-Identifier: Apache-2.0
"""What a person does with a federation from the command line: submit, look, stop, fetch, delete."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich import box
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from hansa.cli import console, live
from hansa.core import config
from hansa.errors import InterruptedRunError, JobError
from hansa.federation import ENDED, Federation, Moved, failure
from hansa.sinks.text import duration, number, size
from hansa.transport.messages import JobLine, JobView

STATES = {
    "queued": "",
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "aborted": "yellow",
    "connected": "green",
    "gone": "yellow",
}
LAST_ROUNDS = 10
"""How many rounds `hansa job show` shows."""

_DIGEST = 64


def submit(kit: Path, file: Path, overrides: Sequence[str], *, follow: bool, key: str | None, as_json: bool) -> None:
    """Submit a job, and watch it to its end if asked to.

    Raises:
        HansaError: it was not taken; or, where it was followed, the error it failed of.
    """
    job = config.load(file, overrides)
    with Federation(kit) as federation:
        job, masks = federation.prepared(job)
        with _shown() as moved:
            id = federation.submit(job, key=key, moved=moved)
        if not follow:
            if as_json:
                console.emit({"job": id})
            else:
                console.out().print(masks, soft_wrap=True, markup=False)
                console.out().print(f"Submitted: {id}. `hansa job logs -f {id}` follows it.", soft_wrap=True)
            return
        try:
            with live.shown(console.err(), job) as progress:
                progress.say(f"Submitted: {id}. Ctrl-C stops watching, not the job.")
                view = federation.watch(id, progress)
                _raise_if_failed(view.line)
        except KeyboardInterrupt:
            raise InterruptedRunError(f"Not watched any more; `hansa job logs -f {id}` goes on.", job=id) from None
    if as_json:
        console.emit(_document(view))
    else:
        _tell(view)


def _raise_if_failed(line: JobLine) -> None:
    error = failure(line)
    if error is not None:
        raise error


@contextlib.contextmanager
def _shown() -> Iterator[Moved]:
    """Give what shows how far files are: a bar each on a terminal, nothing elsewhere."""
    to = console.err()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def moved(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, visible=done < total)

        yield moved


def jobs(kit: Path, *, as_json: bool) -> None:
    """List jobs."""
    with Federation(kit) as federation:
        lines = federation.jobs()
    if as_json:
        console.emit(lines)
        return
    to = console.out()
    if not lines:
        to.print("There are no jobs. `hansa job submit JOB.toml` submits one.")
        return
    table = _table("job", "submitter", "state", "rounds", "submitted", "")
    for line in lines:
        error = Text(line.error.partition("\n")[0])
        rounds = f"{line.round}/{line.rounds}"
        table.add_row(Text(line.job), Text(line.submitter), _state(line.state), rounds, _time(line.created), error)
    to.print(table)


def sites(kit: Path, *, as_json: bool) -> None:
    """List sites."""
    with Federation(kit) as federation:
        lines = federation.sites()
    if as_json:
        console.emit(lines)
        return
    table = _table("site", "state", "heard from", "release", "at")
    for line in lines:
        heard = "never" if line.seconds is None else f"{duration(round(line.seconds))} ago"
        table.add_row(Text(line.site), _state(line.state), heard, Text(line.release), Text("; ".join(line.activities)))
    console.out().print(table)


def show(kit: Path, id: str, *, as_json: bool) -> None:
    """Show a job."""
    with Federation(kit) as federation:
        view = federation.job(id)
    if as_json:
        console.emit(_document(view))
    else:
        _tell(view)


def _document(view: JobView) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(view.line),
        "document": view.document,
        "records": view.records,
        "sites": {site: {"answer": said, "at": view.activities.get(site, "")} for site, said in view.sites.items()},
        "files": {name: num_bytes for name, (_, num_bytes) in view.files.items()},
    }


def _tell(view: JobView) -> None:
    to, line = console.out(), view.line
    to.print(Text.assemble((line.job, "bold"), "  ", _state(line.state), f"  round {line.round} of {line.rounds}"))
    times = [f"{what} {_time(when)}" for what, when in _times(line).items() if when]
    to.print(Text(f"  submitted by {line.submitter}; {', '.join(times)}", "dim"), soft_wrap=True)
    if line.error:
        to.print(Text(f"  {line.error}", "red"), soft_wrap=True)
    table = _table("site", "said", "is at")
    for site, said in view.sites.items():
        style = "" if said in ("ready", "asked", "not asked yet") else "yellow"
        table.add_row(Text(site), Text(said, style), Text(view.activities.get(site, ""), "dim"))
    to.print(table)
    if view.records:
        to.print(_rounds(view.records))
    if view.files:
        total = sum(num_bytes for _, num_bytes in view.files.values())
        to.print(Text(f"{len(view.files)} results, {size(total)}: hansa job download {line.job}"), soft_wrap=True)


def _times(line: JobLine) -> Mapping[str, str]:
    return {"submitted": line.created, "started": line.started, "ended": line.ended}


def _rounds(records: Sequence[Mapping[str, Any]]) -> Table:
    shown = records[-LAST_ROUNDS:]
    names = list(dict.fromkeys(name for record in shown for name in record["metrics"]))
    table = _table("round", "sites", *names, "sent", "seconds", "absent")
    for record in shown:
        absent = "; ".join(f"{a['site']}: {a['kind']}: {a['reason']}" for a in record["absent"])
        table.add_row(
            str(record["round"]),
            f"{len(record['accepted'])}/{len(record['asked'])}",
            *(number(record["metrics"].get(name)) for name in names),
            size(record["bytes_down"] + record["bytes_up"]),
            f"{record['seconds']:.1f}",
            Text(absent, live.ABSENT),
        )
    if len(records) > len(shown):
        table.title = f"the last {len(shown)} of {len(records)} rounds"
        table.title_justify = "left"
    return table


def logs(kit: Path, id: str, *, follow: bool, as_json: bool) -> None:
    """Print a job's log; of a job that was followed and failed, raise the error."""
    to = console.out()
    with Federation(kit) as federation:
        try:
            for event in federation.follow(id, wait=follow):
                if as_json:
                    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
                    sys.stdout.flush()
                else:
                    time = _time(event.time)
                    to.print(Text.assemble((time, "dim"), f"  {event.kind:<7} {event.text}"), soft_wrap=True)
        except KeyboardInterrupt:
            raise InterruptedRunError("Not followed any more; the job goes on.", job=id) from None
        if follow:
            _raise_if_failed(federation.job(id).line)


def change(kit: Path, id: str, what: str, *, as_json: bool) -> None:
    """Abort or resume a job."""
    with Federation(kit) as federation:
        (federation.abort if what == "abort" else federation.resume)(id)
        line = federation.job(id).line
    if as_json:
        console.emit(line)
    else:
        console.out().print(Text.assemble(f"{id} is ", _state(line.state), "."))


def withdraw(kit: Path, id: str, site: str, *, as_json: bool) -> None:
    """Take a site out of a job."""
    with Federation(kit) as federation:
        federation.withdraw(id, site)
    if as_json:
        console.emit({"job": id, "site": site})
    else:
        console.out().print(f"{site} has left {id}; the others go on.")


def download(kit: Path, id: str, names: Sequence[str] | None, to: Path | None, *, as_json: bool) -> None:
    """Fetch results."""
    with Federation(kit) as federation, _shown() as moved:
        paths = federation.download(id, to or Path(id), names=names, moved=moved)
    if as_json:
        console.emit({"job": id, "files": [str(path.absolute()) for path in paths]})
    else:
        total = sum(path.stat().st_size for path in paths)
        console.out().print(Text(f"{len(paths)} files, {size(total)}, in {to or id}."), soft_wrap=True)


def delete(kit: Path, id: str, *, sure: bool, as_json: bool) -> None:
    """Delete a job, once that is confirmed."""
    with Federation(kit) as federation:
        line = federation.job(id).line
        if line.state not in ENDED:
            raise JobError(f"The job is {line.state}; abort it first: hansa job abort {id}.", job=id)
        if not sure:
            if as_json or not sys.stdin.isatty():
                raise JobError("Deleting can't be undone. Say --yes.", job=id)
            typer.confirm(f"Delete {id} ({line.state}) with all its results at the server?", abort=True)
        federation.delete(id)
    if as_json:
        console.emit({"deleted": id})
    else:
        console.out().print(f"Deleted: {id}.")


def audit(directory: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print a server's audit log, oldest first, from its database; the server may be at work.

    Raises:
        HansaError: ``server.toml`` is wrong, or the database is not there or can't be read.
    """
    from hansa.server import settings
    from hansa.server.store import Store

    store = Store.view(settings.load(directory / settings.FILE, overrides).database, directory)
    try:
        rows, after = [], 0
        while page := store.audits(after):
            rows += page
            after = page[-1].number
    finally:
        store.close()
    if as_json:
        console.emit(rows)
        return
    table = _table("time", "who", "did", "to", "outcome", "")
    for row in rows:
        outcome = Text(row.outcome, "red" if row.outcome == "refused" else "")
        subject = f"{row.subject[:12]}..." if len(row.subject) == _DIGEST else row.subject
        cells = (Text(text) for text in (row.actor, row.action, subject))
        table.add_row(_time(row.time), *cells, outcome, Text(row.detail))
    console.out().print(table)


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE, header_style="dim", padding=(0, 1))
    for title in titles:
        table.add_column(title, no_wrap=title in ("job", "site", "state", "submitted", "time", "who"), overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, STATES.get(state, ""))


def _time(text: str) -> str:
    return text[:19].replace("T", " ")
