# SPDX-License-Identifier: Apache-2.0
"""The owner's side of a worker process: start it, ask it, see it end.

A worker is started afresh, never forked. When its owner is killed the socket closes, and it ends with all it
started; when it dies itself, whatever it was asked ends in a SiteError that says how.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import msgspec

from hansa.errors import SiteError
from hansa.workers.messages import (
    FROM_WORKER,
    LENGTH,
    OUT_OF_MEMORY,
    Answer,
    Failed,
    Ready,
    Start,
    Summarise,
    Work,
    frame,
)

Devices = tuple[str, ...] | None
"""The GPUs that a worker sees, as in CUDA_VISIBLE_DEVICES; None leaves the variable as it is."""

INHERITED = frozenset(
    {"HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER"}
    | {"LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"}
    | {"CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}
    | {"HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"}
    | {"DONT_FAKE_MONOTONIC", "FAKETIME", "FAKETIME_NO_CACHE", "FAKETIME_TIMESTAMP_FILE"}
)
"""What a job's code gets of the environment of its agent or server: no tokens, no passwords, no proxies."""

_EXIT_S = 1.0
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from hansa.workers.process import main; main(int(sys.argv[1]))"
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


class Worker:
    """One process and its owner's end of the socket.

    Args:
        threads: how many CPU threads its libraries may use.
        log: the file that what it prints is appended to.
        devices: the GPUs it sees, as in CUDA_VISIBLE_DEVICES; None leaves the variable as it is.
        environment: what is set beside this process's own.
        inherited: names of variables that it gets from this process; all of them if None.
    """

    def __init__(
        self,
        threads: int,
        log: Path,
        devices: Devices = None,
        environment: Mapping[str, str] | None = None,
        inherited: Collection[str] | None = None,
    ) -> None:
        self.devices = devices
        self.ready = False
        self.started = False
        self.ending: str | None = None
        self.failure: Exception | None = None
        self.serving: asyncio.Task[None] | None = None
        self._log = log
        self._tickets = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._memory_bytes: int | None = None
        self.connection, theirs = socket.socketpair()
        own = {name: value for name, value in os.environ.items() if inherited is None or name in inherited}
        variables = {**own, **dict.fromkeys(_THREADS, str(threads)), **(environment or {})}
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(theirs.fileno()), json.dumps(_search_path())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def ticket(self) -> int:
        """Return a new number for a request."""
        return next(self._tickets)

    def call(self, request: Work | Summarise) -> asyncio.Future[Answer]:
        """Send a request; the future is its answer, or SiteError if the worker ends before it."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[request.ticket] = answer
        self.send(request)
        return answer

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; one to a worker that has ended is lost, and its end is noticed by the reader."""
        assert self._writer is not None
        self._writer.write(frame(message))

    async def serve(self, start: Start, on_ready: Callable[[Ready], None]) -> None:
        """Read what the worker says until it ends, and see to it that it has ended with all it started."""
        reader, self._writer = await asyncio.open_connection(sock=self.connection)
        self._memory_bytes = start.memory_bytes
        try:
            self.send(start)
            while True:
                message = FROM_WORKER.decode(await self._read(reader))
                if isinstance(message, Ready):
                    self.ready = self.started = True
                    on_ready(message)
                elif isinstance(message, Failed) and message.ticket == 0:
                    self.failure = message.as_error()
                    break
                else:
                    answer = self._answers.pop(message.ticket)
                    if not answer.done():
                        answer.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except msgspec.MsgspecError as error:
            self.ending = f"its worker sent a malformed answer ({error})"
        finally:
            self.ready = False
            self._writer.close()
            code = await asyncio.to_thread(self._reap)
            self._give_up(code)

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return await reader.readexactly(length)

    def _reap(self) -> int:
        """Wait for the process, and kill it, and whatever is left of what it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_S)
        self._kill_group()
        return self.process.wait()

    def kill(self, reason: str) -> None:
        """End the process and all it started at once; what it was doing is lost for ``reason``."""
        self.ending = self.ending or reason
        if self.process.returncode is None:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _give_up(self, code: int) -> None:
        if self.failure is None:
            self.failure = SiteError(
                self.ending or f"{_cause(code, self._memory_bytes)} (its output is in {self._log})"
            )
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self.failure)
        self._answers.clear()


def _search_path() -> list[str]:
    return [entry or str(Path.cwd()) for entry in sys.path]


def _cause(code: int, memory_bytes: int | None) -> str:
    if code == OUT_OF_MEMORY and memory_bytes is not None:
        return f"it needed more memory than it may take ({memory_bytes:,} bytes)"
    if code >= 0:
        return f"its worker exited with code {code}"
    name = signal.Signals(-code).name
    why = {
        "SIGKILL": "from outside, or by the system for want of memory",
        "SIGSEGV": "it crashed in native code",
        "SIGBUS": "it crashed in native code, or a mapped file shrank",
        "SIGABRT": "it crashed in native code",
    }.get(name)
    return f"its worker was ended by {name}" + (f": {why}" if why else "")
