# SPDX-License-Identifier: Apache-2.0
"""``hansa job`` and ``hansa sites`` as the command line has them; `hansa.cli.submitting` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="job",
    help="Submit jobs to a federation, watch them, fetch their results.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

As = Annotated[
    Path,
    typer.Option("--as", metavar="DIR", envvar="HANSA_KIT", help="The folder of your kit: who you are."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `hansa job list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A .toml, .yaml or .json job.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the job. May be repeated."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and watch; the exit code is the job's.")] = False,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Submitted again with the same key, it is the same job.")
    ] = None,
    kit: As = Path(),
    as_json: Json = False,
) -> None:
    """Sign a job, send it with the files it names, and queue it."""
    from hansa.cli import submitting

    submitting.submit(kit, job, overrides or [], follow=follow, key=key, as_json=as_json)


@app.command(name="list")
def list_(kit: As = Path(), as_json: Json = False) -> None:
    """List the jobs that you may see, oldest first."""
    from hansa.cli import submitting

    submitting.jobs(kit, as_json=as_json)


@app.command()
def show(id: Id, kit: As = Path(), as_json: Json = False) -> None:
    """Show a job: its state, its rounds, what each site said to it and is at now, its results."""
    from hansa.cli import submitting

    submitting.show(kit, id, as_json=as_json)


@app.command()
def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    kit: As = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document a line to stdout.")] = False,
) -> None:
    """Print a job's log; with --follow, the exit code is the job's."""
    from hansa.cli import submitting

    submitting.logs(kit, id, follow=follow, as_json=as_json)


@app.command()
def abort(id: Id, kit: As = Path(), as_json: Json = False) -> None:
    """Stop a job; its finished rounds stay."""
    from hansa.cli import submitting

    submitting.change(kit, id, "abort", as_json=as_json)


@app.command()
def withdraw(
    id: Id,
    site: Annotated[str, typer.Option(help="Which site leaves the job; the others go on.")],
    kit: As = Path(),
    as_json: Json = False,
) -> None:
    """Take a site out of a job for good; for the site's own admin."""
    from hansa.cli import submitting

    submitting.withdraw(kit, id, site, as_json=as_json)


@app.command()
def resume(id: Id, kit: As = Path(), as_json: Json = False) -> None:
    """Go on with a failed or aborted job from its last finished round."""
    from hansa.cli import submitting

    submitting.change(kit, id, "resume", as_json=as_json)


@app.command()
def download(
    id: Id,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which files or folders; all by default.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Where to; a folder ID by default.")] = None,
    kit: As = Path(),
    as_json: Json = False,
) -> None:
    """Fetch a finished job's results; a download that was cut off goes on."""
    from hansa.cli import submitting

    submitting.download(kit, id, names or None, to, as_json=as_json)


@app.command()
def delete(
    id: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    kit: As = Path(),
    as_json: Json = False,
) -> None:
    """Delete a job that is not under way, with all its files at the server."""
    from hansa.cli import submitting

    submitting.delete(kit, id, sure=yes, as_json=as_json)


def sites(kit: As = Path(), as_json: Json = False) -> None:
    """List the federation's sites: who is connected, and what each is at."""
    from hansa.cli import submitting

    submitting.sites(kit, as_json=as_json)
