# SPDX-License-Identifier: Apache-2.0
"""The local socket between a user's script and the program that runs the federation at its site.

    script ── hello {protocol, token} ──> host ── welcome {site} ──> script
    host ── task {task, job, round, rounds, meta, correction, private} + parameters, context ──> script
    script ── log {key, value, ...} ──> host                       at any time
    script ── result {params_type, metrics, meta, steps} + parameters ──> host
    host ── end ──> script

A message is JSON after its length (u32, little-endian); tensors follow it as one wire value, in blocks after
their lengths, the last block empty. Nothing is pickled, and nothing listens outside this machine.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
from collections.abc import Mapping
from typing import IO, Any, BinaryIO, cast

from hansa.core import wire
from hansa.core.tree import Array, Parts
from hansa.errors import WireError

PROTOCOL = 3
SOCKET_VARIABLE = "HANSA_SOCKET"
TOKEN_VARIABLE = "HANSA_TOKEN"
ATTACH_VARIABLE = "HANSA_ATTACH"
"""Where a process that was started by hand finds a job: the folder of the socket and of the token."""
SOCKET_FILE = "socket"
TOKEN_FILE = "token"
PARAMS = "params"
"""The part of a message that holds parameters; the others are a strategy's context."""

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20
_PARTS = "parts"


class _Blocks:
    """One wire value inside the stream, with what :mod:`hansa.core.wire` needs of a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = 0
        self._ended = False

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(_LENGTH.pack(len(data)))
        return self._file.write(data)

    def end(self) -> None:
        self._file.write(_LENGTH.pack(0))

    def read(self, count: int) -> bytes:
        pieces = []
        while count and self._next():
            piece = _exactly(self._file, min(count, self._left))
            pieces.append(piece)
            count -= len(piece)
            self._left -= len(piece)
        return b"".join(pieces)

    def _next(self) -> bool:
        if not self._left and not self._ended:
            (self._left,) = _LENGTH.unpack(_exactly(self._file, _LENGTH.size))
            self._ended = not self._left
        return not self._ended


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ConnectionResetError("the other end of the local socket has closed")
    return data


class Link:
    """One end of a connected socket. Errors are OSError; TimeoutError where the socket has a timeout."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._input = cast(IO[bytes], connection.makefile("rb", _BUFFER_BYTES))
        self._output = cast(IO[bytes], connection.makefile("wb", _BUFFER_BYTES))

    def send(self, message: Mapping[str, Any], parts: Parts | None = None) -> None:
        """Send ``message``, and trees after it if they are given."""
        body = json.dumps({**message, _PARTS: parts is not None}).encode()
        self._output.write(_LENGTH.pack(len(body)) + body)
        if parts is not None:
            blocks = _Blocks(self._output)
            wire.write(cast(BinaryIO, blocks), "parameters", {}, parts)
            blocks.end()
        self._output.flush()

    def receive(self) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
        """Return the next message and the trees that came with it.

        Raises:
            WireError: what came is no message.
        """
        (length,) = _LENGTH.unpack(_exactly(self._input, _LENGTH.size))
        if length > _MAX_MESSAGE_BYTES:
            raise WireError(
                f"A message of {length} bytes came over the local socket; at most {_MAX_MESSAGE_BYTES} may."
            )
        try:
            message = json.loads(_exactly(self._input, length))
        except ValueError as error:
            raise WireError(f"What came over the local socket is no message: {error}.") from None
        if not isinstance(message, dict):
            raise WireError("What came over the local socket is no message.")
        if not message.pop(_PARTS, False):
            return message, {}
        blocks = cast(BinaryIO, _Blocks(self._input))
        return message, wire.read_parts(blocks, wire.read_envelope(blocks))

    def ready(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a message, or for the end; say whether :meth:`receive` has one."""
        self._limit(max(timeout, 1e-6))
        try:
            waiting = self._input.peek(1)  # type: ignore[attr-defined]  # select() does not see what is buffered
        finally:
            self._limit(0)
        return bool(waiting) or bool(select.select([self.connection], [], [], 0)[0])

    def _limit(self, seconds: float) -> None:
        whole = int(seconds)
        value = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def close(self) -> None:
        """Close this end, whatever is still buffered; a thread that reads from it sees the end."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        for end in (self._input, self.connection):
            end.close()
        with contextlib.suppress(OSError, ValueError):
            self._output.close()
