# SPDX-License-Identifier: Apache-2.0
"""A job that is disturbed in every way we know ends with the bits of an undisturbed one.

At times drawn from a seed: SIGKILL of the server, of a site's agent, of a worker; a network that is cut, and one that
stalls in the middle of a transfer for longer than any keep-alive; a disk that is full for a while. A failure names its
seed; ``HANSA_CHAOS_SEEDS="4 5 6"`` runs others.

Beside the model's bits, what was accepted must not be trained again: a site may train a round twice only where its
agent or worker was killed, or where its disk had no room for what was trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hansa.core import config
from hansa.core.config import Job
from hansa.errors import HansaError
from hansa.lab import SERVER, Lab, lab
from hansa.server.store import EventRow, Store
from hansa.simulation.run import run
from relay import Relay, relay
from toys import SITES

SEEDS = [int(seed) for seed in os.environ.get("HANSA_CHAOS_SEEDS", "1 2 3").split()]
ACTIONS = 8
STALL_S = 2.0
PATIENCE_S = 150.0
NO_ROOM = re.compile(r"tried again: .*(?:No space left|needs up to)")

pytestmark = pytest.mark.timeout(400)


def job_at(folder: Path, workflow: str = "scatter-gather", rounds: int = 8, size: int = 400_000) -> Job:
    """Quadratics of 3 MB, so updates travel in pieces: by SCAFFOLD, which remembers rounds, or from site to site."""
    values = {
        "name": "storm",
        "rounds": rounds,
        "recipe": {
            "name": "toys:build",
            "size": size,
            "delay_s": 0.02,
            "trained": str(folder / "trained.txt"),
        },
        "train": {"optimizer": "sgd"},
        "workflow": workflow,
        "strategy": "fedavg" if workflow == "cyclic" else "scaffold",
        "cohort": {"quorum": 1.0},
        "baselines": {"base": False, "local": False},
        "output": {"dir": str(folder / "runs"), "keep": 1},
        "directory": str(folder),
    }
    return config.parse(values)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """The model's digest after an undisturbed run in simulation."""
    folder = tmp_path_factory.mktemp("calm")
    return run(job_at(folder)).report["model"]["sha256"]


