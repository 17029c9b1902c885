# SPDX-License-Identifier: Apache-2.0
"""The listening end: who calls is known and admitted before a handler sees what they say.

Calls are gRPC's, files have lanes (:mod:`hansa.transport.lane`), and both come in by one door
(:mod:`hansa.transport.door`). TLS 1.2 or newer (1.3 for lanes) with a client certificate of the federation's authority;
the roster then admits that certificate at every call and transfer, before each event of a stream, and once a second
while a stream or a transfer lives.

===============================================  ================================================================
no certificate, or another authority's           the handshake fails
expired, revoked, not in the roster              AccessError at every call; live streams end within two seconds
a certificate renewed, a new roster              used from the next handshake or call on, without a restart
another protocol version                         VersionError
bytes that are no message                        WireError
an error of :mod:`hansa.errors` in a handler     travels, and is raised again at the client
any other error in a handler                     logged with an id; the client is told the id and nothing else
too many calls at once by one peer               refused; the client waits and tries again
an upload that is not allowed, or too large      refused before its manifest is read, or before a piece is written
a transfer that stands still                     ended after ``stall_s``; of an upload, what has arrived stays
many transfers at once                           take turns in a few threads; see `hansa.transport.lane`
===============================================  ================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from hansa.core.storage import Spares
from hansa.errors import AccessError, HansaError, StorageError, UnreachableError, VersionError, WireError
from hansa.pki.identity import Identity
from hansa.pki.kit import Kit
from hansa.transport import protocol
from hansa.transport.door import Door
from hansa.transport.lane import FAMILY, Lane, context_for
from hansa.transport.messages import (
    CALLS,
    PROTOCOL,
    SERVICE,
    Attend,
    Done,
    Follow,
    Get,
    JobEvent,
    Message,
    Offer,
    OfferRoster,
    Ring,
    Wanted,
)
from hansa.transport.pieces import MAX_MANIFEST_BYTES, Incoming, Manifest, in_ranges
from hansa.transport.threads import finished
from hansa.transport.turns import LostError, Turns

CALLS_PER_PEER = 64
BEAT_S = 5.0
STALL_S = 60.0
PATROL_S = 1.0
IDLE_S = 120.0
"""How long a lane may be unused."""

LINGER_MS = 3
"""How long a thread stays with a transfer that waits for the network, if no other needs it."""

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Context = Any  # grpc.aio.ServicerContext; grpcio has no types
_Work = Callable[[Identity, _Context], Awaitable[None]]


class _EndError(Exception):
    """What a call or a transfer ends with.

    Args:
        error: what the caller is told.
        code: gRPC's name for it, where it isn't what the error's class says.
    """

    def __init__(self, error: HansaError, code: Any = None) -> None:
        super().__init__(error)
        self.error = error
        self.code = code


@dataclass(frozen=True)
class Destination:
    """Where an upload is to go, and how much of it there may be.

    Attributes:
        path: where the file is to be; that it is there already is found out, and nothing of it is sent again.
        max_bytes: the largest file; equal pieces, which travel once, all count.
        max_manifest_bytes: the longest manifest.
        check: told the manifest before anything is written; raises what speaks against the file.
        spares: files that it may be written over.
    """

    path: Path
    max_bytes: int
    max_manifest_bytes: int
    check: Callable[[Manifest], object] = lambda manifest: None
    spares: Spares | None = None


class Handlers(Protocol):
    """What a server does with what it is told. ``caller`` is known and admitted; what he may do is decided here."""

    async def call(self, caller: Identity, request: Message) -> Message:
        """Answer a request of `messages.CALLS` with its reply."""

    async def refused(self, peer: str, action: str, error: HansaError) -> None:
        """Note that somebody at the address ``peer`` was not admitted."""

    def attend(self, caller: Identity, request: Attend) -> AsyncIterator[Ring]:
        """Ring whenever there is news, and now and then when there is none."""

    def follow(self, caller: Identity, request: Follow) -> AsyncIterator[JobEvent]:
        """Yield a job's log."""

    async def source(self, caller: Identity, request: Get) -> tuple[Path, Manifest]:
        """Return the file that a caller may have."""

    def sent(self, caller: Identity, num_bytes: int) -> None:
        """Note how much of a file went to a caller."""

    async def offered(self, caller: Identity, offer: Offer) -> Destination | None:
        """Return where an upload is to go, before anything of it is read; None if it is not needed."""

    async def received(self, caller: Identity, offer: Offer, incoming: Incoming) -> None:
        """Take a file that is whole; when this returns, that it came is durable."""


