# SPDX-License-Identifier: Apache-2.0
"""The dialling end: calls that outlast a broken network, and files that go on from where they were cut off.

===============================================  ================================================================
no server, a broken connection, a proxy's error  tried again, with pauses that grow to ``MAX_PAUSE_S``, until patience
                                                 ends: UnreachableError, with the address and the last cause
a certificate of another federation, or ours     AccessError at once
refused
the server's certificate expired                 UnreachableError, after patience: its operator may renew it
nothing moves for ``stall_s``, connection open   a new connection; a transfer goes on where it was
killed during a download                         the next one with the same path goes on where it was
our certificate is renewed                       a new connection for what comes next; old streams get a minute
a file                                           has a lane, a connection of its own, which serves the next one too if
                                                 that comes within ``WARM_S``
a piece with other bytes than its digest says    ChecksumError: TLS came through, so the file at its sender is damaged
===============================================  ================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import grpc
import grpc.aio

from hansa.core import storage
from hansa.errors import AccessError, HansaError, StorageError, UnreachableError, VersionError, WireError
from hansa.pki.kit import Kit
from hansa.transport import diagnosis, messages, protocol
from hansa.transport.lane import ALPN, Lane, context_for
from hansa.transport.messages import (
    MAX_RANGES,
    Attend,
    Done,
    Follow,
    Get,
    JobEvent,
    Message,
    Offer,
    OfferRoster,
    Poll,
    Ring,
    Wanted,
)
from hansa.transport.pieces import MAX_MANIFEST_BYTES, Incoming, Manifest, in_ranges
from hansa.transport.threads import finished
from hansa.transport.turns import LostError, Turns

CALL_S = 60.0
"""How long a call may take before it counts as lost (a Poll: beside what it asks to wait)."""
CONNECT_S = 20.0
STALL_S = 30.0
PAUSE_S, MAX_PAUSE_S = 0.2, 10.0
LEAVE_S = 60.0
WARM_S = 60.0
"""How long a lane that nobody uses, which saves two round trips or three, waits for the next file."""

LINGER_MS = 50
"""How long a thread stays with a transfer that waits for the network: a site seldom has another."""

Progress = Callable[[int, int], None]
"""Called with (bytes that are there, bytes of the file)."""

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)

_Identity = tuple[bytes, bytes, bytes, str]
_FOR_GOOD = {"UNIMPLEMENTED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNAUTHENTICATED"}


class Connection:
    """A connection to a server; made again whenever it breaks, so long as patience lasts.

    Args:
        kit: who we are, whom we trust.
        address: ``HOST:PORT``.
        proxy: ``http://HOST:PORT`` of a proxy to tunnel through (HTTP CONNECT, RFC 9110 §9.3.6). By default what the
            environment says: ``https_proxy``, ``no_proxy``.
        patience_s: how long to go on trying to reach the server; None for ever.
        stall_s: a transfer that stands still for so long goes on over a new connection.
    """

    def __init__(
        self,
        kit: Kit,
        address: str,
        *,
        proxy: str | None = None,
        patience_s: float | None = 30.0,
        stall_s: float = STALL_S,
    ) -> None:
        self.address = address
        self._kit = kit
        self._proxy = proxy
        self._patience_s = patience_s
        self._stall_s = stall_s
        self._channel: Any = None
        self._introduced = False
        self._identity: _Identity | None = None
        self._opening = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self._idle: list[_Idle] = []
        self._dialling: asyncio.Task[None] | None = None
        self._turns = Turns(LINGER_MS)
        self._tls: tuple[_Identity, ssl.SSLContext] | None = None

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dialling:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})
        for idle in self._idle:
            idle.end.cancel()
            idle.lane.close()
        self._idle.clear()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None
        self._turns.close()

    @overload
    async def call(self, request: messages.Poll) -> messages.Ring: ...
    @overload
    async def call(self, request: messages.AskAgenda) -> messages.Agenda: ...
    @overload
    async def call(
        self,
        request: messages.Report
        | messages.Answer
        | messages.AbortJob
        | messages.WithdrawSite
        | messages.ResumeJob
        | messages.DeleteJob
        | messages.OfferRoster,
    ) -> messages.Done: ...
    @overload
    async def call(self, request: messages.AskRoster) -> messages.RosterText: ...
    @overload
    async def call(self, request: messages.Submit) -> messages.Submitted: ...
    @overload
    async def call(self, request: messages.ListJobs) -> messages.JobLines: ...
    @overload
    async def call(self, request: messages.ShowJob) -> messages.JobView: ...
    @overload
    async def call(self, request: messages.ListSites) -> messages.SiteLines: ...
    async def call(self, request: Any) -> Any:
        """Make a call and return its reply; it is made again if it may have been lost.

        Raises:
            UnreachableError: the server could not be reached while patience lasted.
            HansaError: what the server said.
        """
        name, data = type(request).__name__, protocol.encode(request)
        timeout = CALL_S + (request.wait_s if isinstance(request, Poll) else 0)

        async def attempt() -> Message:
            method = (await self._open()).unary_unary(protocol.path_of(name))
            with _as_ours():
                reply = await method(data, timeout=timeout, metadata=protocol.METADATA)
            kind: type[Message] = request.reply
            return protocol.decode(kind, reply)

        return await self._patiently(attempt, name)

    def attend(self, request: Attend) -> AsyncIterator[Ring]:
        """Open the doorbell. When the stream breaks this raises UnreachableError; what then is the caller's choice."""
        return self._events("Attend", request, Ring)

    def follow(self, request: Follow) -> AsyncIterator[JobEvent]:
        """Read a job's log; as `attend` when the stream breaks."""
        return self._events("Follow", request, JobEvent)

    async def download(
        self,
        job: str,
        digest: str,
        path: Path,
        *,
        donors: Sequence[tuple[Path, Manifest]] = (),
        max_bytes: int | None = None,
        durable: bool = True,
        spares: storage.Spares | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Fetch a file; what an earlier attempt or a donor has of it is not sent again.

        Args:
            job: the job that the file belongs to.
            digest: its manifest's digest.
            path: where it is to be; ``NAME.part`` beside it while it arrives.
            donors: files that may hold some of its pieces, with their manifests.
            max_bytes: the largest file that is accepted.
            durable: whether the file must outlive a power cut; one that can be fetched again need not.
            spares: files that a new one may be written over.
            progress: called as pieces come.

        Raises:
            UnreachableError: the server could not be reached while patience lasted.
            WireError: the file is too large, or damaged at the server.
            StorageError: the disk is full here, or fails.
            HansaError: what the server said.
        """
        manifest = await self._patiently(partial(self._manifest, job, digest), "Download")
        with contextlib.ExitStack() as stack:

            def begin() -> Incoming:
                return stack.enter_context(Incoming(path, manifest, donors, max_bytes=max_bytes, spares=spares))

            incoming = await finished(begin)
            fetch = partial(self._fetch, job, incoming, progress)
            while incoming.num_bytes_missing:
                await self._patiently(fetch, "Download", lambda: incoming.num_bytes_missing)
            await finished(partial(incoming.finish, durable=durable))
        return manifest

    async def upload(
        self, job: str, task: str, path: Path, manifest: Manifest, *, progress: Progress | None = None
    ) -> None:
        """Send a file; what an earlier attempt brought there is not sent again. It is durable there on return.

        Args:
            job: the job, empty for a new job's bundle.
            task: the task that the file answers, or ``bundle``.
            path: the file, which must not change.
            manifest: what it consists of.
            progress: called as pieces go.

        Raises:
            UnreachableError: the server could not be reached while patience lasted.
            StorageError: the file can't be read here, or not be kept there.
            HansaError: what the server said.
        """
        sent: list[int] = []
        offer = Offer(job, task, manifest.digest, len(manifest.encode()))
        send = partial(self._send, offer, path, manifest, progress, sent)
        await self._patiently(send, "Upload", lambda: len(sent))

    def warm(self) -> None:
        """Dial, beside whatever else goes on, for a file that is to come; it need not."""
        if self._idle or self._dialling:
            return

        async def dial() -> None:
            with contextlib.suppress(LostError, HansaError):
                self._keep(*await self._dialled())

        def end(_: object) -> None:
            self._dialling = None

        self._dialling = asyncio.create_task(dial())
        self._dialling.add_done_callback(end)

    async def _manifest(self, job: str, digest: str) -> Manifest:
        async with self._lane() as lane:
            await lane.say(protocol.encode(Get(job, digest)))
            data = await lane.hear(MAX_MANIFEST_BYTES)
        manifest = Manifest.decode(data)
        if manifest.digest != digest:
            raise WireError("The server sent another manifest than the one it was asked for.")
        return manifest

    async def _fetch(self, job: str, incoming: Incoming, progress: Progress | None) -> None:
        if not incoming.num_bytes_missing:  # the last attempt broke after its last piece
            return

        def told() -> None:
            if progress:
                progress(incoming.manifest.num_bytes - incoming.num_bytes_missing, incoming.manifest.num_bytes)

        async with self._lane() as lane:
            ranges = incoming.missing()[:MAX_RANGES]
            await lane.say(protocol.encode(Get(job, incoming.manifest.digest, ranges)))
            await lane.receive_pieces(incoming, in_ranges(ranges, incoming.manifest), told)

    async def _send(
        self, offer: Offer, path: Path, manifest: Manifest, progress: Progress | None, sent: list[int]
    ) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"Can't read {path}: {error.strerror}.") from error

        done = 0

        def told(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            sent.append(num_bytes)
            if progress:
                progress(done, manifest.num_bytes)

        try:
            async with self._lane() as lane:
                await lane.say(protocol.encode(offer))
                await lane.say(manifest.encode())
                ranges = protocol.decode(Wanted, await lane.hear(protocol.MAX_AGENDA_BYTES)).ranges
                done = manifest.num_bytes - sum(manifest.pieces[index][0] for index in in_ranges(ranges, manifest))
                await lane.send_pieces(descriptor, manifest, in_ranges(ranges, manifest), path, told)
                protocol.decode(Done, await lane.hear(protocol.MAX_MESSAGE_BYTES))
        finally:
            os.close(descriptor)
        if progress:
            progress(manifest.num_bytes, manifest.num_bytes)

    async def _events(self, name: str, request: Message, kind: type[_M]) -> AsyncIterator[_M]:
        try:
            async with self._stream(name) as call:
                await call.write(protocol.encode(request))
                await call.done_writing()
                while (data := await call.read()) is not grpc.aio.EOF:
                    yield protocol.decode(kind, data)
        except LostError as error:
            raise await self._diagnosed(error) from error

    @contextlib.asynccontextmanager
    async def _stream(self, name: str) -> AsyncIterator[Any]:
        """Open a stream, and end it on leaving."""
        call = (await self._open()).stream_stream(protocol.path_of(name))(metadata=protocol.METADATA)
        try:
            with _as_ours():
                try:
                    yield call
                except asyncio.InvalidStateError:  # a write after the other side ended the call: a read says why
                    await call.read()
                    raise LostError("the server ended the call") from None
        finally:
            call.cancel()

    @contextlib.asynccontextmanager
    async def _lane(self) -> AsyncIterator[Lane]:
        """Lend a lane that nobody else uses; it is kept for the next one unless something goes wrong."""
        identity, lane = await self._lent()
        try:
            yield lane
        except UnreachableError as error:  # the server says so
            lane.close()
            raise LostError(error.message) from error
        except BaseException:  # what it was at is unknown; raised again
            lane.close()
            raise
        self._keep(identity, lane)

    async def _lent(self) -> tuple[_Identity, Lane]:
        if self._dialling:
            await asyncio.wait({self._dialling})
        identity = self._identity_now()
        while self._idle:
            idle = self._idle.pop()
            idle.end.cancel()
            if idle.identity == identity and idle.lane.is_open:
                return identity, idle.lane
            idle.lane.close()
        return await self._dialled()

    def _keep(self, identity: _Identity, lane: Lane) -> None:
        def end() -> None:
            self._idle.remove(idle)
            lane.close()

        idle = _Idle(identity, lane, asyncio.get_running_loop().call_later(WARM_S, end))
        self._idle.append(idle)

    async def _dialled(self) -> tuple[_Identity, Lane]:
        """Return another lane, and the certificate that it was dialled by."""
        identity = self._identity_now()
        context = self._context(identity)
        try:
            connection = await diagnosis.reach(self.address, self._proxy, min(CONNECT_S, self._stall_s))
        except UnreachableError as error:
            raise LostError(error.message, connecting=True) from error
        lane = await Lane.open(connection, context, self._turns, self._stall_s, self._kit.server_name)
        if lane.alpn != ALPN:
            lane.close()
            raise VersionError(f"{self.address} does not speak {ALPN}. Install the same release of Hansa at both ends.")
        return identity, lane

    def _context(self, identity: _Identity) -> ssl.SSLContext:
        if self._tls is None or self._tls[0] != identity:
            key, certificate, authority, _ = identity
            self._tls = identity, context_for(key, certificate, authority, server_side=False)
        return self._tls[1]

    async def _patiently(
        self, attempt: Callable[[], Awaitable[_T]], name: str, mark: Callable[[], int] = lambda: 0
    ) -> _T:
        """Attempt until it works or patience ends; whenever ``mark`` has changed there was progress."""
        since, pause, seen = math.inf, PAUSE_S, mark()
        while True:
            try:
                return await attempt()
            except AccessError as refusal:
                if self._introduced:
                    raise
                self._introduced = True
                with contextlib.suppress(HansaError):
                    await self._introduce()
                    continue
                raise refusal from None
            except LostError as lost:
                now = time.monotonic()
                if mark() != seen or since == math.inf:
                    since, pause, seen = now, PAUSE_S, mark()
                error = await self._diagnosed(lost)
                if isinstance(error, AccessError):
                    raise error from lost
                if self._patience_s is not None and time.monotonic() + pause - since > self._patience_s:
                    raise error from lost
                log.info("%s will be tried again in %.1f s: %s", name, pause, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, MAX_PAUSE_S)

    async def _introduce(self) -> None:
        """Bring the server our roster: it may not know our certificate because it holds an older one."""
        data = protocol.encode(OfferRoster(self._kit.roster().data))
        with _as_ours():
            method = (await self._open()).unary_unary(protocol.path_of(OfferRoster.__name__))
            await method(data, timeout=CALL_S, metadata=protocol.METADATA)

    async def _diagnosed(self, lost: LostError) -> HansaError:
        if lost.connecting:
            step_s = min(diagnosis.STEP_S, self._stall_s)
            return await diagnosis.diagnose(self._kit, self.address, self._proxy, str(lost), step_s)
        return UnreachableError(f"The connection to {self.address} broke: {lost}.")

    async def _open(self) -> Any:
        """Return the channel for calls, connected, by the certificate of now."""
        async with self._opening:
            identity = self._identity_now()
            if self._channel is not None and identity != self._identity:
                self._leave(self._channel)
            if self._channel is None:
                self._channel, self._identity = self._channel_of(identity), identity
            channel = self._channel
            try:
                await self._connected(channel)
            except LostError:
                self._leave(channel)
                raise
            return channel

    def _identity_now(self) -> _Identity:
        return (*self._kit.pair(), self._kit.authority_pem(), self._kit.server_name)

    def _channel_of(self, identity: _Identity) -> Any:
        key, certificate, authority, _ = identity
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.aio.secure_channel(self.address, credentials, self._options())

    async def _connected(self, channel: Any) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(CONNECT_S, self._stall_s)):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        break
                    await channel.wait_for_state_change(state)
                else:
                    return
        raise LostError("no connection came about", connecting=True)

    def _options(self) -> list[tuple[str, object]]:
        proxy = diagnosis.proxy_for(self.address, self._proxy)
        return [
            ("grpc.ssl_target_name_override", self._kit.server_name),
            ("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", protocol.MAX_AGENDA_BYTES),
            ("grpc.max_send_message_length", protocol.MAX_MESSAGE_BYTES),
            *protocol.READ_OPTIONS,
            ("grpc.keepalive_time_ms", round(self._stall_s * 500)),
            ("grpc.keepalive_timeout_ms", round(self._stall_s * 500)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]

    def _leave(self, channel: Any) -> None:
        """Use a channel no more; calls that are under way get a while."""
        if self._channel is channel:
            self._channel = None
            task = asyncio.create_task(channel.close(LEAVE_S))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)


@dataclass(frozen=True)
class _Idle:
    """A lane that nobody uses: the certificate that it was dialled by, and what ends the waiting."""

    identity: _Identity
    lane: Lane
    end: asyncio.TimerHandle


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """Turn gRPC's errors into ours, or into LostError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _error_of(error) from error
    except grpc.aio.UsageError as error:
        raise LostError("the connection was closed") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise LostError("the connection was closed") from None  # by `_leave`, which gRPC reports in this way


def _error_of(error: Any) -> Exception:
    code, details = error.code().name, error.details() or ""
    for name, value in error.trailing_metadata() or ():
        if name == protocol.PROBLEM_KEY:
            met = protocol.raised(value)
            return LostError(met.message) if isinstance(met, UnreachableError) else met
    if code == "UNIMPLEMENTED":
        return VersionError("The server does not know this call. Install the same release of Hansa at both ends.")
    if code in _FOR_GOOD:
        return protocol.from_code(code, details)
    return LostError(f"{code}, {details[:300]}")
