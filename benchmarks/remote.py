# SPDX-License-Identifier: Apache-2.0
"""Whole rounds of a deployed federation on loopback, mutual TLS on: a server, its sites' agents and workers, each a
process of its own; settings in README.md.

python benchmarks/remote.py [--mib 256] [--tensor-mib 64] [--sites 4] [--rounds 5] [--dir .]
python benchmarks/remote.py --delay-ms 100 --mbit 800     through a relay that delays and limits each site's link
python benchmarks/remote.py --masked                      what secure aggregation costs; without, updates travel plain
python benchmarks/remote.py --idle 1000                   sites that attend and have nothing to do

Training costs next to nothing (``synthetic.py``), so what is measured is the federation. A process's RssAnon is
sampled every 20 ms. A round is from one line of the job's log that says "round done", its checkpoint on disk, to the
next; the first is left out, since the processes that train are started in it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from hansa.core import config
from hansa.core import tree as trees
from hansa.core.config import Job
from hansa.lab import SERVER, Lab, lab
from hansa.pki.kit import Kit
from hansa.transport.client import Connection
from hansa.transport.messages import PROTOCOL, Attend
from hansa.version import VERSION
from slow_link import SlowLink

MIB = 1 << 20


def job_of(arguments: argparse.Namespace, folder: Path) -> Job:
    values = {
        "name": "synthetic",
        "rounds": arguments.rounds,
        "recipe": {
            "name": "synthetic:build",
            "sites": arguments.sites,
            "mib": arguments.mib,
            "tensor_mib": arguments.tensor_mib,
            "numbers": arguments.numbers,
        },
        "secure_aggregation": arguments.masked,
        "evaluation": {"every": 0},
        "baselines": {"base": False, "local": False},
        "output": {"dir": str(folder / "runs"), "keep": 1},
        "directory": str(folder),
    }
    return config.parse(values)


@dataclass
class Watch:
    """Processor seconds and peak anonymous memory of the federation's processes, by kind."""

    federation: Lab
    peaks: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        for name in self.federation.names:
            kind = "server" if name == SERVER else "agent"
            process = psutil.Process(self.federation.pid(name))
            yield kind, process
            for child in process.children(recursive=True):
                yield ("server's worker" if name == SERVER else "site's worker"), child

    def sample(self) -> None:
        known: dict[int, tuple[str, int]] = {}
        count = 0
        while not self._stop.wait(0.02):
            if count % 25 == 0:
                known = {process.pid: (kind, process.pid) for kind, process in self.processes()}
            count += 1
            for kind, pid in known.values():
                self.peaks[kind] = max(self.peaks.get(kind, 0), anonymous(pid))

    def used(self) -> dict[str, np.ndarray]:
        """Return the processor seconds of each kind of process, and the bytes it has read from files and written."""
        found: dict[str, np.ndarray] = {}
        for kind, process in self.processes():
            times, moved = process.cpu_times(), process.io_counters()
            spent = np.array([times.user + times.system, moved.read_chars, moved.write_chars])
            found[kind] = found.get(kind, np.zeros(3)) + spent
        return found

    @contextmanager
    def sampling(self) -> Iterator[None]:
        thread = threading.Thread(target=self.sample)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def anonymous(pid: int) -> int:
    """Return a process's anonymous resident bytes; 0 when it has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def behind(federation: Lab, link: SlowLink) -> None:
    """Have every site reach the server through the link."""
    for site in federation.sites:
        settings = federation.folder(site) / "site.toml"
        settings.write_text(settings.read_text().replace(federation.address, f"127.0.0.1:{link.port}"))
        federation.restart(site)


def rounds(arguments: argparse.Namespace, folder: Path) -> None:
    begun = time.perf_counter()
    with lab(job_of(arguments, folder), directory=folder / "lab") as federation:
        print(f"up, {arguments.sites} sites joined: {time.perf_counter() - begun:.1f} s")
        links = []
        if arguments.mbit:
            port = int(federation.address.rpartition(":")[2])
            links = [SlowLink(port, arguments.delay_ms / 1000, arguments.mbit * 1e6 / 8)]
            behind(federation, links[0])
        starts(federation)
        watch = Watch(federation)
        ends: list[float] = []
        with watch.sampling():
            id = federation.federation.submit(federation.job)
            before = after = watch.used()
            for event in federation.federation.follow(id):
                if event.kind == "round":
                    ends.append(datetime.fromisoformat(event.time).timestamp())
                    after = watch.used()
                    before = after if len(ends) == 1 else before
        view = federation.federation.job(id)
        if view.line.state != "finished":
            raise SystemExit(f"The job {view.line.state}: {view.line.error}")
        for link in links:
            link.close()
    first = view.records[0]["seconds"]
    times = [end - begun for begun, end in pairwise(ends)] or [first]
    moved = sum(record["bytes_down"] + record["bytes_up"] for record in view.records) / len(view.records)
    median = statistics.median(times)
    print(f"{arguments.mib:g} MiB, {arguments.sites} sites, {len(ends) - 1} rounds after the first; seconds a round:")
    print(f"  median {median:.3f}, least {min(times):.3f}, most {max(times):.3f} (the first: {first:.3f})")
    print(f"  {moved / median / 1e9:.2f} GB/s to and from all sites")
    if arguments.mbit:
        # The sites share one relay that gives each connection its own rate, so each uses its own link.
        each = moved / arguments.sites / 2 / (arguments.mbit * 1e6 / 8)
        print(f"  the link alone: {2 * each:.2f} s; used to {2 * each / median:.0%}")
    print("| processes | processor s a round | a GiB moved | models read a round | written | peak anonymous MiB |")
    print("|---|---|---|---|---|---|")
    for kind in sorted(after):
        used, read, written = (after[kind] - before.get(kind, 0.0)) / len(times)
        print(
            f"| {kind} | {used:.2f} | {used / moved * (1 << 30):.2f} | {read / (arguments.mib * MIB):.1f} "
            f"| {written / (arguments.mib * MIB):.1f} | {watch.peaks.get(kind, 0) / MIB:.0f} |"
        )


def starts(federation: Lab) -> None:
    """Time the start of the server, then of one site, each from its process's first moment."""
    site = federation.sites[0]
    for name in (site, SERVER):
        federation.stop(name)
    for name in (SERVER, site):
        begun = time.perf_counter()
        federation.start(name)
        print(f"{'server ready' if name == SERVER else 'site joined'}: {time.perf_counter() - begun:.2f} s")


