# SPDX-License-Identifier: Apache-2.0
"""A TLS connection that carries files, one after another: frames, and pieces that go from disk to disk.

Calls are gRPC's; what is large has connections of its own, over which pieces follow each other as fast as TCP lets
them. A frame is

    length u32 (little-endian) · kind u8 · body

and kinds are those of :class:`Kind`. A transfer's steps (:data:`Steps`) run in one of a few threads
(:mod:`hansa.transport.turns`) until the network makes them wait; then the thread goes to whoever is ready. So thousands
of lanes need no threads, and only threads have buffers.

===============================================  ================================================================
many lanes, one fast, one slow                   who is ready has the next turn, of ``TURN_BYTES`` at the most
a peer that stands still                         LostError after ``stall_s``; beats are signs of life
a peer that sends faster than the disk writes    waits: TCP's window is all that is under way
a piece with other bytes than its digest says    ChecksumError; it does not count
a frame that is too long, or out of place        WireError before its body is read
a peer's problem while we send                   is heard and raised at once
cancelled                                        a turn that is under way ends first, so no file is closed under it
===============================================  ================================================================
"""

from __future__ import annotations

import contextlib
import enum
import secrets
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from hansa.errors import HansaError, WireError
from hansa.transport import protocol
from hansa.transport.messages import PROTOCOL
from hansa.transport.pieces import Incoming, Manifest, fill
from hansa.transport.turns import LostError, Turns, Wait

FAMILY = "hansa-files/"
ALPN = f"{FAMILY}{PROTOCOL}"
"""What a client asks for in TLS (RFC 7301) who wants a lane."""

BLOCK_BYTES = 128 << 10
"""How much is read, encrypted and sent, or received, hashed and written at a time: it stays in the cache of a core."""
FEED_BYTES = 32 << 10
"""How much TLS is given at a time: it keeps room for the most that it ever had, for each lane."""
TURN_BYTES = 4 << 20
RECORD_BYTES = (16 << 10) + 64
"""The longest record of TLS, and some (RFC 8446, section 5.2)."""
FRAME_BYTES = 1 << 20
"""The longest part of a message; longer ones come in several."""
PROBLEM_BYTES = 1 << 16
PART_S = 10.0
"""How long what a peer still sends is read after we told a problem: it could be lost otherwise."""

_HEADER = struct.Struct("<IB")

_T = TypeVar("_T")


class Kind(enum.IntEnum):
    """What a frame is: a sign of life, a message or the parts that come before its last one, a piece, or a problem."""

    BEAT = 0
    PART = 1
    MESSAGE = 2
    PIECE = 3
    PROBLEM = 4


Steps = Generator[Wait, None, _T]


class _Buffers(threading.local):
    """What a thread reads into; between two turns nothing is in them."""

    def __init__(self) -> None:
        self.raw = memoryview(bytearray(BLOCK_BYTES))
        self.plain = memoryview(bytearray(BLOCK_BYTES + _HEADER.size))


_buffers = _Buffers()


