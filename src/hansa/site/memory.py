# SPDX-License-Identifier: Apache-2.0
"""A worker's memory limit, held for it and all that it starts together.

The kernel holds the limit for each process at once (RLIMIT_DATA). For their sum the agent looks every ``SAMPLE_S``, and
ends them all when it is above: a burst between two looks is not seen, and stays for the system to deal with.

What counts is anonymous and shared memory; what processes share counts once (PSS, proc_pid_smaps(5)). Mapped files do
not count: the kernel takes their pages back when it needs them.

| case | result |
|---|---|
| a child that forks children, takes a process group or session of its own | counts |
| a child that leaves its parents (a daemon) within the worker's session | counts |
| one that does both | is not seen; a container is what holds such code |
| a process that ends while it is looked at | does not count |
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from functools import partial
from pathlib import Path

from hansa.workers.worker import Worker

SAMPLE_S = 0.5

_PAGE = os.sysconf("SC_PAGE_SIZE")
_COUNTED = re.compile(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", re.MULTILINE)


async def hold(worker: Worker, most: int) -> None:
    """End a worker with all that it started as soon as they take more than ``most`` bytes; runs until cancelled."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        tree = await asyncio.to_thread(family, worker.process.pid)
        taken = await asyncio.to_thread(partial(num_bytes, tree, most))
        if taken > most:
            worker.kill(
                f"it needed more memory than it may take ({most:,} bytes, with the processes that it starts; they took "
                f"{taken:,})"
            )
            for pid in tree:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            return


def family(leader: int) -> list[int]:
    """Return a process, those of its session, and all that descend from them."""
    parents, members = {}, {leader}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which is in brackets and may hold anything: state, parent, group, session.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                if int(fields[3]) == leader:
                    members.add(int(folder.name))
    while found := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= found
    return sorted(members)


def num_bytes(pids: list[int], most: int) -> int:
    """Return how much memory processes take together; no more than a bound of it where that is within ``most``.

    Pages that are shared are told apart only where it matters, for that takes the kernel long.
    """
    bound = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
            bound += (resident - shared) * _PAGE + _shmem(pid)
    if bound <= most:
        return bound
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = _COUNTED.findall(Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += 1024 * sum(map(int, found))
    return total


def _shmem(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return 1024 * int(line.split()[1])
    return 0
