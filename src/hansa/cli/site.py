# SPDX-License-Identifier: Apache-2.0
"""``hansa site`` as the command line has it; `hansa.cli.serving` and `hansa.cli.onsite` do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="site", help="Run a site's agent.", no_args_is_help=True, rich_markup_mode="rich")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder: its kit and site.toml.")]
Folder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The site's folder: its kit and site.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


@app.command()
def start(directory: Directory = Path(), as_json: Json = False) -> None:
    """Take part in the federation until stopped. The agent only dials out."""
    from hansa.cli import serving

    serving.attend(directory, as_json=as_json)


@app.command()
def check(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A job file, or a signed bundle.")],
    directory: Folder = Path(),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the job. May be repeated."),
    ] = None,
    signer: Annotated[
        str | None, typer.Option(metavar="NAME", help="For a job file: check it as if NAME had signed it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Try a job on the site's own data, without a server: policy, data, one training step, what it costs."""
    from hansa.cli import onsite

    onsite.check(job, directory, overrides or [], signer, as_json=as_json)


@app.command()
def show(directory: Directory = Path(), as_json: Json = False) -> None:
    """Say who the site is, what it allows, which data it has, and which jobs lie on its disk."""
    from hansa.cli import onsite

    onsite.show(directory, as_json=as_json)


@app.command()
def budget(
    directory: Directory = Path(),
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check the ledgers, and show how many lines each has and their hash.")
    ] = False,
    seal: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Sign the ledger of NAME anew: you have looked at it, and its key is gone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how much of the privacy of its data the site has spent, on which jobs, and how much it allows."""
    from hansa.cli import spending

    if seal is not None:
        spending.seal(directory, seal)
    spending.show(directory, verify=verify, as_json=as_json)


@app.command(context_settings={"ignore_unknown_options": True})
def attach(
    job: Annotated[str, typer.Argument(metavar="JOBID", help="The job's id at the server.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="E.g.: -- python train.py")],
    directory: Folder = Path(),
) -> None:
    """Run a command of your own as the training process of a job whose recipe says attached = true."""
    from hansa.cli import onsite

    onsite.attach(job, command, directory)
