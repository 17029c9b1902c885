# SPDX-License-Identifier: Apache-2.0
"""Files over mutual TLS on loopback, beside the floor: a bare TLS socket, with hash and disk; settings in README.md.

python benchmarks/transport.py [--mib 1024] [--repeat 3] [--clients 1]
python benchmarks/transport.py --mib 64 --repeat 5 --delay-ms 100 --mbit 800     what a file uses of such a link

Server and clients are processes of their own; this one times them and samples /proc/PID/status every 10 ms. Over the
link one process sends a file several times, a second apart: first it has to dial, then it has dialled ahead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from blake3 import blake3

from hansa.pki.authority import Authority
from hansa.pki.identity import Identity, Role
from hansa.pki.kit import Kit
from hansa.transport.client import Connection
from hansa.transport.memory import tune_allocator
from hansa.transport.messages import Attend, Done, Follow, Get, JobEvent, Message, Offer, Ring
from hansa.transport.pieces import Incoming, Manifest, describe
from hansa.transport.server import Destination, serve
from slow_link import SlowLink

MIB = 1 << 20
KINDS = ("bare socket", "bare hash+disk", "hansa")


class Depot:
    """Keeps what is sent in a folder of its sender's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = describe(folder / "file")

    async def call(self, caller: Identity, request: Message) -> Message:
        return Done()

    async def attend(self, caller: Identity, request: Attend) -> AsyncIterator[Ring]:
        yield Ring(0, 0, 30.0)

    async def follow(self, caller: Identity, request: Follow) -> AsyncIterator[JobEvent]:
        yield JobEvent(0, "", "", "")

    async def source(self, caller: Identity, request: Get) -> tuple[Path, Manifest]:
        return self.folder / "file", self.manifest

    def sent(self, caller: Identity, num_bytes: int) -> None:
        pass

    async def offered(self, caller: Identity, offer: Offer) -> Destination | None:
        return Destination(self.folder / f"up-{caller.name}", 1 << 40, 1 << 28)

    async def received(self, caller: Identity, offer: Offer, incoming: Incoming) -> None:
        pass


def told() -> str:
    """Wait for the parent's next line."""
    return sys.stdin.readline().strip()


