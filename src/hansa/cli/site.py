# SPDX-License-Identifier: Apache-2.0
"""``hansa site`` as the command line has it; `hansa.cli.serving` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="site", help="Run a site's agent.", no_args_is_help=True, rich_markup_mode="rich")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder: its kit and site.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


@app.command()
def start(directory: Directory = Path(), as_json: Json = False) -> None:
    """Take part in the federation until stopped. The agent only dials out."""
    from hansa.cli import serving

    serving.attend(directory, as_json=as_json)
