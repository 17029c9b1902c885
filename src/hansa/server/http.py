# SPDX-License-Identifier: Apache-2.0
"""Health and metrics over plain HTTP, for whoever watches the server; on loopback unless the settings say otherwise.

    GET /healthz   200 while the process serves
    GET /readyz    200 if jobs can be worked on; 503 otherwise; JSON: {"ready", "checks": {name: "ok" | reason}}
    GET /metrics   Prometheus text format

Nothing can be changed here, and nothing secret is shown: no names of jobs or users, no contents.

    case                                  what happens
    ------------------------------------  ------------------------------------------------------------------
    another path, another method          404, 405
    a request that is no HTTP, too long   400 and the connection is closed
    a check that hangs                    it counts as failed after CHECK_S; it is not started a second time
    many requests                         a check's result is good for FRESH_S; beyond CONNECTIONS it is 503
    the address is in use                 UnreachableError
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    exposition,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import hansa.version
from hansa.errors import HansaError, UnreachableError

CHECK_S = 5.0
FRESH_S = 1.0
CONNECTIONS = 64
HEADER_BYTES = 16 << 10

log = logging.getLogger(__name__)

Check = Callable[[], object]
"""Returns if all is well, raises HansaError if not; may block."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600)


class Metrics:
    """What the server counts. Methods may be called from any thread and return at once.

    Args:
        jobs: returns the number of jobs by state; called when the metrics are read.
        sites: returns the number of sites that are connected.
    """

    def __init__(self, jobs: Callable[[], Mapping[str, int]], sites: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_Now(jobs, sites))
        self._bytes = self._counter("hansa_transfer_bytes", "Bytes to (down) and from (up) sites.", "direction")
        self._answers = self._counter("hansa_answers", "Answers of sites to tasks, by kind.", "kind")
        self._rounds = self._counter("hansa_rounds", "Rounds finished.")
        self._calls = self._histogram("hansa_call_seconds", "Time to answer calls.", _FAST, "method", "outcome")
        self._round_seconds = self._histogram("hansa_round_seconds", "Time of whole rounds.", _LONG)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def sent(self, num_bytes: int) -> None:
        """Count bytes that went to a site."""
        self._bytes.labels("down").inc(num_bytes)

    def received(self, num_bytes: int) -> None:
        """Count bytes that came from a site."""
        self._bytes.labels("up").inc(num_bytes)

    def called(self, method: str, outcome: str, seconds: float) -> None:
        """Count a call: ``outcome`` is ``ok`` or the name of the error's class."""
        self._calls.labels(method, outcome).observe(seconds)

    def answered(self, kind: str) -> None:
        """Count an answer: ``update``, ``inspected``, or the kind of an absence."""
        self._answers.labels(kind).inc()

    def finished_round(self, seconds: float) -> None:
        """Count a round."""
        self._rounds.inc()
        self._round_seconds.observe(seconds)


class _Now(Collector):
    """What is looked up when it is asked for."""

    def __init__(self, jobs: Callable[[], Mapping[str, int]], sites: Callable[[], int]) -> None:
        self._jobs = jobs
        self._sites = sites

    def describe(self) -> Iterable[Metric]:
        """Say nothing in advance, so that registering looks nothing up."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Look it up; what can't be had now is left out."""
        yield InfoMetricFamily("hansa_build", "The running release.", {"version": hansa.version.VERSION})
        sites = GaugeMetricFamily("hansa_sites_connected", "Sites that are connected.")
        sites.add_metric([], self._sites())
        yield sites
        jobs = GaugeMetricFamily("hansa_jobs", "Jobs by state.", labels=["state"])
        try:
            for state, count in self._jobs().items():
                jobs.add_metric([state], count)
        except HansaError as error:
            log.warning("The number of jobs is not known: %s", error)
            return
        yield jobs


class Watch:
    """Serves health and metrics in the running event loop.

    Args:
        metrics: what ``/metrics`` shows.
        checks: name -> what ``/readyz`` asks.
    """

    port: int
    """Where it listens, once started."""

    def __init__(self, metrics: Metrics, checks: Mapping[str, Check]) -> None:
        self._metrics = metrics
        self._checks = checks
        # A thread for each check and one for the metrics, so that what hangs holds up nothing else.
        self._threads = ThreadPoolExecutor(len(checks) + 1, thread_name_prefix="watch")
        self._running: dict[str, asyncio.Future[str]] = {}
        self._results: dict[str, tuple[float, str]] = {}
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen (UnreachableError)."""
        routes = [
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._metricsz, methods=["GET"]),
        ]
        app = Starlette(routes=routes)
        app.router.redirect_slashes = False  # it would send people to whatever host a stranger names
        listener = _listen(host, port)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        log.info("Health and metrics are at http://%s:%s, in plain HTTP.", host, self.port)
        if not _is_loopback(listener):
            log.warning("Whoever reaches %s:%s reads health and metrics. Guard that address.", host, self.port)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_HEADERS)

    async def _readyz(self, _: Request) -> Response:
        results = await asyncio.gather(*(self._check(name) for name in self._checks))
        checks = dict(zip(self._checks, results, strict=True))
        ready = all(result == "ok" for result in results)
        return JSONResponse({"ready": ready, "checks": checks}, 200 if ready else 503, _HEADERS)

    async def _check(self, name: str) -> str:
        told, result = self._results.get(name, (0.0, ""))
        if result and time.monotonic() - told < FRESH_S:
            return result
        if name not in self._running:
            loop = asyncio.get_running_loop()
            self._running[name] = loop.run_in_executor(self._threads, _result, self._checks[name])
            self._running[name].add_done_callback(lambda done: self._note(name, done))
        try:
            async with asyncio.timeout(CHECK_S):
                return await asyncio.shield(self._running[name])
        except TimeoutError:
            return f"no answer within {CHECK_S:g} s"

    def _note(self, name: str, done: asyncio.Future[str]) -> None:
        del self._running[name]
        if not done.cancelled() and done.exception() is None:
            self._results[name] = (time.monotonic(), done.result())

    async def _metricsz(self, _: Request) -> Response:
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._threads, exposition.generate_latest, self._metrics.registry)
        return Response(text, media_type=exposition.CONTENT_TYPE_LATEST, headers=_HEADERS)


_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def _result(check: Check) -> str:
    try:
        check()
    except HansaError as error:
        return str(error)
    return "ok"


class _Server(uvicorn.Server):
    """Without handlers of signals: the server has its own."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UnreachableError(
            f"Can't listen on {host}:{port} for health and metrics: {(error.strerror or str(error)).lower()}. "
            "End what uses it, or set http in server.toml (off for none)."
        ) from error
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    host = str(listener.getsockname()[0])
    return host == "::1" or host.startswith("127.")
