# SPDX-License-Identifier: Apache-2.0
"""The machine's cores and GPUs, and which share of them a running site holds.

| case | result |
|---|---|
| a site asks for more cores than there are | it counts as all of them, so it runs alone; it keeps its thread count |
| a fraction of a GPU | its worker sees one GPU, on which shares add up to at most 1 |
| n > 1 GPUs | its worker sees n GPUs, all of it |
| no site of the job has a GPU share | workers see what this process sees, as engine ``local`` does |
| some site has one | a site without a share sees no GPU |
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hansa.core.config import EngineSection
from hansa.errors import JobError
from hansa.workers.runner import num_threads
from hansa.workers.worker import Devices

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Share:
    """What one running site holds: whole cores, and GPUs or a fraction of one."""

    cpus: int
    gpus: float = 0.0


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(
    environ: Mapping[str, str] = os.environ, devices: Path = Path("/proc/driver/nvidia/gpus")
) -> list[str]:
    """Return the GPUs that this process may use, without loading a framework that would occupy them."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(devices.iterdir())))] if devices.is_dir() else []


class Machine:
    """Keeps the sum of running shares within what there is."""

    def __init__(self, section: EngineSection, cpus: int, gpus: Sequence[str]) -> None:
        self._section = section
        self._cpus = cpus
        self._free_cpus = cpus
        self._free_gpus = dict.fromkeys(gpus, 1.0)
        self._divides = any(site.gpus > 0 for site in section.sites.values())

    def share(self, site: str | None) -> Share:
        """Return the share of ``site``; what no site does (None) holds the default share.

        Raises:
            JobError: the machine has fewer GPUs than the site's share.
        """
        own = self._section.sites.get(site) if site else None
        gpus = own.gpus if own else 0.0
        if gpus > 1 and gpus != int(gpus):
            raise JobError(f"engine.sites.{site}.gpus is {gpus}: give a fraction up to 1, or a whole number.")
        if gpus > len(self._free_gpus):
            raise JobError(
                f"engine.sites.{site}.gpus is {gpus:g}, and this machine shows {len(self._free_gpus)} GPUs. "
                "Leave the share out, or run where CUDA_VISIBLE_DEVICES names enough of them."
            )
        return Share(min(num_threads(self._section, site), self._cpus), gpus)

    def room(self) -> int:
        """Return how many sites with the default share run at the same time."""
        return max(1, self._cpus // self._section.threads)

    def devices(self, share: Share, others: Sequence[Devices] = ()) -> Devices:
        """Return what a new worker for ``share`` should see: the GPUs with most room that fewest ``others`` see."""
        if not self._divides:
            return None
        seen = Counter(name for devices in others for name in devices or ())
        freest = sorted(self._free_gpus, key=lambda name: (-self._free_gpus[name], seen[name]))
        return tuple(sorted(freest[: self._count(share)]))

    def fits(self, share: Share, devices: Devices) -> bool:
        """Say whether ``share`` is free now in a worker that sees ``devices``."""
        if share.cpus > self._free_cpus:
            return False
        if not self._divides:
            return True
        if devices is None or len(devices) != self._count(share):
            return False
        return all(self._free_gpus[name] + _ROUNDING >= min(1.0, share.gpus) for name in devices)

    def take(self, share: Share, devices: Devices) -> None:
        """Hold ``share``."""
        self._move(share, devices, -1)

    def give(self, share: Share, devices: Devices) -> None:
        """Give ``share`` back."""
        self._move(share, devices, +1)

    @staticmethod
    def _count(share: Share) -> int:
        return 0 if share.gpus == 0 else max(1, int(share.gpus))

    def _move(self, share: Share, devices: Devices, sign: int) -> None:
        self._free_cpus += sign * share.cpus
        assert 0 <= self._free_cpus <= self._cpus
        for name in devices or ():
            self._free_gpus[name] += sign * min(1.0, share.gpus)
            assert -_ROUNDING <= self._free_gpus[name] <= 1 + _ROUNDING
