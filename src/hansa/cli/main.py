# SPDX-License-Identifier: Apache-2.0
"""The command line. Every command imports what it needs when it runs, so that ``hansa --help`` is quick.

Exit codes are those of :mod:`hansa.errors`: a script can tell what went wrong. With ``--json`` a command writes one
JSON document to stdout and nothing else; an error is ``{"error": {"kind", "message", "exit_code"}}``.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from hansa.cli import audit, lab, pki, server, site
from hansa.cli import job as jobs
from hansa.errors import DEFECT, HansaError, InterruptedRunError

app = typer.Typer(
    name="hansa",
    help="Train and fine-tune models together across organisations that may not pool their data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set train.lr=0.01. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Folder = Annotated[Path, typer.Option("--dir", help="The folder that holds runs.")]


def main() -> None:
    """Run the command line and exit with the code that :mod:`hansa.errors` documents."""
    try:
        app(prog_name="hansa")
    except HansaError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        sys.exit(1)
    except Exception:  # noqa: BLE001 - a defect is reported as one, whatever it is
        traceback.print_exc()
        _report_defect()
        sys.exit(DEFECT)


def _tell(error: HansaError) -> None:
    from hansa.cli import console

    if "--json" in sys.argv:
        code = error.exit_code
        console.emit({"error": {"kind": type(error).__name__, "message": str(error), "exit_code": code}})
    console.complain(str(error), "yellow" if isinstance(error, InterruptedRunError) else "red")


def _report_defect() -> None:
    from hansa.cli import console

    console.complain("This is a defect of Hansa, or of code of your own that the job names.", "red")
    console.complain("Finished rounds are on disk. Please report it, with these lines and `hansa --version`.", "")


def _version(wanted: bool) -> None:
    if wanted:
        from hansa.version import VERSION

        typer.echo(f"hansa {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    job: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB", help="A .toml, .yaml or .json job; with --resume also a run."),
    ] = None,
    overrides: Set = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an unfinished run: [cyan]--resume RUN[/], or [cyan]JOB --resume[/] for the last run of "
            "that job, or alone for the last unfinished run.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry out a job: check it, train, compare with the baselines, save the model, write the report."""
    from hansa.cli import running

    running.run(job or [], overrides or [], resume=resume, as_json=as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("job.toml"),
    recipe: Annotated[
        str,
        typer.Option(help="The job's recipe: causal-lm, (sequence, token or image)-classification, script."),
    ] = "causal-lm",
    as_json: Json = False,
) -> None:
    """Write a commented job to start from; a file that is there already is left as it is."""
    from hansa.cli import console, starting

    starting.write(path, recipe)
    if as_json:
        console.emit({"job": str(path.absolute()), "recipe": recipe})
    else:
        console.out().print(f"Wrote {path}. Fill in the model and the data, then: hansa check {path}", soft_wrap=True)


@app.command()
def check(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A .toml, .yaml or .json job.")],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Validate a job without training: what it resolves to, its sites, what composes, what it costs."""
    from hansa.cli import checking

    checking.check(job, overrides or [], as_json=as_json)


@app.command()
def runs(folder: Folder = Path("runs"), as_json: Json = False) -> None:
    """List past runs."""
    from hansa.cli import past

    past.runs(folder, as_json=as_json)


@app.command()
def report(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")],
    folder: Folder = Path("runs"),
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's report.html again, from what is on disk."""
    from hansa.cli import past

    past.report(folder, name, as_json=as_json, show=show)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job, for editors and other programs."""
    from hansa.cli import console
    from hansa.core import config

    console.emit(config.schema())


@app.command()
def quickstart(
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A causal language model on disk, in place of pre-training one."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A JSONL file, in place of the standard library's source text."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The column of --data whose values are the sites."),
    ] = None,
    text: Annotated[str, typer.Option(metavar="COLUMN", help="The column of --data that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(min=0, help="The seed, or the first of --seeds.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Run so many seeds, and show the mean.")] = 1,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Pre-train a small language model, fine-tune it over eight sites that keep their text, and show the report."""
    from hansa.cli import quickstart as begin

    begin.quickstart(begin.Wish(base, data, by, text, seed, seeds, overrides or []), as_json=as_json)


app.command()(pki.provision)
app.add_typer(pki.app)
app.add_typer(server.app)
app.add_typer(site.app)
app.add_typer(lab.app)
app.add_typer(audit.app)
app.add_typer(jobs.app)
app.command()(jobs.sites)


if __name__ == "__main__":
    main()
