# SPDX-License-Identifier: Apache-2.0
"""The same rounds deployed with Hansa, NVIDIA FLARE and Flower, one after another, on loopback (Linux); settings in
README.md.

python benchmarks/peers.py --flare VENV --flower VENV [--mib 1] [--tensor-mib 64] [--sites 4] [--rounds 5] [--dir .]

VENV is a virtual environment with nvflare or flwr installed; a peer without one is left out. Each platform is started
as its documents say, each process for itself, runs FedAvg over a float32 model that its sites hold as NumPy arrays and
multiply by a constant (`peer_apps/`), and is ended.

A round is from the moment at which the first site's training code holds its model to the same moment of the next
round; the first round is not counted, and one more ends the last that is. Memory is the proportional set size (PSS)
of all of the platform's processes together, every 0.25 s; the processor cores that other work used are those busy in
the 2 s before.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from hansa.core import config
from hansa.lab import lab

APPS = Path(__file__).absolute().parent / "peer_apps"
MIB = 1 << 20
LIMIT_S = 900.0  # of one command; a platform that hangs does not hang this
PR_SET_CHILD_SUBREAPER = 36
SUBMITTERS: set[int] = set()
"""The processes that prepare or submit, which are no part of a platform's memory: Hansa's are in this process."""

FLARE_PROJECT = """
api_version: 3
name: peers
description: benchmark
participants:
- {{name: localhost, type: server, org: bench, fed_learn_port: {port}}}
- {{name: admin@bench.org, type: admin, org: bench, role: project_admin}}
{sites}
builders:
- {{path: nvflare.lighter.impl.workspace.WorkspaceBuilder, args: {{template_file: [master_template.yml]}}}}
- {{path: nvflare.lighter.impl.static_file.StaticFileBuilder, args: {{config_folder: config}}}}
- {{path: nvflare.lighter.impl.cert.CertBuilder}}
- {{path: nvflare.lighter.impl.signature.SignatureBuilder}}
"""

FLOWER_PROJECT = """
[project]
name = "peers"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
[tool.flwr.app.config]
mib = {mib}
tensor-mib = {tensor_mib}
sites = {sites}
rounds = {rounds}
stamps = "{stamps}"
"""


def hansa(arguments: argparse.Namespace, folder: Path) -> None:
    """A server and its sites, each with a worker, over mutual TLS."""
    values = {
        "name": "peers",
        "rounds": arguments.rounds,
        "recipe": {
            "name": "hansa_site:build",
            "sites": arguments.sites,
            "mib": arguments.mib,
            "tensor_mib": arguments.tensor_mib,
            "stamps": str(folder / "stamps"),
        },
        "evaluation": {"every": 0},
        "baselines": {"base": False, "local": False},
        "output": {"dir": str(folder / "runs"), "keep": 1},
        "directory": str(folder),
    }
    with lab(config.parse(values), directory=folder / "lab") as federation:
        view = federation.federation.wait(federation.federation.submit(federation.job))
    if view.line.state != "finished":
        raise SystemExit(f"The job {view.line.state}: {view.line.error}")


def flare(arguments: argparse.Namespace, folder: Path) -> None:
    """A provisioned server and clients over mutual TLS; the job's training script runs in the client's job process."""
    binaries = arguments.flare.absolute() / "bin"
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}"}
    values = np.random.default_rng(0).normal(size=round(arguments.mib * MIB) // 4).astype(np.float32)
    np.save(folder / "model.npy", values)
    sites = [f"site-{i}" for i in range(1, arguments.sites + 1)]
    lines = "\n".join(f"- {{name: {site}, type: client, org: bench}}" for site in sites)
    (folder / "project.yml").write_text(FLARE_PROJECT.format(port=free_port(), sites=lines))
    provision = [str(binaries / "nvflare"), "provision", "-p", "project.yml", "-w", "kits", "--force"]
    ended(provision, folder, environment)
    kits = folder / "kits" / "peers" / "prod_00"
    own = kits / "localhost" / "local"  # its defaults keep jobs in a place that all servers of a machine share
    resources = (own / "resources.json.default").read_text()
    (own / "resources.json").write_text(resources.replace("/tmp/nvflare", str(folder / "store")))
    for name in ("localhost", *sites):
        started(name, ["bash", str(kits / name / "startup" / "sub_start.sh"), "--once"], folder, environment)
    job = [str(binaries / "python"), str(APPS / "flare_job.py"), str(folder)]
    ended([*job, str(arguments.sites), str(arguments.rounds)], folder, environment)


def flower(arguments: argparse.Namespace, folder: Path) -> None:
    """A SuperLink with a server's certificate, and SuperNodes that hold its root; TLS is not mutual."""
    binaries = arguments.flower.absolute() / "bin"
    environment = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    ended(["openssl", "req", "-x509", *curve, *files], folder, environment)
    port = free_port()
    address = f"127.0.0.1:{port}"
    (folder / "home").mkdir()
    superlink = {"address": address, "root-certificates": certificate}
    settings = [f"{name} = {json.dumps(value)}" for name, value in superlink.items()]
    (folder / "home" / "config.toml").write_text(
        "\n".join(["[superlink]", 'default = "bench"', "[superlink.bench]", *settings, ""])
    )
    app = folder / "app"
    app.mkdir()
    (app / "flower_app.py").write_text((APPS / "flower_app.py").read_text())
    tensor_mib = float(min(arguments.tensor_mib, arguments.mib))
    (app / "pyproject.toml").write_text(
        FLOWER_PROJECT.format(
            mib=float(arguments.mib),
            tensor_mib=tensor_mib,
            sites=arguments.sites,
            rounds=arguments.rounds,
            stamps=folder / "stamps",
        )
    )
    tls = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", certificate]
    listen = ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    started("superlink", [str(binaries / "flower-superlink"), *tls, *listen], folder, environment)
    wait_for(port)
    for i in range(1, arguments.sites + 1):
        reach = ["--superlink", address, "--root-certificates", certificate, "--port", str(free_port())]
        node = [str(binaries / "flower-supernode"), *reach, "--node-config", f'site="site-{i}"']
        started(f"site-{i}", node, folder, environment)
    ended([str(binaries / "flwr"), "run", str(app), "--stream"], folder, environment)


