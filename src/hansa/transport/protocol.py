# SPDX-License-Identifier: Apache-2.0
"""What both ends of a connection hold to, beside the messages themselves.

Each request type is a gRPC method of its name: ``/hansa.Federation/AskAgenda``. Bodies are msgpack
(https://github.com/msgpack/msgpack/blob/master/spec.md). Files take connections of their own, lanes
(:mod:`hansa.transport.lane`), at the same port, one transfer after another:

    download   client: Get                   server: beat* · manifest; or beat* · pieces
    upload     client: Offer · manifest      server: beat* · Wanted      client: pieces      server: beat* · Done

A beat is "I am busy with this". Pieces come in the order in which they were asked for. A problem ends the connection.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from hansa import errors
from hansa.errors import AccessError, HansaError, WireError
from hansa.transport.messages import INLINE_BYTES, PROTOCOL, SERVICE, Get, Message, Offer, Problem

PROTOCOL_KEY = "hansa-protocol"
PROBLEM_KEY = "hansa-problem-bin"
METADATA = ((PROTOCOL_KEY, str(PROTOCOL)),)

MAX_MESSAGE_BYTES = 2 * INLINE_BYTES + (1 << 16) + 64
"""The longest request."""
MAX_AGENDA_BYTES = 64 << 20
"""The longest reply: an agenda holds a plan of up to INLINE_BYTES for each open task."""

READ_OPTIONS = [(f"grpc.experimental.tcp_{name}read_chunk_size", 64 << 10) for name in ("", "min_", "max_")]
"""How much gRPC reads at a time; by itself it comes to take up to 4 MiB, and both ends a twentieth more time."""

_M = TypeVar("_M", bound=Message)


class Pace:
    """How long to wait before one says, or asks for, what may be the same again: ever longer while it is."""

    def __init__(self) -> None:
        self._last: object = None
        self._pause = 0.0

    def pause(self, said: object) -> float:
        """Return the pause in seconds after ``said``: none if it was news."""
        self._pause = min(max(2 * self._pause, 0.01), 1.0) if said == self._last else 0.0
        self._last = said
        return self._pause


def path_of(method: str) -> str:
    """Return the gRPC path of a method."""
    return f"/{SERVICE}/{method}"


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    return msgspec.msgpack.encode(message)


def decode(kind: type[_M], data: bytes) -> _M:
    """Read a message.

    Raises:
        WireError: these bytes are no such message.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"This is no {kind.__name__} message: {error}.") from error


def asked(data: bytes) -> Get | Offer:
    """Read what somebody asks of a lane.

    Raises:
        WireError: these bytes are neither.
    """
    try:
        return msgspec.msgpack.decode(data, type=Get | Offer)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"This is no Get and no Offer: {error}.") from error


def problem(error: HansaError) -> bytes:
    """Return an error as it travels in trailing metadata, whose size HTTP/2 peers limit."""
    return encode(Problem(type(error).__name__, error.message[:1500], error.job, error.site, error.round))


def raised(data: bytes) -> HansaError:
    """Return the error that travelled; one of a class that this release does not know is a plain HansaError."""
    try:
        met = decode(Problem, data)
    except WireError:
        return WireError("The other side reported an error that this release can't read.")
    kind = getattr(errors, met.error, HansaError)
    if not (isinstance(kind, type) and issubclass(kind, HansaError)):
        kind = HansaError
    return kind(met.message, job=met.job, site=met.site, round=met.round)


def from_code(code: str, details: str) -> HansaError:
    """Return the error for a gRPC status that came without one of ours."""
    kind = {"UNAUTHENTICATED": AccessError, "PERMISSION_DENIED": AccessError}.get(code, WireError)
    return kind(f"The server, or a proxy before it, ended the call: {code}, {details[:300]}.")