async def attending(kits: list[Path], address: str, seconds: float, measured: Callable[[], None]) -> None:
    async def attend(connection: Connection) -> None:
        async for _ in connection.attend(Attend(PROTOCOL, VERSION)):
            arrived.release()

    arrived = asyncio.Semaphore(0)
    async with AsyncExitStack() as stack:
        tasks = []
        for kit in kits:
            connection = await stack.enter_async_context(Connection(Kit(kit), address))
            tasks.append(asyncio.create_task(attend(connection)))
        for _ in kits:
            await arrived.acquire()
        measured()
        await asyncio.sleep(seconds)
        measured()
        for task in tasks:
            task.cancel()


def idle(arguments: argparse.Namespace, folder: Path) -> None:
    arguments.sites = 1
    with lab(job_of(arguments, folder), directory=folder / "lab") as federation:
        server = psutil.Process(federation.pid(SERVER))
        alone = anonymous(server.pid)
        from hansa.pki.authority import Authority
        from hansa.pki.identity import Role

        authority = Authority.open(federation.directory / "authority")
        kits = [folder / "kits" / f"idle-{i:05d}" for i in range(arguments.idle)]
        for kit in kits:
            authority.issue(kit, Role.SITE, kit.name)
        federation.federation.sites()
        Kit(federation.folder(SERVER)).update_roster(authority.roster.data)
        seen: list[tuple[float, float, int]] = []

        def measured() -> None:
            used = server.cpu_times()
            seen.append((time.perf_counter(), used.user + used.system, anonymous(server.pid)))

        asyncio.run(attending(kits, federation.address, arguments.seconds, measured))
    (t0, c0, _), (t1, c1, memory) = seen
    print(
        f"{arguments.idle} sites attend: server {memory / MIB:.0f} MiB anonymous (alone {alone / MIB:.0f}), "
        f"{(c1 - c0) / (t1 - t0):.1%} of a core over {t1 - t0:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=float, default=256.0)
    parser.add_argument("--tensor-mib", type=float, default=64.0)
    parser.add_argument("--numbers", type=int, default=trees.BLOCK)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--mbit", type=float, default=0.0)
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--dir", type=Path, default=Path())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        (idle if arguments.idle else rounds)(arguments, Path(folder).absolute())


if __name__ == "__main__":
    main()