async def be_server(folder: Path) -> None:
    server = await serve(Depot(folder), Kit(folder / "server"), "127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.to_thread(told)
    await server.stop()


async def be_client(folder: Path, port: str, name: str, direction: str) -> None:
    manifest = describe(folder / "file")
    async with Connection(Kit(folder / name), f"127.0.0.1:{port}", proxy="") as connection:
        print("ready", flush=True)
        await asyncio.to_thread(told)
        if direction == "up":
            await connection.upload("j", "t", folder / "file", manifest)
        else:
            await connection.download("j", manifest.digest, folder / f"down-{name}")
        print("done", flush=True)
        await asyncio.to_thread(told)


async def be_repeater(folder: Path, port: str, repeat: str) -> None:
    """Send a file and fetch it, again and again, each time another to the other side; tell the seconds."""
    manifest = describe(folder / "file")
    for direction in ("up", "down"):
        async with Connection(Kit(folder / "s00"), f"127.0.0.1:{port}", proxy="") as connection:
            for _ in range(int(repeat)):
                began = time.perf_counter()
                if direction == "up":
                    await connection.upload("j", "t", folder / "file", manifest)
                else:
                    await connection.download("j", manifest.digest, folder / "down-s00", durable=False)
                print(time.perf_counter() - began, flush=True)
                (folder / f"{direction}-s00").unlink()
                await asyncio.sleep(1.0)


def bare(folder: Path, name: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cadata=Kit(folder / name).authority_pem().decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / name / "certificate.pem", folder / name / "key.pem")
    return context


def take(connection: ssl.SSLSocket, path: Path, work: bool) -> None:
    """Receive a file: into one buffer; with ``work`` each MiB is hashed and written, and the file made durable."""
    buffer = memoryview(bytearray(MIB))
    with path.open("wb", buffering=0) as file:
        full = True
        while full:
            filled = 0
            while filled < MIB and (count := connection.recv_into(buffer[filled:])):
                filled += count
            if work:
                blake3(buffer[:filled]).digest()
                file.write(buffer[:filled])
            full = filled == MIB
        if work:
            os.fsync(file.fileno())


def give(connection: ssl.SSLSocket, path: Path, work: bool) -> None:
    """Send a file, read a MiB at a time; without ``work`` as many bytes that are no file's."""
    with path.open("rb", buffering=0) as file:
        block = bytearray(MIB)
        for _ in range(0, os.fstat(file.fileno()).st_size, MIB):
            if work:
                file.readinto(block)
            connection.sendall(block)
    connection.unwrap()


def be_bare_server(folder: Path, work: bool, direction: str, clients: str) -> None:
    """Serve each client in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    context = bare(folder, "server", ssl.Purpose.CLIENT_AUTH)

    def serve_one(plain: socket.socket, number: int) -> None:
        connection = context.wrap_socket(plain, server_side=True)
        if direction == "up":
            take(connection, folder / f"bare-{number}", work)
            connection.unwrap()
        else:
            connection.recv(1)
            give(connection, folder / "file", work)

    threads = []
    for number in range(int(clients)):
        threads.append(threading.Thread(target=serve_one, args=(listener.accept()[0], number)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    told()


def be_bare_client(folder: Path, port: str, name: str, work: bool, direction: str) -> None:
    context = bare(folder, name, ssl.Purpose.SERVER_AUTH)
    server = Kit(folder / name).server_name
    connection = context.wrap_socket(socket.create_connection(("127.0.0.1", int(port))), server_hostname=server)
    print("ready", flush=True)
    told()
    if direction == "up":
        give(connection, folder / "file", work)
    else:
        connection.sendall(b"g")
        take(connection, folder / f"bare-{name}", work)
        connection.unwrap()
    print("done", flush=True)
    told()


class Sampler:
    """The largest RssAnon of processes while it runs, MiB."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peaks = dict.fromkeys(pids, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            for pid in self.peaks:
                text = Path(f"/proc/{pid}/status").read_text()
                anonymous = int(text.split("RssAnon:")[1].split()[0]) / 1024
                self.peaks[pid] = max(self.peaks[pid], anonymous)


def child(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    text = process.stdout.readline().strip()
    assert text, "a process failed"
    return text


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def cpu(process: subprocess.Popen[str]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def measured(folder: Path, path: str, clients: int, mib: int) -> tuple[float, float, float, float, float]:
    """Return GB/s, CPU s/GiB of server and of clients, peak RssAnon in MiB of the server and of the largest client."""
    kind, _, direction = path.rpartition(" ")
    kind = kind.replace(" ", "-")
    server = child(f"{kind}-server", str(folder), direction, str(clients))
    port = line(server)
    dialled = [child(f"{kind}-client", str(folder), port, f"s{i:02d}", direction) for i in range(clients)]
    for process in dialled:
        line(process)
    everyone = [server, *dialled]
    before = [cpu(process) for process in everyone]
    with Sampler([process.pid for process in everyone]) as sampler:
        began = time.perf_counter()
        for process in dialled:
            tell(process)
        for process in dialled:
            line(process)
        seconds = time.perf_counter() - began
    used = [cpu(process) - start for process, start in zip(everyone, before, strict=True)]
    for process in everyone:
        tell(process)
        process.wait()
    for made in [*folder.glob("up-*"), *folder.glob("down-*"), *folder.glob("bare*")]:
        made.unlink()
    gib = clients * mib / 1024
    peaks = list(sampler.peaks.values())
    return gib * 1.073741824 / seconds, used[0] / gib, sum(used[1:]) / gib, peaks[0], max(peaks[1:])


def over_link(folder: Path, args: argparse.Namespace) -> None:
    """Print what a file takes over a link, and how much of the link's rate that is."""
    server = child("hansa-server", str(folder), "", "1")
    link = SlowLink(int(line(server)), args.delay_ms / 1000, args.mbit * 1e6 / 8)
    client = child("hansa-repeater", str(folder), str(link.port), str(args.repeat))
    alone = args.mib * MIB / (args.mbit * 1e6 / 8)
    print(f"The link alone: {alone:.2f} s\n| path | s, first | of the link | s, then, median | of the link |")
    print("|---|---|---|---|---|")
    for direction in ("up", "down"):
        first, *rest = (float(line(client)) for _ in range(args.repeat))
        median = statistics.median(rest)
        print(f"| {direction} | {first:.2f} | {alone / first:.0%} | {median:.2f} | {alone / median:.0%} |", flush=True)
    client.wait()
    link.close()
    tell(server)
    server.wait()


def provision(folder: Path, mib: int, clients: int) -> None:
    authority = Authority.create(folder / "authority", "lab")
    for i in range(clients):
        authority.issue(folder / f"s{i:02d}", Role.SITE, f"s{i:02d}")
    authority.issue(folder / "server", Role.SERVER, "main")
    rng = np.random.default_rng(0)
    with (folder / "file").open("wb") as file:
        for _ in range(mib):
            file.write(rng.bytes(MIB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1])
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--mbit", type=float, default=0.0)
    parser.add_argument("--role", nargs="+")
    args = parser.parse_args()
    if args.role:
        be(*args.role)
        return
    folder = Path(tempfile.mkdtemp(prefix="hansa-transport-"))
    try:
        provision(folder, args.mib, max(args.clients))
        if args.mbit:
            over_link(folder, args)
            return
        print(
            "| path | clients | GB/s, median (least to most) | server CPU s/GiB | client CPU s/GiB "
            "| peak RssAnon MiB, server | client |"
        )
        print("|---|---|---|---|---|---|---|")
        for clients in args.clients:
            for path in [f"{kind} {direction}" for direction in ("up", "down") for kind in KINDS]:
                runs = [measured(folder, path, clients, args.mib) for _ in range(args.repeat)]
                rates = [run[0] for run in runs]
                rest = [statistics.median(column) for column in list(zip(*runs, strict=True))[1:]]
                print(
                    f"| {path} | {clients} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) "
                    f"| {rest[0]:.2f} | {rest[1]:.2f} | {rest[2]:.0f} | {rest[3]:.0f} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder)


def be(role: str, folder: str, *args: str) -> None:
    tune_allocator()
    match role:
        case "hansa-server":
            asyncio.run(be_server(Path(folder)))
        case "hansa-client":
            asyncio.run(be_client(Path(folder), *args))
        case "hansa-repeater":
            asyncio.run(be_repeater(Path(folder), *args))
        case "bare-socket-server" | "bare-hash+disk-server":
            be_bare_server(Path(folder), "hash" in role, *args)
        case "bare-socket-client" | "bare-hash+disk-client":
            port, name, direction = args
            be_bare_client(Path(folder), port, name, "hash" in role, direction)


if __name__ == "__main__":
    main()
