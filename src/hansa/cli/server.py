# SPDX-License-Identifier: Apache-2.0
"""``hansa server`` as the command line has it; `hansa.cli.serving` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="server", help="Run a federation's server.", no_args_is_help=True, rich_markup_mode="rich")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder: its kit and server.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of server.toml. May be repeated."),
]


@app.command()
def start(directory: Directory = Path(), overrides: Set = None, as_json: Json = False) -> None:
    """Serve sites and users until stopped; jobs that were running go on."""
    from hansa.cli import serving

    serving.serve(directory, overrides or [], as_json=as_json)


@app.command()
def audit(directory: Directory = Path(), overrides: Set = None, as_json: Json = False) -> None:
    """Print the audit log: who did what, and what was refused."""
    from hansa.cli import submitting

    submitting.audit(directory, overrides or [], as_json=as_json)