def context_for(key: bytes, certificate: bytes, authority: bytes, *, server_side: bool) -> ssl.SSLContext:
    """Return who we are and whom we trust, as TLS 1.3 wants it.

    Args:
        key: our private key, PEM. OpenSSL reads it from a file alone, so it goes there encrypted for the moment.
        certificate: ours, PEM.
        authority: the certificate of the authority that the other side's has to be signed by, PEM.
        server_side: whether we are the one that listens.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.decode())
    context.set_alpn_protocols([ALPN])
    if server_side:
        context.num_tickets = 0  # nobody comes back with one, and a lane that is idle has nothing unread
    secret = secrets.token_hex(16).encode()
    sealed = load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret)
    )
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate + sealed)
        file.flush()
        context.load_cert_chain(file.name, password=secret)
    return context


class Lane:
    """A connection for files; `open` makes one. One transfer at a time uses it."""

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, turns: Turns, stall_s: float, server_name: str | None
    ) -> None:
        self._socket = connection
        self._turns = turns
        self._stall_s = stall_s
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._arrived, self._leaving, server_side=server_name is None, server_hostname=server_name
        )
        self._decrypt: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]
        self._unsent = memoryview(b"")
        self._rest = memoryview(b"")  # what was received and TLS has not been given, in the thread's buffer
        self._overheard = bytearray()
        self._poll = select.poll()

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        context: ssl.SSLContext,
        turns: Turns,
        stall_s: float,
        server_name: str | None = None,
    ) -> Lane:
        """Shake hands.

        Args:
            connection: a TCP connection; it is the lane's from now on, whatever happens.
            context: certificates, and whom to trust.
            turns: where the work is done.
            stall_s: how long nothing may move.
            server_name: who the other side has to be; None if it is the one that dialled.

        Raises:
            LostError: it ended, stood still, or TLS failed.
        """
        try:
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # what is no TCP has no such thing
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lane = cls(connection, context, turns, stall_s, server_name)
            await lane._drive(lane._shake_hands())
        except BaseException:  # let go of the connection; raised again
            connection.close()
            raise
        return lane

    @property
    def alpn(self) -> str | None:
        """The protocol that both ends agreed on, if any."""
        return self._tls.selected_alpn_protocol()

    def certificate_pem(self) -> bytes:
        """Return the other side's certificate, PEM."""
        der = self._tls.getpeercert(binary_form=True)
        assert der, "both sides need one"
        return ssl.DER_cert_to_PEM_cert(der).encode()

    @property
    def is_open(self) -> bool:
        """Whether, as far as one can see, an idle lane may be used again: nothing is unread, not even its end."""
        if self._arrived.pending or self._tls.pending() or self._overheard:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    async def beat(self) -> None:
        """Send a sign of life."""
        await self._drive(self._say(Kind.BEAT, b""))

    async def say(self, data: bytes) -> None:
        """Send a message."""

        def steps() -> Steps[None]:
            last = max(0, (len(data) - 1) // FRAME_BYTES) * FRAME_BYTES
            for offset in range(0, last, FRAME_BYTES):
                yield from self._say(Kind.PART, data[offset : offset + FRAME_BYTES])
                self._overhear()
            yield from self._say(Kind.MESSAGE, data[last:])

        await self._drive(steps())

    async def hear(self, most: int, patience_s: float | None = None) -> bytes:
        """Wait for a message.

        Args:
            most: how long it may be, in bytes.
            patience_s: how long it may take to begin; as long as a lane may stand still if None.

        Raises:
            LostError: the connection broke or stood still.
            WireError: something else came, or more than ``most`` bytes.
            HansaError: the problem that came instead.
        """

        def steps() -> Steps[bytes]:
            data = bytearray()
            while True:
                kind, length = yield from self._header()
                if kind not in (Kind.PART, Kind.MESSAGE):
                    raise WireError(f"The other side sent a {kind.name.lower()} where it was to say something.")
                if length > FRAME_BYTES or len(data) + length > most:
                    raise WireError(f"The other side says more than {most:,} bytes, or too many at a time.")
                begin = len(data)
                data += bytes(length)
                with memoryview(data) as view:
                    yield from self._read(view[begin:])
                if kind is Kind.MESSAGE:
                    return bytes(data)

        return await self._drive(steps(), patience_s)

    async def send_pieces(
        self,
        descriptor: int,
        manifest: Manifest,
        indices: Iterable[int],
        path: Path,
        told: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        """Send pieces of a file as they stand there; whoever receives them checks them.

        Args:
            descriptor: the file, open.
            manifest: where its pieces are.
            indices: which ones.
            path: the file's name, for messages.
            told: called now and then with the bytes that were sent since.

        Raises:
            LostError: the connection broke or stood still.
            StorageError: the file can't be read, or is shorter than it was.
            HansaError: the problem that came from the other side.
        """
        sent = 0

        def steps() -> Steps[None]:
            nonlocal sent
            turn = 0
            for index in indices:
                length, offset = manifest.pieces[index][0], manifest.offsets[index]
                self._overhear()
                done = 0
                while done < length:
                    buffer = _buffers.plain
                    begin = 0 if done else _HEADER.size
                    if begin:
                        _HEADER.pack_into(buffer, 0, length, Kind.PIECE)
                    count = min(length - done, BLOCK_BYTES)
                    fill(descriptor, buffer[begin : begin + count], offset + done, path)
                    self._encrypt(buffer[: begin + count])
                    yield from self._flush()
                    done += count
                sent += length
                turn += length
                if turn >= TURN_BYTES:
                    turn = 0
                    yield Wait.TURN

        def tell() -> None:
            nonlocal sent
            count, sent = sent, 0
            if count:
                told(count)

        await self._drive(steps(), told=tell)

    async def receive_pieces(
        self, incoming: Incoming, indices: Iterable[int], told: Callable[[], object] = lambda: None
    ) -> None:
        """Take pieces and write each to where it belongs.

        Args:
            incoming: the file that arrives.
            indices: which pieces are to come, in this order.
            told: called now and then when more has come.

        Raises:
            LostError: the connection broke or stood still.
            ChecksumError: a piece is not what its manifest lists.
            WireError: something else came.
            StorageError: the disk is full or fails.
            HansaError: the problem that came from the other side.
        """

        def steps() -> Steps[None]:
            turn = 0
            read = self._decrypt
            for index in indices:
                kind, length = yield from self._header()
                if kind is not Kind.PIECE or length != incoming.manifest.pieces[index][0]:
                    raise WireError(
                        f"A {kind.name.lower()} of {length} bytes came where piece {index} of {incoming.path.name} "
                        "was to."
                    )
                piece = incoming.begin(index)
                left = length
                if self._overheard:
                    piece.add(self._overheard[:left])
                    left -= len(self._overheard[:left])
                    del self._overheard[: length - left]
                while left:
                    buffer = _buffers.plain[: min(left, BLOCK_BYTES)]
                    filled, there = 0, True
                    while filled < len(buffer) and there:
                        if self._arrived.pending < RECORD_BYTES:
                            self._take_in(linger=False)  # a try with half a record costs more than this one
                        try:
                            count = read(len(buffer) - filled, buffer[filled:])
                        except ssl.SSLWantReadError:
                            there = self._take_in()
                        except ssl.SSLError as error:
                            _lost(error)
                        else:
                            filled += count or _closed()
                    piece.add(buffer[:filled])
                    left -= filled
                    if not there:
                        yield Wait.READ
                piece.finish()
                turn += length
                if turn >= TURN_BYTES and not self._rest:
                    turn = 0
                    yield Wait.TURN

        await self._drive(steps(), told=told)

    async def tell_problem(self, error: HansaError) -> None:
        """Tell the other side a problem and read on until it has heard: what is unread would cut the message off."""

        def steps() -> Steps[None]:
            yield from self._say(Kind.PROBLEM, protocol.problem(error))
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < until:
                try:
                    if not self._socket.recv_into(_buffers.raw):
                        return
                except BlockingIOError:
                    yield Wait.READ
                except OSError:
                    return

        until = time.monotonic() + PART_S
        with contextlib.suppress(LostError):
            await self._drive(steps(), PART_S)

    async def _drive(
        self, steps: Steps[_T], patience_s: float | None = None, told: Callable[[], object] = lambda: None
    ) -> _T:
        """Go through steps, in threads; what is ``told`` is told here."""
        ended: list[_T] = []

        def turn() -> Wait | None:
            try:
                return next(steps)
            except StopIteration as end:
                ended.append(end.value)
                return None
            finally:
                if self._rest:
                    self._arrived.write(self._rest)
                    self._rest = memoryview(b"")

        patience_s = self._stall_s if patience_s is None else patience_s
        number = self._socket.fileno()
        try:
            while await self._turns.go(turn, number, patience_s, self._stall_s) is Wait.TURN:
                told()
        finally:
            steps.close()
        told()
        return ended[0]

    def _shake_hands(self) -> Steps[None]:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                yield from self._flush()
                while not self._take_in():
                    yield Wait.READ
            except ssl.SSLError as error:
                with contextlib.suppress(LostError):
                    yield from self._flush()  # the alert that says why
                _lost(error)
            else:
                yield from self._flush()
                return

    def _say(self, kind: Kind, body: bytes) -> Steps[None]:
        self._encrypt(_HEADER.pack(len(body), kind) + body)
        yield from self._flush()

    def _encrypt(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            _lost(error)

    def _flush(self) -> Steps[None]:
        """Send what TLS has made."""
        while True:
            if not self._unsent:
                data = self._leaving.read()
                if not data:
                    return
                self._unsent = memoryview(data)
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                if not self._lingered(select.POLLOUT):
                    yield Wait.WRITE
                    if self._tls.version():
                        self._overhear()
            except OSError as error:
                if self._tls.version():
                    self._overhear()  # it may have said why
                _lost(error)

    def _take_in(self, linger: bool = True) -> bool:
        """Give TLS some of what has come, and return whether anything had."""
        buffer = _buffers.raw
        while not self._rest:
            try:
                count = self._socket.recv_into(buffer)
            except BlockingIOError:
                if not (linger and self._lingered(select.POLLIN)):
                    return False
            except OSError as error:
                _lost(error)
            else:
                if not count:
                    self._arrived.write_eof()  # TLS says so once what came before is read
                    return True
                self._rest = buffer[:count]
        self._arrived.write(self._rest[:FEED_BYTES])
        self._rest = self._rest[FEED_BYTES:]
        return True

    def _lingered(self, event: int) -> bool:
        """Wait a moment for the network, unless somebody else may need this thread."""
        if self._turns.crowded:
            return False
        self._poll.register(self._socket, event)
        return bool(self._poll.poll(self._turns.linger_ms))

    def _header(self) -> Steps[tuple[Kind, int]]:
        """Read the header of the next frame that is no beat; a problem is raised."""
        header = bytearray(_HEADER.size)
        while True:
            yield from self._read(memoryview(header))
            length, number = _HEADER.unpack(header)
            kind = _kind(number)
            if kind is Kind.PROBLEM:
                if length > PROBLEM_BYTES:
                    raise WireError(f"The other side tells a problem of {length:,} bytes.")
                body = bytearray(length)
                yield from self._read(memoryview(body))
                raise self._told(bytes(body))
            if kind is not Kind.BEAT:
                return kind, length
            if length:
                raise WireError("A beat has a body.")

    def _read(self, view: memoryview) -> Steps[None]:
        """Fill a buffer."""
        if self._overheard:
            count = len(self._overheard[: len(view)])
            view[:count] = self._overheard[:count]
            del self._overheard[:count]
            view = view[count:]
        while view:
            try:
                count = self._decrypt(len(view), view)
            except ssl.SSLWantReadError:
                yield from self._flush()
                while not self._take_in():
                    yield Wait.READ
            except ssl.SSLError as error:
                _lost(error)
            else:
                view = view[count or _closed() :]

    def _overhear(self) -> None:
        """While we send, see whether the other side has said something: a problem is raised, beats are nothing."""
        end: ssl.SSLError | None = None
        while end is None and self._take_in(linger=False):
            try:
                while len(self._overheard) <= PROBLEM_BYTES + _HEADER.size:
                    self._overheard += self._tls.read(BLOCK_BYTES) or _closed()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                end = error
        while len(self._overheard) >= _HEADER.size:
            length, number = _HEADER.unpack_from(self._overheard)
            kind = _kind(number)
            if kind not in (Kind.BEAT, Kind.PROBLEM) or length > PROBLEM_BYTES:
                raise WireError(f"The other side sent a {kind.name.lower()} while it was being sent something.")
            if len(self._overheard) < _HEADER.size + length:
                break
            body = bytes(self._overheard[_HEADER.size : _HEADER.size + length])
            del self._overheard[: _HEADER.size + length]
            if kind is Kind.PROBLEM:
                raise self._told(body)
        if end:
            _lost(end)

    def _told(self, problem: bytes) -> HansaError:
        """Return the problem that the other side tells; only who listens tells any."""
        if self._tls.server_side:
            return WireError("A caller tells a problem; one that has a problem leaves.")
        return protocol.raised(problem)


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError:
        raise WireError(f"There is no frame of kind {number}.") from None


def _closed() -> NoReturn:
    raise LostError("the other side closed the connection")


def _lost(error: OSError) -> NoReturn:
    """Raise what TLS or TCP said as a connection lost."""
    if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError):
        _closed()
    if isinstance(error, ssl.SSLError):
        raise LostError(f"TLS failed: {error.reason or error}", connecting=True) from error
    raise LostError(f"the connection broke: {(error.strerror or str(error)).lower()}") from error
