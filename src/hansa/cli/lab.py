# SPDX-License-Identifier: Apache-2.0
"""``hansa lab`` as the command line has it; `hansa.cli.staging` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="lab",
    help="Try a deployment on this machine: a server and its sites as real processes over real TLS.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


@app.command()
def up(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A .toml, .yaml or .json job.")],
    sites: Annotated[
        int | None, typer.Option("--sites", metavar="N", min=1, help="How many sites; what the job says by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the job. May be repeated."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="A new folder for it all; a temporary one by default."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the federation running when the job is done.")] = False,
    as_json: Json = False,
) -> None:
    """Bring up a federation, run the job on it, and take it down."""
    from hansa.cli import staging

    staging.up(job, overrides or [], sites=sites, directory=directory, keep=keep, as_json=as_json)


@app.command()
def down(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a federation that was kept.")],
    as_json: Json = False,
) -> None:
    """End the processes of a federation that `lab up --keep` left running; its folder stays."""
    from hansa.cli import staging

    staging.down(directory, as_json=as_json)
