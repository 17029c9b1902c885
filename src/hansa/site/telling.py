# SPDX-License-Identifier: Apache-2.0
"""What a submitter is told of what went wrong at a site: enough to mend the job, and nothing of the site's own.

He gets the error's message and, of the traceback, the frames in the job's own files, with their names in the bundle.
The site's log has the whole, at the task's name, which he is told too.

| what stands in a reason | what he reads |
|---|---|
| a path below the site's folder | the path from there |
| where data or a model lie at the site | what jobs call them: ``site:NAME``, the model's name |
| a traceback through the job's files, Hansa, libraries; such a one in what a script printed | the frames in the job's |
| other paths that a library puts into its message | as they are: a message is told whole |
"""

from __future__ import annotations

import re
from pathlib import Path

from hansa.bundle import in_folder
from hansa.site.policy import SCHEME
from hansa.site.settings import SiteSettings

MOST_FRAMES = 20
"""Of a long traceback the last ones are told: they are the nearest to the error."""

_FILE = re.compile(r'^ *File "(.+)", line \d+')
_FRAME = re.compile(r'^ +File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


def own_frames(trace: str, files: Path) -> list[str]:
    """Return the frames of a traceback that lie in the job's files, outermost first.

    >>> own_frames('  File "/s/files/a/train.py", line 3, in step\\n  File "/lib/x.py", line 9, in y', Path("/s/files"))
    ['a/train.py, line 3, in step']
    """
    found = []
    for path, line, where in _FRAME.findall(trace):
        if Path(path).is_relative_to(files):
            found.append(f"{Path(path).relative_to(files)}, line {line}, in {where}")
    return found[-MOST_FRAMES:]


def without_foreign_frames(reason: str, files: Path) -> str:
    """Return a reason of whose tracebacks, such as of a script's own output, the frames in the job's files are left.

    >>> lines = ['  File "/s/files/a.py", line 3', "    f()", '  File "/lib/x.py", line 9', "    g()", "KeyError"]
    >>> print(without_foreign_frames("\\n".join(["It ended:", *lines]), Path("/s/files")))
    It ended:
      File "a.py", line 3
        f()
    KeyError
    """
    kept: list[str] = []
    indent = -1  # of a frame that is left out; what stands further right belongs to it
    for line in reason.split("\n"):
        depth = len(line) - len(line.lstrip())
        frame = _FILE.match(line)
        if frame is not None:
            path = Path(frame[1])
            indent = -1 if path.is_relative_to(files) else depth
            if indent < 0:
                kept.append(line.replace(frame[1], str(path.relative_to(files)), 1))
        elif indent < 0 or depth <= indent:
            indent = -1
            kept.append(line)
    return "\n".join(kept)


def explained(summary: str, trace: str, files: Path, task: str) -> str:
    """Return what is told of an error: its message, the job's own frames, and where the rest is."""
    frames = [f"  {frame}" for frame in own_frames(trace, files)]
    return "\n".join([summary, *frames, f"The site's log has the whole traceback, at task {task}."])


def without_paths(reason: str, settings: SiteSettings, directory: Path) -> str:
    """Return a reason without the site's own paths.

    Args:
        reason: what would be told.
        settings: where the site's data and models lie.
        directory: the site's folder.
    """
    names = {f"{directory.absolute()}/": ""}
    for name, place in settings.data.items():
        for path in filter(None, (place.train, place.test)):
            names[in_folder(path, directory)] = f"{SCHEME}{name}"
    names |= {in_folder(path, directory): name for name, path in settings.models.items()}
    for path in sorted(names, key=len, reverse=True):
        reason = reason.replace(path, names[path])
    return reason
