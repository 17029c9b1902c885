# SPDX-License-Identifier: Apache-2.0
"""Where commands write: results on stdout, everything else on stderr; with ``--json`` one document on stdout."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text


def out() -> Console:
    """Return the console for results."""
    return Console(highlight=False)


def err() -> Console:
    """Return the console for progress and errors."""
    return Console(stderr=True, highlight=False)


def emit(document: Any) -> None:
    """Write one JSON document to stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
    sys.stdout.flush()


def complain(message: str, style: str) -> None:
    """Write one clear message to stderr; one in red begins with the word Error."""
    console = err()
    console.print(
        Text.assemble(("Error: " if style == "red" else "", f"bold {style}"), (message, style)), soft_wrap=True
    )
