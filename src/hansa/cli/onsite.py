# SPDX-License-Identifier: Apache-2.0
"""What a site's owner does by hand: try a job, look at the site, attach a process of one's own."""

from __future__ import annotations

import asyncio
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hansa.cli import console
from hansa.client.link import ATTACH_VARIABLE
from hansa.core import config
from hansa.errors import JobError, nearest
from hansa.pki.kit import Kit
from hansa.sinks.text import size
from hansa.site import trial
from hansa.site.agent import jobs_folder
from hansa.site.settings import FILE, SiteSettings, load
from hansa.site.warm import attach_folder


def check(job: Path, directory: Path, overrides: Sequence[str], signer: str | None, *, as_json: bool) -> None:
    """Try a job (a job file, or a signed bundle) at the site in ``directory``.

    Raises:
        HansaError: the site would refuse it, or could not do it, and why.
    """
    packed = job.is_file() and zipfile.is_zipfile(job)
    bundle = trial.read(directory, job if packed else config.load(job, overrides), signer)
    found = asyncio.run(trial.attempt(directory, job if packed else None, bundle))
    if as_json:
        console.emit({"ok": True, **asdict(found)})
        return
    counts = ", ".join(f"{name} {count:,}" for name, count in found.counts.items()) or "not told"
    labels = ", ".join(f"{name} {count:,}" for name, count in found.labels.items() if count)
    lines = [
        f"{found.site} would take part in {found.job}, signed by {found.signer}.",
        f"  data      {counts}" + (f" ({labels})" if labels else ""),
        f"  one step  {found.seconds:.2f} s, weighed by {found.examples:g}",
        f"  memory    {size(found.peak_bytes)} at the peak of one process",
        f"  a round   {size(found.plan_bytes)} down, {size(found.update_bytes)} up",
    ]
    console.out().print("\n".join(lines), soft_wrap=True)


def show(directory: Path, *, as_json: bool) -> None:
    """Say who the site is, what it allows, which data it has, and which jobs lie on its disk."""
    kit = Kit(directory)
    settings = load(directory / FILE)
    who = kit.identity
    document = {
        "site": who.name,
        "federation": who.federation,
        "expires": who.expires.isoformat(),
        "roster": kit.roster().version,
        "settings": settings.model_dump(mode="json"),
        "data": {name: _found(directory, settings, name) for name in sorted(settings.data)},
        "jobs": _jobs(directory),
    }
    if as_json:
        console.emit(document)
        return
    lines = [
        f"Site {who.name} of {who.federation}; its certificate ends on {who.expires:%Y-%m-%d}, "
        f"its roster has version {kit.roster().version}.",
        f"Server {settings.server}" + (f" through {settings.proxy}" if settings.proxy else ""),
    ]
    for title in ("policy", "resources"):
        values = getattr(settings, title).model_dump()
        lines += [f"{title}:", *(f"  {key} = {value!r}" for key, value in values.items())]
    lines += ["data:", *(f"  site:{name} {'is there' if there else 'IS MISSING'}" for name, there in _pairs(document))]
    lines += [
        "jobs:",
        *(f"  {job['job']}: {size(job['bytes'])}, {job['waiting']} answers wait" for job in _jobs(directory)),
    ]
    console.out().print("\n".join(lines), soft_wrap=True, markup=False)


def _pairs(document: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(document["data"].items())


def _found(directory: Path, settings: SiteSettings, name: str) -> bool:
    """Say whether there is a file where the site's data of a name lie."""
    path = Path(settings.data[name].train).expanduser()
    return path.exists() or any(Path("/").glob(str((directory / path).absolute())[1:]))


def _jobs(directory: Path) -> list[dict[str, Any]]:
    folder = jobs_folder(directory)
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = [each for each in path.rglob("*") if each.is_file() and not each.is_symlink()]
        waiting = path / "outbox"
        found.append(
            {
                "job": path.name,
                "bytes": sum(each.stat().st_size for each in files),
                "waiting": len([each for each in waiting.iterdir() if each.name[0] != "."]) if waiting.is_dir() else 0,
            }
        )
    return found


def attach(id: str, command: Sequence[str], directory: Path) -> None:
    """Become ``command``, a process that takes the tasks of a job (``recipe.attached = true``) at this site.

    Raises:
        JobError: this site has no such job, or there is no such command.
    """
    folder = jobs_folder(directory)
    known = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if id not in known:
        raise JobError(
            f"This site is at work on no job {id!r}; its jobs: {', '.join(known) or 'none'}.{nearest(id, known)}"
        )
    site = Kit(directory).identity.name
    place = attach_folder(folder / id, site) / site
    try:
        os.execvpe(command[0], [*command], {**os.environ, ATTACH_VARIABLE: str(place)})
    except OSError as error:
        raise JobError(f"{command[0]!r} can't be started: {error.strerror}.") from None
