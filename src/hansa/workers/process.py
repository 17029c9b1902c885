# SPDX-License-Identifier: Apache-2.0
"""A warm worker of the ``processes`` engine: it builds the program once, then carries plans out at sites.

A thread of its own listens, so a worker that trains still computes metrics for the engine, and ends with its
whole process group when the engine is gone, a killed engine included.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from hansa import registry
from hansa.core import wire
from hansa.core.config import Algorithm, Choice, Job, parse, secret_sums
from hansa.core.ports import Program
from hansa.core.tree import Lazy, Tree
from hansa.core.values import Absence, Plan
from hansa.errors import HansaError, NonFiniteError, StorageError
from hansa.workers.messages import (
    LENGTH,
    OUT_OF_MEMORY,
    TO_WORKER,
    Absent,
    Answer,
    Answered,
    Close,
    Done,
    Export,
    Initial,
    Inspect,
    Inspected,
    Metrics,
    Perform,
    Ready,
    Show,
    Shown,
    Start,
    Summarise,
    Work,
    failed,
    frame,
)
from hansa.workers.runner import Course, SiteRunner, is_out_of_memory, pin_threads, terms_from

_LOG = logging.getLogger("hansa.worker")


class _Line:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> Start | Work | Summarise | Close | None:
        """Return the next message, or None when the engine is gone."""
        try:
            head = self._file.read(LENGTH.size)
            body = self._file.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None
        except OSError:
            return None
        return None if body is None else TO_WORKER.decode(body)

    def send(self, message: msgspec.Struct) -> None:
        """Send ``message``; threads take turns."""
        with self._lock:
            self._connection.sendall(frame(message))


class _Worker:
    """The program, and how each request is answered."""

    def __init__(self, program: Program, start: Start) -> None:
        self.program = program
        self._bounded = start.memory_bytes is not None
        self._runner = SiteRunner(
            program,
            Path(start.directory),
            fatal=(StorageError, *([MemoryError] if self._bounded else [])),
            secure=None if start.secure is None else Path(start.secure),
        )
        self._plan: tuple[str, Plan] | None = None

    def answer(self, request: Work | Summarise) -> Answer:
        """Do what is asked; every error is an answer."""
        try:
            match request:
                case Perform():
                    return self._perform(request)
                case Initial():
                    pin_threads(request.threads)
                    with Path(request.out).open("wb") as file:
                        wire.write(file, "parameters", {}, {"params": self.program.initial()})
                case Inspect():
                    pin_threads(request.threads)
                    report = self.program.inspect(request.site)
                    return Inspected(request.ticket, dict(report.counts), dict(report.labels))
                case Export():
                    pin_threads(request.threads)
                    self.program.export(_read_params(request.params), Path(request.directory))
                case Show():
                    pin_threads(request.threads)
                    return Shown(request.ticket, dict(self.program.show(_read_params(request.params))))
                case Summarise():
                    return Metrics(request.ticket, self.program.summarise(request.sums))
        except Exception as error:  # the engine decides what an error of a program means
            if self._bounded and is_out_of_memory(error):  # a new worker has room again
                _LOG.exception("Out of memory")
                os._exit(OUT_OF_MEMORY)
            if isinstance(error, MemoryError):
                raise
            return failed(request.ticket, error)
        return Done(request.ticket)

    def _perform(self, request: Perform) -> Answer:
        pin_threads(request.threads)
        form = request.course
        course = Course(
            form.name,
            (),
            Algorithm.model_validate(form.strategy),
            tuple(Choice.model_validate(item) for item in form.filters),
            terms_from(form.terms),
            secret_sums(form.secure),
        )
        reply = self._runner.run(course, self._read(request.plan), request.site)
        if isinstance(reply, Absence):
            return Absent(request.ticket, reply.kind, reply.reason)
        if reply.parts:
            try:
                wire.spool(reply, Path(request.out))
            except NonFiniteError as error:
                return Absent(request.ticket, "refused", error.message)
            except StorageError:
                raise  # what becomes of it is the owner's to say
            except HansaError as error:
                return Absent(request.ticket, "lost", error.message)
        try:
            metrics = self.program.summarise(reply.sums)
        except Exception:  # noqa: BLE001 - asked for these sums again, the engine gets the error itself
            metrics = None
        return Answered(
            request.ticket,
            reply.site,
            reply.round,
            reply.version,
            reply.weight,
            dict(reply.sums),
            reply.completed,
            reply.seconds,
            bool(reply.parts),
            metrics,
            {name: list(points) for name, points in reply.logged.items()},
        )

    def _read(self, path: str) -> Plan:
        """Return the plan in a file; a small one is kept, as many sites get the same.

        A large one would stay open, and no file be made of it when it is needed no more (`storage.Spares`).
        """
        if self._plan is not None and self._plan[0] == path:
            return self._plan[1]
        plan, self._plan = wire.open_plan(Path(path)), None
        if not isinstance(plan.params, Lazy):
            self._plan = (path, plan)
        return plan


def _read_params(path: str) -> Tree:
    return wire.open_parts(Path(path))[1]["params"]


def _listen(line: _Line, tasks: queue.SimpleQueue[Work | None], worker: Callable[[], _Worker | None]) -> None:
    """Pass on what the engine says until it is gone, then end; whatever happens, no worker stays behind deaf."""
    try:
        while (message := line.receive()) is not None:
            match message:
                case Close():
                    tasks.put(None)
                case Summarise():
                    ready = worker()
                    assert ready is not None, "the engine asks after Ready"
                    line.send(ready.answer(message))
                case Start():
                    raise AssertionError("a worker starts once")
                case _:
                    tasks.put(message)
    except OSError:
        _LOG.info("The engine went while it was being answered.")
    except Exception:  # noqa: BLE001 - the thread would die in silence, and the worker would wait for ever
        _LOG.exception("A defect in a worker")
    _end_group()


def _end_group() -> None:
    """End this process and all it started, at once: the engine that they worked for is gone."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main(descriptor: int) -> None:
    """Serve the engine at the other end of the socket ``descriptor`` until it closes."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    line = _Line(socket.socket(fileno=descriptor))
    start = line.receive()
    if not isinstance(start, Start):
        return
    worker: _Worker | None = None
    tasks: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, tasks, lambda: worker), daemon=True).start()
    try:
        if start.memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (start.memory_bytes, start.memory_bytes))
        worker = _build(parse(json.loads(start.job)), start)
        program = worker.program
        ready = Ready(sorted(program.sites), [trait.name for trait in program.traits])
    except Exception as error:  # the engine raises it where the user sees it
        if start.memory_bytes is not None and is_out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        if isinstance(error, MemoryError):
            raise
        line.send(failed(0, error))
        return
    line.send(ready)
    while (task := tasks.get()) is not None:
        line.send(worker.answer(task))
    with contextlib.closing(program):
        sys.stdout.flush()


def _build(job: Job, start: Start) -> _Worker:
    program: Program = registry.load("recipes", job.recipe.name)(job)
    pin_threads(job.engine.threads)
    return _Worker(program, start)
