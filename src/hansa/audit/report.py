# SPDX-License-Identifier: Apache-2.0
"""``audit.html`` and ``audit.json``: what attacks found, for those who answer for the data and for programs.

The page is in the form of a run's report: all in one file, without a network, in light and dark.
"""

from __future__ import annotations

import json
from pathlib import Path

from hansa.audit.audit import Audit
from hansa.core import storage
from hansa.errors import MissingExtraError, StorageError
from hansa.runs.progress import Progress
from hansa.sinks.report import figures, rendered

VERDICTS = {
    "holds": "holds",
    "leaks": "leaks; nothing was promised",
    "fails": "a promise is broken",
    None: "no attack applies",
}
"""What people are told of a verdict."""


def write(directory: Path, audit: Audit, progress: Progress) -> dict[str, Path]:
    """Write both files into ``directory`` and return their paths; the page only where its libraries are installed.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Can't make the folder {directory}: {error.strerror}. Set --out.") from error
    written = {"numbers": directory / "audit.json"}
    storage.write_json(written["numbers"], audit.as_json())
    try:
        content = page(audit)
    except MissingExtraError as error:
        progress.say(f"audit.json is written, audit.html is not. {error.message}")
        return written
    storage.write_atomic(directory / "audit.html", content.encode())
    return {"report": directory / "audit.html", **written}


def page(audit: Audit) -> str:
    """Return the page.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    plots = figures("then audit again.")
    drawn = [
        [
            {
                "title": picture.title,
                "note": picture.note,
                "svg": plots.svg(f"f{place}-{number}", picture.title, picture.draw, picture.height),
            }
            for number, picture in enumerate(finding.pictures)
        ]
        for place, finding in enumerate(audit.findings)
    ]
    told = audit.as_json()
    return rendered(
        "audit/audit.html.j2",
        audit=told,
        job=told["job"],
        privacy=told["privacy"],
        findings=[(finding, drawn[place]) for place, finding in enumerate(audit.findings)],
        verdicts=VERDICTS,
        protection=audit.subject.protection,
        sites=len(audit.subject.sites),
        resolved=json.dumps(told["job"], indent=2, ensure_ascii=False),
    )
