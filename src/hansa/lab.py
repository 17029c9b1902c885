# SPDX-License-Identifier: Apache-2.0
"""A whole federation on this machine: a server and its sites as real processes over real TLS, for one job.

    with lab(job, sites=4) as federation:        # provisioned, started, all sites joined
        run = federation.run()                   # a run folder, as `hansa run` makes one
        federation.kill("site-2")                # SIGKILL; federation.start("site-2") brings it back

What is in the folder: ``authority/``, ``server/``, ``sites/NAME/``, ``users/lead/`` as `hansa provision` makes them,
and ``processes/NAME.log`` and ``NAME.pid``. Every process has a session of its own and its port for life.

No process outlives the lab. Each holds the reading end of a pipe whose other end only the lab's process has: when
that ends, by whatever means (SIGKILL too), the kernel closes the pipe, and each ends itself with its group; workers
that train see their agent go in the same way. Under ``keep`` there is no pipe, and :func:`down` ends them: the file
``NAME.pid`` is locked while its process lives, so no other process that got its number is ended in its place.

| case | result |
|---|---|
| a process that does not start, a site that can't join | the error it ended with, or SiteError with its log's end |
| an error in the body, Ctrl-C | everything is ended, then the error goes on |
| the folder is temporary | it is deleted at the end; a folder that was named stays |
| ``sites`` is not what the job says | JobError that says what to change |
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import runpy
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from hansa import errors, registry
from hansa.core import storage
from hansa.core.config import Choice, Job
from hansa.errors import HansaError, JobError, MissingExtraError, SiteError
from hansa.federation import FILE as CLIENT_FILE
from hansa.federation import Federation, failure
from hansa.pki import provision as pki
from hansa.runs import run as runs
from hansa.runs.masking import settled
from hansa.runs.progress import Progress, Silent
from hansa.runs.run import Run
from hansa.server.compute import Compute
from hansa.sinks import report as pages

LEAD = "lead"
SERVER = "server"
"""What the server is called among the processes; no site may be called so."""

START_S = 60.0
STOP_S = 20.0

_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from hansa.lab import attend; attend(sys.argv[1], int(sys.argv[3]), sys.argv[4:])"
)
_LOG_LINES = 15


@contextlib.contextmanager
def lab(
    job: Job,
    *,
    sites: int | None = None,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> Iterator[Lab]:
    """Bring up a federation for ``job``, and take it down at the end.

    Args:
        job: what it is for; it says who the sites are.
        sites: how many; sets what the job leaves open, and must agree with the rest.
        directory: where to; a temporary folder, deleted at the end, by default.
        settings: of ``server.toml``, e.g. ``{"lease_s": 5.0}``.
        keep: leave it running when the body ends without an error.
        progress: shows what happens.

    Raises:
        JobError: the job or ``sites`` is wrong.
        StorageError: the folder is in use.
        HansaError: what the recipe raises, or what a process ended with.
    """
    told = progress or Silent()
    told.stage("making the federation", 0)
    temporary = None if directory is not None or keep else tempfile.mkdtemp(prefix="hansa-lab-")
    root = directory or Path(temporary or tempfile.mkdtemp(prefix="hansa-lab-"))
    try:
        job, names = _with_sites(job, sites)
        job = settled(job, len(names))
        made = Lab(job, root.absolute(), names, settings or {}, keep=keep)
        try:
            told.stage(f"starting the server and {len(names)} sites", 0)
            made.up()
            with made:
                yield made
        except BaseException:  # let go of what was begun; raised again
            made.down()
            raise
        if not keep:
            made.down()
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class Lab:
    """A federation on this machine; :func:`lab` makes one.

    Attributes:
        job: the job, its sites settled.
        directory: the folder of it all.
        names: the processes: ``server``, and each site by name.
        address: HOST:PORT of the server, the same for its life.
        federation: the lead's view of it: submit, follow, download.
    """

    def __init__(
        self, job: Job, directory: Path, sites: Sequence[str], settings: Mapping[str, Any], *, keep: bool
    ) -> None:
        if SERVER in sites:
            raise JobError(f"A site is called {SERVER!r}, which is what a lab calls its server. Rename the site.")
        self.job = job
        self.directory = directory
        self.names = (SERVER, *sites)
        self.address = ""
        self.federation: Federation
        chosen = (job.strategy, job.workflow, *job.filters)
        named = sorted({choice.name for choice in chosen if ":" in choice.name})
        policy = {"signers": [LEAD], "modules": named, "job_paths": True}
        self._settings = {"policy": policy, **settings}
        self._keep = keep
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        pki.provision(directory, "lab", f"127.0.0.1:{pki.DEFAULT_PORT}", sites, [LEAD])
        self._states.mkdir()
        self._life: tuple[int, int] | None = None if keep else os.pipe()
        self._write(directory / SERVER / "server.toml", {"listen": "127.0.0.1:0", "http": "off", **self._settings})

    def __enter__(self) -> Lab:
        self.federation = Federation(self.user).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.federation.__exit__(*exception)

    @property
    def user(self) -> Path:
        """The kit of the lead who submits."""
        return self.directory / "users" / LEAD

    @property
    def _states(self) -> Path:
        return self.directory / "processes"

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites' names."""
        return self.names[1:]

    def folder(self, name: str) -> Path:
        """Return the folder of the server or a site."""
        return self.directory / SERVER if name == SERVER else self.directory / "sites" / name

    def log(self, name: str) -> Path:
        """Return the file with what a process has said."""
        return self._states / f"{name}.log"

    def pid(self, name: str) -> int:
        """Return the id of a process that was started; it leads a group, and a session, of its own."""
        return self._processes[name].pid

    def alive(self, name: str) -> bool:
        """Say whether a process is there."""
        return name in self._processes and self._processes[name].poll() is None

    def up(self) -> None:
        """Start the server, then all sites at once, and wait until all have joined."""
        told = self.start(SERVER)
        self.address = f"127.0.0.1:{told['port']}"
        self._write(self.directory / SERVER / "server.toml", {"listen": self.address, "http": "off", **self._settings})
        self._write(self.user / CLIENT_FILE, {"server": self.address})
        policy = {"recipes": [self.job.recipe.name], "signers": [LEAD], "job_paths": True}
        for name in self.sites:
            self._write(self.folder(name) / "site.toml", {"server": self.address, "policy": policy})
            self.start(name, wait=False)
        for name in self.sites:
            self.wait(name)

    @staticmethod
    def _write(path: Path, values: Mapping[str, Any]) -> None:
        """Write settings; JSON values of one line are TOML, and the one table stands last."""
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        storage.write_atomic(path, ("\n".join(lines) + "\n").encode())

    def start(self, name: str, *, wait: bool = True) -> dict[str, Any]:
        """Start the server or a site, again or for the first time.

        Args:
            name: which.
            wait: until it serves, or has joined; else `wait` does that later.

        Returns:
            what it said when it was ready; nothing if not waited for.

        Raises:
            HansaError: the one it ended with.
        """
        assert not self.alive(name), f"{name} is running"
        reading = -1 if self._life is None else self._life[0]
        words = [SERVER if name == SERVER else "site", "start", str(self.folder(name)), "--json"]
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _CODE,
                    str(self._states / f"{name}.pid"),
                    json.dumps([entry or str(Path.cwd()) for entry in sys.path]),
                    str(reading),
                    *words,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[] if reading < 0 else [reading],
                start_new_session=True,
            )
        return self.wait(name) if wait else {}

    def wait(self, name: str) -> dict[str, Any]:
        """Wait until a process that was started is ready, and return what it said.

        Raises:
            HansaError: the one it ended with.
            SiteError: it was not ready within ``START_S``.
        """
        process = self._processes[name]
        assert process.stdout is not None
        text = _first_document(process.stdout.fileno(), time.monotonic() + START_S)
        if text is None:
            raise SiteError(f"{name} is not ready after {START_S:g} s.{self._last_lines(name)}")
        try:
            told = json.loads(text)
        except ValueError:
            told = {}
        if "error" in told:
            kind = getattr(errors, told["error"]["kind"], HansaError)
            raise kind(f"{name}: {told['error']['message']}")
        if not told:
            raise SiteError(f"{name} ended with code {process.wait()} before it was ready.{self._last_lines(name)}")
        return dict(told)

    def _last_lines(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(["", f"The last lines of {self.log(name)}:", *lines])

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process alone, not to its workers."""
        self._processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """End a process by SIGKILL, and wait until it has gone; its workers see that and end themselves."""
        self.signal(name, signal.SIGKILL)
        self._gone(name)

    def stop(self, name: str) -> None:
        """End a process by SIGTERM, and wait until it has gone; by SIGKILL if it does not."""
        self.signal(name, signal.SIGTERM)
        try:
            self._processes[name].wait(STOP_S)
        except subprocess.TimeoutExpired:
            _kill_group(self.pid(name))
        self._gone(name)

    def _gone(self, name: str) -> None:
        process = self._processes[name]
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def restart(self, name: str) -> None:
        """Stop a process and start it again."""
        self.stop(name)
        self.start(name)

    def down(self) -> None:
        """End everything: the sites first, so that they say good-bye to a server that hears it."""
        for names in (self.sites, (SERVER,)):
            running = [name for name in names if self.alive(name)]
            for name in running:
                self.signal(name, signal.SIGCONT)
                self.signal(name, signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            for name in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._processes[name].wait(max(0.0, deadline - time.monotonic()))
                _kill_group(self.pid(name))
                self._gone(name)
        if self._life is not None:
            for end in self._life:
                os.close(end)
            self._life = None

    def run(self, progress: Progress | None = None) -> Run:
        """Submit the job, wait for it, and fetch what it gave into a run folder in the job's ``output.dir``.

        Raises:
            HansaError: of the kind that the job failed of at the server.
        """
        told = progress or Silent()
        run = Run(runs.create(self.job))
        told.say(f"Run {run.id} in {run.directory}")
        with runs.locked(run.directory), runs.status(run.directory):
            id = self.federation.submit(_with_absolute_paths(self.job))
            view = self.federation.watch(id, told)
            error = failure(view.line)
            if error is not None:
                raise error
            told.stage("fetching the results", 0)
            own = ("job.json", "run.json", "report.html")
            self.federation.download(id, run.directory, names=[name for name in view.files if name not in own])
            report = {**run.report, "run": run.id, "job": self.job.model_dump(mode="json")}
            storage.write_json(run.directory / "report.json", report)
            try:
                pages.write(run.directory, report)
            except MissingExtraError as missing:
                told.say(f"report.json is written, report.html is not. {missing.message}")
        return run


def down(directory: Path) -> list[str]:
    """End the processes of a lab that was kept, and return their names.

    Raises:
        JobError: there is no lab in the folder.
    """
    states = directory / "processes"
    if not states.is_dir():
        raise JobError(f"There is no lab in {directory}. `hansa lab up --keep` says where it puts one.")
    running = {path.stem: pid for path in sorted(states.glob("*.pid")) if (pid := _holder(path)) is not None}
    for pid in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for name, pid in running.items():
        while _holder(states / f"{name}.pid") == pid:
            if time.monotonic() > deadline:
                _kill_group(pid)
            time.sleep(0.02)
    return sorted(running)


def attend(pid_file: str, life: int, words: Sequence[str]) -> None:
    """Be one of a lab's processes: `hansa WORDS`, for as long as the lab is there.

    Args:
        pid_file: the file to lock and to write this process's id to.
        life: the reading end of the lab's pipe; negative to outlive it.
        words: the command.
    """
    file = Path(pid_file).open("a+")  # noqa: SIM115 - held, with its lock, until the process ends
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    if life >= 0:
        threading.Thread(target=_end_with_the_lab, args=(life,), daemon=True).start()
    sys.argv = ["hansa", *words]
    runpy.run_module("hansa.cli.main", run_name="__main__")


def _end_with_the_lab(life: int) -> None:
    os.read(life, 1)  # nothing is ever written: it ends when the last writer has
    _kill_group(os.getpgrp())


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _holder(path: Path) -> int | None:
    """Return the id of the process that holds the file's lock, or None if none does."""
    with contextlib.suppress(FileNotFoundError, ValueError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read())
    return None


def _first_document(descriptor: int, deadline: float) -> str | None:
    """Return what a process says on stdout up to its first line, or to its end if that is an error; None in time."""
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not (data.endswith(b"\n") and data.count(b"\n") == 1 and data.startswith(b'{"')):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            block = os.read(descriptor, 65536)
            if not block:
                break
            data += block
    return data.decode(errors="replace")


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _with_sites(job: Job, count: int | None) -> tuple[Job, list[str]]:
    """Return the job with as many sites as it is to have, where it leaves that open, and their names."""
    if count is not None and job.partition is not None:
        made = registry.load("partitions", job.partition.name)
        if "sites" in signature(made).parameters and "sites" not in job.partition.options:
            job = job.model_copy(update={"partition": _with_option(job.partition, "sites", count)})
    elif count is not None and job.recipe.name == "script" and job.data is None and "sites" not in job.recipe.options:
        job = job.model_copy(update={"recipe": _with_option(job.recipe, "sites", count)})
    names = sorted(asyncio.run(_sites_of(job)))
    if count is not None and len(names) != count:
        if job.partition is not None and "sites" in job.partition.options:
            change = f"--set partition.sites={count}"
        elif "sites" in job.recipe.options:
            change = f"--set recipe.sites={count}"
        else:
            change = "a [partition] of its data, or another data.train"
        raise JobError(
            f"The job has {len(names)} sites ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}), not {count}. "
            f"Leave --sites out, or give the job another number: {change}.",
            job=job.name,
        )
    return job, names


def _with_option(choice: Choice, name: str, value: Any) -> Choice:
    return Choice(name=choice.name, **{**choice.options, name: value})


async def _sites_of(job: Job) -> Sequence[str]:
    """Build the job's program in a process of its own and return its sites' names."""
    with tempfile.TemporaryDirectory(prefix="hansa-") as folder:
        async with Compute(job, Path(folder)) as program:
            return program.sites


def _with_absolute_paths(job: Job) -> Job:
    """Return the job with paths that its sites find from their own folders, which lie on this machine."""
    changes: dict[str, Any] = {}
    if job.data is not None:
        spec = {name: _absolute(job, getattr(job.data, name)) for name in ("train", "test")}
        changes["data"] = job.data.model_copy(update=spec)
    local = {
        name: str(job.path(value).absolute())
        for name in ("base", "tokenizer")
        if (value := getattr(job.model, name)) is not None and job.path(value).exists()
    }
    changes["model"] = job.model.model_copy(update=local)
    return job.model_copy(update=changes)


def _absolute(job: Job, spec: Any) -> Any:
    if isinstance(spec, Mapping):
        return {site: _absolute(job, item) for site, item in spec.items()}
    if isinstance(spec, list):
        return [_absolute(job, item) for item in spec]
    if spec is None or spec.startswith("site:"):
        return spec
    assert job.data is not None
    there = job.data.format != "hub" or job.path(spec.partition(":")[0]).is_dir()
    return str(job.path(spec).absolute()) if there else spec