class Server:
    """A server that listens; `serve` makes one.

    Attributes:
        port: the TCP port.
    """

    def __init__(self, handlers: Handlers, kit: Kit, stall_s: float) -> None:
        self.port = 0
        self._handlers = handlers
        self._kit = kit
        self._stall_s = stall_s
        self._calls: Counter[str] = Counter()
        self._live: dict[asyncio.Task[Any], bytes] = {}
        self._expelled: dict[asyncio.Task[Any], HansaError] = {}
        self._turns = Turns(LINGER_MS)
        self._door = Door(FAMILY, self._lane)
        self._configuration: tuple[bytes, ...] = ()
        self._tls: tuple[tuple[bytes, ...], ssl.SSLContext] | None = None
        self._server: Any = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", protocol.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", protocol.MAX_AGENDA_BYTES),
                ("grpc.max_concurrent_streams", CALLS_PER_PEER),
                *protocol.READ_OPTIONS,
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),  # how often a peer pings is its stall_s
            ]
        )
        work = {kind.__name__: self._call(kind) for kind in CALLS} | {
            "Attend": self._events(Attend, handlers.attend),
            "Follow": self._events(Follow, handlers.follow),
        }
        # All are streams to gRPC, on the wire it is the same: its unary handlers never end a call that says nothing.
        methods = {
            name: grpc.stream_stream_rpc_method_handler(self._guarded(name, method)) for name, method in work.items()
        } | {"OfferRoster": grpc.stream_stream_rpc_method_handler(self._take_roster)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            UnreachableError: the port is in use, or is not one to listen on.
        """
        credentials = grpc.dynamic_ssl_server_credentials(self._certificate(), self._renewed, True)
        try:
            self.port = self._door.listen(host, port)
        except OSError as error:
            self._turns.close()
            raise UnreachableError(
                f"Can't listen on {host}:{port}: {(error.strerror or str(error)).lower()}. "
                "End what uses it, or choose another port."
            ) from error
        inner = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        self._door.open(inner)
        self._patrol = asyncio.create_task(self._patrolling())

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, give those under way ``grace`` seconds, then end them."""
        await self._server.stop(grace)
        await self._door.close()
        self._patrol.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._patrol
        self._turns.close()

    def _certificate(self) -> Any:
        key, certificate = self._kit.pair()
        authority = self._kit.authority_pem()
        self._configuration = (key, certificate, authority)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def _renewed(self) -> Any:
        """Return the certificate for a new connection if it is another one than before; gRPC's threads call this."""
        if (*self._kit.pair(), self._kit.authority_pem()) == self._configuration:
            return None
        log.info("The server's certificate is a new one.")
        return self._certificate()

    async def _patrolling(self) -> None:
        """Once a second, end the streams of those who are admitted no more."""
        while True:
            await asyncio.sleep(PATROL_S)
            roster = self._kit.roster()
            for task, pem in tuple(self._live.items()):
                try:
                    roster.admit(pem)
                except HansaError as error:
                    self._expelled[task] = error
                    task.cancel()

    def _guarded(self, name: str, work: _Work) -> Callable[[Any, _Context], Awaitable[None]]:
        """Return a gRPC handler that admits the caller, does the work and lets its errors travel."""

        async def handle(_: Any, context: _Context) -> None:
            pem = context.auth_context().get("x509_pem_cert", [b""])[0]
            said = dict(context.invocation_metadata() or ()).get(protocol.PROTOCOL_KEY)
            try:
                async with self._admitted(name, self._door.peer(context.peer()), pem, said) as caller:
                    await work(caller, context)
            except _EndError as end:
                await _end(context, end.error, end.code)

        return handle

    @contextlib.asynccontextmanager
    async def _admitted(self, name: str, peer: str, pem: bytes, said: object) -> AsyncIterator[Identity]:
        """Find out who calls, and let them do no more than one may; whatever goes wrong is an _EndError."""
        who = "somebody"
        try:
            caller = self._kit.roster().admit(pem)
            who = caller.member
        except HansaError as refusal:
            log.warning("%s was refused to %s: %s", name, peer, refusal)
            await self._handlers.refused(peer.rpartition(":")[0], name, refusal)
            raise _EndError(refusal, grpc.StatusCode.UNAUTHENTICATED) from refusal
        if said != str(PROTOCOL):
            raise _EndError(
                VersionError(
                    f"The server speaks protocol {PROTOCOL}, the caller {str(said)[:20]}. "
                    "Install the same release of Hansa at both ends."
                )
            )
        if self._calls[who] >= CALLS_PER_PEER:
            busy = UnreachableError(f"{who} makes {CALLS_PER_PEER} calls at once")
            raise _EndError(busy, grpc.StatusCode.UNAVAILABLE)
        task = asyncio.current_task()
        assert task
        self._calls[who] += 1
        self._live[task] = pem
        try:
            yield caller
        except HansaError as error:
            raise _EndError(error) from error
        except asyncio.CancelledError:
            if task not in self._expelled:
                raise
            task.uncancel()
            log.warning("%s of %s was ended: %s", name, who, self._expelled[task])
            raise _EndError(self._expelled[task], grpc.StatusCode.UNAUTHENTICATED) from None
        except (grpc.aio.BaseError, LostError):
            raise
        except Exception as error:  # a defect: logged here, and told without what it says
            number = secrets.token_hex(4)
            log.exception("%s of %s failed, error %s", name, who, number)
            defect = HansaError(f"The server failed at {name}; its log says more under error {number}.")
            raise _EndError(defect, grpc.StatusCode.INTERNAL) from error
        finally:
            self._calls[who] -= 1
            if not self._calls[who]:
                del self._calls[who]
            self._live.pop(task, None)
            self._expelled.pop(task, None)

    async def _take_roster(self, _: Any, context: _Context) -> None:
        """Take a newer roster from whoever brings it: TLS has shown that the authority signed his certificate."""
        try:
            offer = protocol.decode(OfferRoster, await self._read(context))
            if await asyncio.to_thread(self._kit.update_roster, offer.text):
                log.info("%s brought the roster of version %s.", context.peer(), self._kit.roster().version)
            await context.write(protocol.encode(Done()))
        except HansaError as error:
            await _end(context, error)

    def _call(self, kind: type[Message]) -> _Work:
        async def work(caller: Identity, context: _Context) -> None:
            reply = await self._handlers.call(caller, protocol.decode(kind, await self._read(context)))
            assert isinstance(reply, kind.reply), f"{kind.__name__} was answered by {type(reply).__name__}"  # type: ignore[attr-defined]
            await context.write(protocol.encode(reply))

        return work

    def _events(self, kind: type[Message], events: Callable[[Identity, Any], AsyncIterator[Message]]) -> _Work:
        async def work(caller: Identity, context: _Context) -> None:
            source = events(caller, protocol.decode(kind, await self._read(context)))
            task = asyncio.current_task()
            assert task
            try:
                async for event in source:
                    self._kit.roster().admit(self._live[task])  # an event tells as much as a call's reply
                    await context.write(protocol.encode(event))
            finally:
                if close := getattr(source, "aclose", None):
                    await close()

        return work

    async def _lane(self, connection: socket.socket, peer: str) -> None:
        """Serve a lane: one transfer after another, until its caller leaves."""
        try:
            lane = await Lane.open(connection, self._context(), self._turns, self._stall_s)
        except LostError as lost:
            log.info("No lane for %s: %s", peer, lost)
            return
        try:
            pem, said = lane.certificate_pem(), (lane.alpn or "").rpartition("/")[2]
            while True:
                request = protocol.asked(await lane.hear(protocol.MAX_MESSAGE_BYTES, IDLE_S))
                name = "Download" if isinstance(request, Get) else "Upload"
                async with self._admitted(name, peer, pem, said) as caller:
                    if isinstance(request, Get):
                        await self._download(caller, lane, request)
                    else:
                        await self._upload(caller, lane, request)
        except LostError as lost:
            log.debug("The lane of %s ended: %s", peer, lost)
        except _EndError as end:
            await lane.tell_problem(end.error)
        except HansaError as error:
            await lane.tell_problem(error)
        finally:
            lane.close()

    def _context(self) -> ssl.SSLContext:
        """Return who we are now, for a new lane."""
        now = (*self._kit.pair(), self._kit.authority_pem())
        if self._tls is None or self._tls[0] != now:
            self._tls = now, context_for(*now, server_side=True)
        return self._tls[1]

    async def _download(self, caller: Identity, lane: Lane, get: Get) -> None:
        path, manifest = await _beating(lane, self._handlers.source(caller, get))
        if get.ranges is None:
            await lane.say(await asyncio.to_thread(manifest.encode))
            return
        indices = in_ranges(get.ranges, manifest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"Can't read {path.name}: {error.strerror}.") from error
        try:
            await lane.send_pieces(descriptor, manifest, indices, path, partial(self._handlers.sent, caller))
        finally:
            os.close(descriptor)

    async def _upload(self, caller: Identity, lane: Lane, offer: Offer) -> None:
        place = await _beating(lane, self._handlers.offered(caller, offer))
        longest = MAX_MANIFEST_BYTES if place is None else min(place.max_manifest_bytes, MAX_MANIFEST_BYTES)
        if offer.manifest_bytes > longest:
            raise WireError(f"A manifest of {offer.manifest_bytes:,} bytes is too long; {longest:,} are accepted here.")
        data = await lane.hear(offer.manifest_bytes)
        if place is None:
            await lane.say(protocol.encode(Wanted([])))
            await lane.say(protocol.encode(Done()))
            return

        def begin() -> Incoming:
            manifest = Manifest.decode(data)
            if manifest.digest != offer.digest:
                raise WireError("A manifest has another digest than the one it was offered by.")
            place.check(manifest)
            return stack.enter_context(Incoming(place.path, manifest, max_bytes=place.max_bytes, spares=place.spares))

        with contextlib.ExitStack() as stack:
            incoming = await _beating(lane, finished(begin))
            ranges = await finished(incoming.missing)
            await lane.say(protocol.encode(Wanted(ranges)))
            await lane.receive_pieces(incoming, in_ranges(ranges, incoming.manifest))
            await _beating(lane, finished(incoming.finish))
            await _beating(lane, self._handlers.received(caller, offer, incoming))
        await lane.say(protocol.encode(Done()))

    async def _read(self, context: _Context) -> bytes:
        try:
            async with asyncio.timeout(self._stall_s):
                data = await context.read()
        except TimeoutError:
            raise UnreachableError(f"Nothing came for {self._stall_s:g} s; the call was ended.") from None
        if data is grpc.aio.EOF:
            raise WireError("A call ended before all of it had been said.")
        assert isinstance(data, bytes)
        return data


async def serve(handlers: Handlers, kit: Kit, host: str, port: int, *, stall_s: float = STALL_S) -> Server:
    """Start to listen.

    Args:
        handlers: what to do with what is said.
        kit: the server's certificate, its authority, and the roster.
        host: the address to listen on.
        port: the TCP port; 0 for a free one.
        stall_s: how long an upload may stand still.

    Raises:
        UnreachableError: the port is in use, or is not one to listen on.
    """
    server = Server(handlers, kit, stall_s)
    await server.start(host, port)
    return server


async def _end(context: _Context, error: HansaError, code: Any = None) -> None:
    """End a call with an error; raises, as gRPC wants it."""
    if code is None:
        code = grpc.StatusCode.FAILED_PRECONDITION
        if isinstance(error, AccessError):
            code = grpc.StatusCode.PERMISSION_DENIED
    await context.abort(code, type(error).__name__, ((protocol.PROBLEM_KEY, protocol.problem(error)),))


async def _beating(lane: Lane, work: Awaitable[_T]) -> _T:
    """Await something of our own; the peer gets a sign of life now and then meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=BEAT_S))[0]:
            await lane.beat()
    except BaseException:  # let go of what was begun; raised again
        task.cancel()
        await asyncio.wait({task})
        raise
    return task.result()
