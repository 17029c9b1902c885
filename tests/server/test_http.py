# SPDX-License-Identifier: Apache-2.0
"""Health, readiness and metrics, and what strangers may send there."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from hansa.errors import StorageError, UnreachableError
from hansa.server import http
from hansa.server.http import Metrics, Watch


class Doors:
    """Checks that a test opens and shuts."""

    def __init__(self) -> None:
        self.error: StorageError | None = None
        self.calls = 0

    def database(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(lambda: {"running": 2, "queued": 1}, lambda: 3)


@pytest.fixture
async def watch(doors: Doors, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    monkeypatch.setattr(http, "FRESH_S", 0.0)
    watch = Watch(metrics, {"database": doors.database, "grpc": lambda: None})
    await watch.start("127.0.0.1", 0)
    yield watch
    await watch.stop()


async def exchange(port: int, sent: bytes, patience_s: float | None = None) -> bytes:
    """Send bytes and return all that comes back until the server closes, or until the patience is at an end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        writer.write(sent)
        async with asyncio.timeout(patience_s):
            while part := await reader.read(1 << 16):
                received += part
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.close()
    return received


async def get(watch: Watch, path: str, method: str = "GET") -> tuple[int, str]:
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, body = (await exchange(watch.port, request.encode())).partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


async def test_health_and_readiness(watch: Watch, doors: Doors) -> None:
    assert await get(watch, "/healthz") == (200, "ok\n")
    status, body = await get(watch, "/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True, "checks": {"database": "ok", "grpc": "ok"}})
    doors.error = StorageError("The disk is full.")
    status, body = await get(watch, "/readyz")
    assert (status, json.loads(body)) == (
        503,
        {"ready": False, "checks": {"database": "The disk is full.", "grpc": "ok"}},
    )
    assert (await get(watch, "/healthz"))[0] == 200
    doors.error = None
    assert (await get(watch, "/readyz"))[0] == 200


async def test_metrics_are_what_was_counted(watch: Watch, metrics: Metrics) -> None:
    metrics.sent(10)
    metrics.received(7)
    metrics.answered("late")
    metrics.called("Answer", "ok", 0.002)
    metrics.finished_round(3.0)
    _, body = await get(watch, "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))
    expected = {
        'hansa_jobs{state="running"}': 2,
        "hansa_sites_connected": 3,
        'hansa_transfer_bytes_total{direction="down"}': 10,
        'hansa_transfer_bytes_total{direction="up"}': 7,
        'hansa_answers_total{kind="late"}': 1,
        'hansa_call_seconds_count{method="Answer",outcome="ok"}': 1,
        "hansa_rounds_total": 1,
        "hansa_round_seconds_sum": 3,
    }
    assert {name: float(lines[name]) for name in expected} == expected
    assert float(lines["process_resident_memory_bytes"]) > 0


async def test_metrics_without_a_database() -> None:
    def down() -> dict[str, int]:
        raise StorageError("gone")

    watch = Watch(Metrics(down, lambda: 1), {})
    await watch.start("127.0.0.1", 0)
    try:
        status, body = await get(watch, "/metrics")
    finally:
        await watch.stop()
    assert status == 200
    assert "hansa_sites_connected 1.0" in body
    assert "hansa_jobs{" not in body


async def test_a_check_that_hangs_counts_as_failed_and_is_not_started_again(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CHECK_S", 0.05)
    going_on = threading.Event()
    started = []

    def hangs() -> None:
        started.append(1)
        going_on.wait()

    watch = Watch(metrics, {"blobs": hangs})
    await watch.start("127.0.0.1", 0)
    try:
        for _ in range(3):
            status, body = await get(watch, "/readyz")
            assert status == 503
            assert json.loads(body)["checks"]["blobs"].startswith("no answer within")
        assert (await get(watch, "/healthz"))[0] == 200
        assert len(started) == 1
    finally:
        going_on.set()
        await watch.stop()


async def test_a_result_is_kept_for_a_moment(doors: Doors, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FRESH_S", 3600.0)
    watch = Watch(metrics, {"database": doors.database})
    await watch.start("127.0.0.1", 0)
    try:
        await asyncio.gather(*(get(watch, "/readyz") for _ in range(10)))
    finally:
        await watch.stop()
    assert doors.calls == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
async def test_nothing_can_be_changed(watch: Watch, method: str) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await get(watch, path, method))[0] == 405


async def test_nobody_is_sent_elsewhere(watch: Watch) -> None:
    for path in ("/", "/healthz/", "//healthz", "/metrics/x", "/docs"):
        assert (await get(watch, path))[0] == 404


async def test_an_address_in_use(watch: Watch, metrics: Metrics) -> None:
    second = Watch(metrics, {})
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{watch.port}"):
        await second.start("127.0.0.1", watch.port)
    with pytest.raises(UnreachableError):
        await second.start("no such host.invalid", 1)
    await second.stop()


async def test_it_serves_while_strangers_hold_connections(watch: Watch) -> None:
    held = [socket.create_connection(("127.0.0.1", watch.port)) for _ in range(http.CONNECTIONS // 2)]
    try:
        for connection in held:
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert (await get(watch, "/healthz"))[0] == 200
    finally:
        for connection in held:
            connection.close()


ANY = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
TOKEN = st.from_regex(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,20}", fullmatch=True)
VISIBLE = st.from_regex(r"[!-~]{0,40}", fullmatch=True)
PATHS = ["healthz", "readyz", "metrics", "%00", "../healthz", "healthz/", "/healthz", "metrics?name[]=%ff", "healthz#x"]
NAMES = ["Content-Length", "Transfer-Encoding", "Accept", "Accept-Encoding", "Upgrade", "Host", "Range", "Expect"]
VALUES = ["-1", "3", "chunked", "9" * 20, "h2c", "websocket", "bytes=0-", "100-continue", "gzip;q=nan", "\x80"]


def requests(
    method: st.SearchStrategy[str], text: st.SearchStrategy[str], name: st.SearchStrategy[str]
) -> st.SearchStrategy[bytes]:
    headers = st.lists(st.tuples(st.sampled_from(NAMES) | name, st.sampled_from(VALUES) | text), max_size=4)
    return st.builds(
        lambda method, path, headers, body: (
            (
                f"{method} /{path} HTTP/1.1\r\nHost: x\r\n"
                + "".join(f"{name}: {value}\r\n" for name, value in headers)
                + "Connection: close\r\n\r\n"
            ).encode("latin-1")
            + body
        ),
        method,
        st.sampled_from(PATHS) | text,
        headers,
        st.binary(max_size=100),
    )


METHODS = st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "CONNECT", "get"])
LONG = st.integers(1, 4).map(lambda n: b"GET /healthz HTTP/1.1\r\nX: " + b"a" * (n * http.HEADER_BYTES))
REQUESTS = requests(METHODS, VISIBLE, TOKEN) | requests(METHODS | TOKEN, ANY, ANY) | st.binary(max_size=400) | LONG


async def test_whatever_is_sent_is_no_defect(watch: Watch) -> None:
    port = watch.port
    loop = asyncio.get_running_loop()

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(REQUESTS)
    def strangers(request: bytes) -> None:
        answer = asyncio.run_coroutine_threadsafe(exchange(port, request, 0.1), loop).result()
        found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
        assert found is None or int(found[1]) < 500, answer

    await asyncio.to_thread(strangers)
    assert (await get(watch, "/healthz"))[0] == 200