def started(name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    with (folder / f"{name}.log").open("w") as log:
        subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)


def ended(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Run a command to its end; what it said is shown if it failed."""
    said = folder / "command.log"
    with said.open("w") as log:
        running = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log)
    SUBMITTERS.add(running.pid)
    if running.wait(LIMIT_S):
        raise SystemExit(f"{' '.join(command)} failed:\n{said.read_text()[-4000:]}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def memory(pid: int) -> tuple[int, int]:
    """Return a process's proportional set size and the anonymous part of it in bytes; zeros when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss")}
    return found.get("Pss", 0), found.get("Pss_Anon", 0)


class Watch:
    """Peak memory of this process's descendants, and the most there were at once."""

    def __init__(self) -> None:
        self.pss = 0
        self.anonymous = 0
        self.processes = 0
        self._stop = threading.Event()

    def sample(self) -> None:
        while not self._stop.wait(0.25):
            children = psutil.Process().children(recursive=True)
            seen = [memory(child.pid) for child in children if child.pid not in SUBMITTERS]
            self.pss = max(self.pss, sum(pss for pss, _ in seen))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in seen))
            self.processes = max(self.processes, sum(pss > 0 for pss, _ in seen))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        thread = threading.Thread(target=self.sample)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


@contextmanager
def nothing_left() -> Iterator[None]:
    """End every process that the body started, orphans too: they fall to this one, their subreaper."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        for end in (psutil.Process.terminate, psutil.Process.kill):
            children = psutil.Process().children(recursive=True)
            for child in children:
                try:
                    end(child)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(children, timeout=10)


def seconds_a_round(stamps: Path, sites: int, rounds: int) -> list[float]:
    times = [[float(line) for line in path.read_text().split()] for path in sorted(stamps.iterdir())]
    if [len(of_site) for of_site in times] != [rounds] * sites:
        raise SystemExit(f"{sites} sites were to train {rounds} rounds; they did {[len(site) for site in times]}.")
    firsts = [min(of_round) for of_round in zip(*times, strict=True)]
    return [after - before for before, after in itertools.pairwise(firsts[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flare", type=Path)
    parser.add_argument("--flower", type=Path)
    parser.add_argument("--mib", type=float, default=1.0)
    parser.add_argument("--tensor-mib", type=float, default=64.0)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path())
    arguments = parser.parse_args()
    arguments.rounds += 2
    sys.path.append(str(APPS))
    platforms: dict[str, Callable[[argparse.Namespace, Path], None]] = {"Hansa": hansa}
    platforms |= {"FLARE": flare} if arguments.flare else {}
    platforms |= {"Flower": flower} if arguments.flower else {}
    print(
        f"{arguments.mib:g} MiB, {arguments.sites} sites, {arguments.rounds - 2} rounds\n"
        "| platform | s a round, median | least | most | to Hansa's | processes | peak PSS, MiB | to Hansa's "
        "| anonymous | cores others used |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    own: tuple[float, int] | None = None
    for name, run in platforms.items():
        busy = psutil.cpu_percent(2.0) * psutil.cpu_count() / 100
        watch = Watch()
        with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
            folder = Path(temporary).absolute()
            (folder / "stamps").mkdir()
            with nothing_left(), watch.sampling():
                run(arguments, folder)
            times = seconds_a_round(folder / "stamps", arguments.sites, arguments.rounds)
        median = statistics.median(times)
        own = own or (median, watch.pss)
        print(
            f"| {name} | {median:.3f} | {min(times):.3f} | {max(times):.3f} | {median / own[0]:.1f} "
            f"| {watch.processes} | {watch.pss / MIB:.0f} | {watch.pss / own[1]:.1f} | {watch.anonymous / MIB:.0f} "
            f"| {busy:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
