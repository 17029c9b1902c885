# SPDX-License-Identifier: Apache-2.0
"""What every engine offers a run: the sites of a job, simulated on this machine or reached over the network."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hansa.core.fit import Trait
from hansa.core.ports import Cohort, Peers, SiteReport
from hansa.core.tree import Tree
from hansa.errors import HansaError
from hansa.workers.runner import Course


class Engine(Protocol):
    """Runs the sites of a job somewhere. An async context manager."""

    @property
    def needs_all(self) -> bool:
        """Whether a run begins only when every site can take part, or with a quorum of them."""
        ...

    @property
    def traits(self) -> frozenset[Trait]:
        """The engine's own traits and its program's."""
        ...

    @property
    def sites(self) -> Sequence[str]:
        """All sites, sorted."""
        ...

    async def __aenter__(self) -> Engine:
        """Start whatever it needs."""
        ...

    async def __aexit__(self, *exception: object) -> None:
        """End every process it started."""
        ...

    async def initial(self) -> Tree:
        """Return the parameters that training starts from."""
        ...

    async def inspect(self, site: str) -> SiteReport:
        """Check one site's data against the job (DataError)."""
        ...

    async def export(self, params: Tree, directory: Path) -> None:
        """Write a usable model with ``params`` to ``directory``."""
        ...

    async def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at: prompt -> what a model with ``params`` makes of it; or nothing."""
        ...

    def cohort(self, course: Course) -> Cohort:
        """Return the sites of ``course`` as a workflow sees them."""
        ...

    @property
    def peers(self) -> Peers:
        """The mailboxes between sites."""
        ...


async def inspect_all(engine: Engine) -> tuple[list[SiteReport], Mapping[str, HansaError]]:
    """Check every site's data before training; return the reports, and the errors by site."""
    found = await asyncio.gather(*(engine.inspect(site) for site in engine.sites), return_exceptions=True)
    reports = []
    errors: dict[str, HansaError] = {}
    for site, result in zip(engine.sites, found, strict=True):
        if isinstance(result, SiteReport):
            reports.append(result)
        elif isinstance(result, HansaError):
            errors[site] = result
        else:
            raise result
    return reports, errors