class Network:
    """A relay before the server for every site, in a loop of its own."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self.relays: dict[str, Relay] = {}
        ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(port, ready),))
        self._thread.start()
        ready.wait()

    async def _serve(self, port: int, ready: threading.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for site in SITES:
                self.relays[site] = await stack.enter_async_context(relay(port))
            ready.set()
            await self._done.wait()

    def do(self, action: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(action)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()


class Storm:
    """Draws what happens next, and does it."""

    def __init__(self, federation: Lab, network: Network, disk: Path | None, seed: int) -> None:
        self._lab = federation
        self._network = network
        self._disk = disk
        self._draw = random.Random(seed)
        self.happened: list[str] = []
        self.kills = 0

    def strike(self) -> None:
        actions = [self._kill_server, self._kill_agent, self._kill_worker, self._cut, self._stall]
        if self._disk is not None:
            actions.append(self._fill)
        action = self._draw.choice(actions)
        site = self._draw.choice(SITES)
        self.happened.append(f"{action.__name__.strip('_')} {site}")
        action(site)

    def pause(self, most_s: float) -> None:
        time.sleep(self._draw.uniform(0.0, most_s))

    def _kill_server(self, site: str) -> None:
        self._lab.kill(SERVER)
        self.pause(1.0)
        self._lab.start(SERVER)

    def _kill_agent(self, site: str) -> None:
        self.kills += 1
        self._lab.kill(site)
        self.pause(1.0)
        self._lab.start(site)

    def _kill_worker(self, site: str) -> None:
        for worker in psutil.Process(self._lab.pid(site)).children():
            self.kills += 1
            worker.kill()

    def _cut(self, site: str) -> None:
        self._network.do(self._network.relays[site].cut)

    def _stall(self, site: str) -> None:
        self._network.do(self._network.relays[site].stall)
        time.sleep(2 * STALL_S)
        self._network.do(self._network.relays[site].flow)

    def _fill(self, site: str) -> None:
        assert self._disk is not None
        with contextlib.suppress(OSError), (self._disk / "ballast").open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        self.pause(2.0)
        (self._disk / "ballast").unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of 200 MB, or None where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def through(federation: Lab, network: Network) -> None:
    """Have every site reach the server through its relay."""
    for site in federation.sites:
        settings = federation.folder(site) / "site.toml"
        there = f"127.0.0.1:{network.relays[site].port}"
        text = settings.read_text().replace(f'"{federation.address}"', f'"{there}"')
        settings.write_text(f"stall_s = {STALL_S}\n{text}")
        federation.restart(site)


def finished(federation: Lab, id: str, storm: Storm) -> str:
    """Wait for the job's end, striking now and then meanwhile; return its state and error."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            line = federation.federation.job(id).line
        except HansaError:
            continue
        if line.state not in ("queued", "running"):
            return f"{line.state} {line.error}".strip()
        if len(storm.happened) < ACTIONS:
            storm.pause(0.5)
            storm.strike()
        else:
            time.sleep(0.1)
    return "not finished"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disturbed_job_ends_with_the_bits_of_an_undisturbed_one(seed, tmp_path, undisturbed):
    """Every third seed has the model go from site to site."""
    job = job_at(tmp_path)
    if seed % 3 == 0:
        job = job_at(tmp_path, "cyclic")
        undisturbed = run(job_at(tmp_path / "calm", "cyclic")).report["model"]["sha256"]
    settings = {"lease_s": 60.0, "stall_s": STALL_S}
    with small_disk(tmp_path / "disk") as disk:
        root = (disk or tmp_path) / "lab"
        with lab(job, directory=root, settings=settings) as federation:
            network = Network(int(federation.address.rpartition(":")[2]))
            try:
                through(federation, network)
                storm = Storm(federation, network, disk, seed)
                id = federation.federation.submit(federation.job)
                state = finished(federation, id, storm)
                told = f"seed {seed}: {', '.join(storm.happened)}"
                logs = {name: federation.log(name).read_text() for name in federation.names}
                ends = "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in logs.items())
                assert state == "finished", f"{told}\n{state}\n{ends}"
                federation.federation.download(id, tmp_path / "results", names=["report.json"])
            finally:
                network.close()
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    trained = Counter((tmp_path / "trained.txt").read_text().splitlines())
    again = sum(count - 1 for count in trained.values())
    no_room = sum(len(NO_ROOM.findall(text)) for text in logs.values())
    assert report["model"]["sha256"] == undisturbed, told
    assert all(set(record["accepted"]) == set(SITES) for record in report["rounds"]), told
    lost = f"{storm.kills} kills and {no_room} attempts that lacked room"
    assert again <= storm.kills + no_room, f"{told}: {again} rounds were trained again after {lost}"


def test_a_clock_that_steps_changes_nothing(tmp_path, monkeypatch):
    """Server and agents see the clock jump by days, forward and back, while they work.

    Whatever asks for the time reads a file then, so a round takes ten times as long: there are few of them.
    """
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0s\n")
    few = {"rounds": 4, "size": 4_000}
    undisturbed = run(job_at(tmp_path / "calm", **few)).report["model"]["sha256"]
    for name, value in {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    job = job_at(tmp_path, **few)
    with lab(job, directory=tmp_path / "lab") as federation:
        steps = iter(["+3d", "-60s", "+30d"])
        id = federation.federation.submit(federation.job)
        for event in federation.federation.follow(id):
            if event.kind == "round":
                clock.write_text(next(steps, "+2d") + "\n")
        view = federation.federation.job(id)
        assert view.line.state == "finished", view.line.error
        federation.federation.download(id, tmp_path / "results", names=["report.json"])
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    trained = Counter((tmp_path / "trained.txt").read_text().splitlines())
    assert report["model"]["sha256"] == undisturbed
    assert set(trained.values()) == {1}
    days = {event.time[:10] for event in log_of(tmp_path / "lab" / SERVER, id)}
    assert len(days) > 1, "the server's clock did not step"


def log_of(directory: Path, id: str) -> list[EventRow]:
    store = Store.view(None, directory)
    try:
        return store.events(id)
    finally:
        store.close()
