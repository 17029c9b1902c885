# SPDX-License-Identifier: Apache-2.0
"""The long-running commands: a server and a site's agent, each until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import resource
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from hansa.cli import console


def serve(directory: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT; with ``as_json`` one line on stdout says when and where.

    Raises:
        HansaError: the folder, settings, database or port can't be used.
    """
    from hansa.server import logs, settings
    from hansa.server.main import running
    from hansa.transport.memory import tune_allocator

    tune_allocator()
    allow_many_connections()
    chosen = settings.load(directory / settings.FILE, overrides)
    logs.set_up(chosen.log_format)

    async def work() -> None:
        async with running(directory, chosen) as server:
            _ready(as_json, {"host": server.host, "port": server.port}, f"Serving on {server.host}:{server.port}.")
            await server.jobs

    _until_stopped(work())


def allow_many_connections() -> None:
    """Let this process have as many open files as the system lets it: three for each site that attends."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def attend(directory: Path, *, as_json: bool) -> None:
    """Take part as a site until SIGTERM or SIGINT; with ``as_json`` one line on stdout says when the server answered.

    Raises:
        HansaError: the folder can't be used, or the server does not admit the site.
    """
    from hansa.site.agent import Agent
    from hansa.transport.memory import tune_allocator

    tune_allocator()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s %(message)s")

    async def work() -> None:
        agent = Agent(directory)
        joined = asyncio.Event()
        waiting = asyncio.create_task(joined.wait())
        waiting.add_done_callback(
            lambda task: (
                None if task.cancelled() else _ready(as_json, {"site": agent.site}, f"Site {agent.site} has joined.")
            )
        )
        try:
            await agent.run(joined)
        finally:
            waiting.cancel()

    _until_stopped(work())


def _ready(as_json: bool, document: dict[str, Any], text: str) -> None:
    """Say that the command is at work; the garbage collector need not look at what it consists of by now."""
    gc.collect()
    gc.freeze()
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    else:
        console.err().print(text)


def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(work)
        for kind in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(kind, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    console.err().print("Stopped.")
