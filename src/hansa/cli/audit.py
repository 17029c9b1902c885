# SPDX-License-Identifier: Apache-2.0
"""``hansa audit`` as the command line has it; `hansa.cli.auditing` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="audit",
    help="Attack a job's own protection, and see what holds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def _audit() -> None:
    pass  # so that there is a name before the kind of audit


@app.command()
def privacy(
    target: Annotated[
        str, typer.Argument(metavar="JOB|RUN", help="A .toml, .yaml or .json job, or a finished run's name or folder.")
    ],
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", metavar="NAME", help="Only this attack; all by default. May be repeated."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the job. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What the attacks draw from; noise never does.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the report goes; RUN/audit, or JOB-audit in the job's output.dir."),
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="The folder that holds runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Attack a job, with its data, on this machine, as the server, a site or the public could; write a report."""
    from hansa.cli import auditing

    wish = auditing.Wish(target, attacks or [], overrides or [], seed, out, folder)
    auditing.audit(wish, as_json=as_json)
