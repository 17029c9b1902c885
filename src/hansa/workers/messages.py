# SPDX-License-Identifier: Apache-2.0
"""What the ``processes`` engine and its workers say to each other.

    engine ── Start ──> worker: build the program ── Ready ──> engine
    engine ── Perform | Initial | Inspect | Export | Show | Summarise ──> worker ── one answer each ──> engine
    engine ── Close, or its end of the socket closes ──> the worker ends

Messages are msgpack (which has NaN and infinity), each after its length as u32; tensors travel in wire files.
Nothing is pickled.
"""

from __future__ import annotations

import struct
import traceback
from typing import Any, Literal

import msgspec

from hansa import errors
from hansa.errors import HansaError


class Start(msgspec.Struct, tag=True):
    """Build the program of ``job`` (JSON).

    Attributes:
        directory: the run's folder.
        memory_bytes: all that it may take.
        secure: where a deployed site's agent keeps the states of secure aggregation; None where sites are simulated.
    """

    job: str
    directory: str
    memory_bytes: int | None = None
    secure: str | None = None


class TermsForm(msgspec.Struct):
    """The terms of a privacy plan."""

    section: dict[str, Any]
    rounds: int
    rate: float


class CourseForm(msgspec.Struct):
    """A course as names and options; a worker does not need its list of sites."""

    name: str
    strategy: dict[str, Any]
    filters: list[dict[str, Any]]
    terms: TermsForm | None = None
    secure: dict[str, Any] | None = None


class Perform(msgspec.Struct, tag=True):
    """Carry the plan in the file ``plan`` out at ``site``; an update with tensors goes to the file ``out``."""

    ticket: int
    course: CourseForm
    plan: str
    site: str
    threads: int
    out: str


class Initial(msgspec.Struct, tag=True):
    """Write the first parameters to the file ``out``."""

    ticket: int
    threads: int
    out: str


class Inspect(msgspec.Struct, tag=True):
    """Check one site's data."""

    ticket: int
    threads: int
    site: str


class Export(msgspec.Struct, tag=True):
    """Write a model with the parameters in the file ``params`` to ``directory``."""

    ticket: int
    threads: int
    params: str
    directory: str


class Show(msgspec.Struct, tag=True):
    """Show what a model with the parameters in the file ``params`` does."""

    ticket: int
    threads: int
    params: str


class Summarise(msgspec.Struct, tag=True):
    """Turn sums into metrics."""

    ticket: int
    sums: dict[str, float]


class Close(msgspec.Struct, tag=True):
    """End after what is running."""


class Ready(msgspec.Struct, tag=True):
    """The program is built."""

    sites: list[str]
    traits: list[str]


class Done(msgspec.Struct, tag=True):
    """A request without an answer of its own is done."""

    ticket: int


class Inspected(msgspec.Struct, tag=True):
    """What a site tells of its data."""

    ticket: int
    counts: dict[str, int]
    labels: dict[str, int]


class Shown(msgspec.Struct, tag=True):
    """The answer to Show: prompt -> what the model makes of it."""

    ticket: int
    texts: dict[str, str]


class Answered(msgspec.Struct, tag=True):
    """The update of a site. ``metrics`` are its own sums summarised; None where that fails."""

    ticket: int
    site: str
    round: int
    version: int
    weight: float
    sums: dict[str, float]
    completed: float
    seconds: float
    spooled: bool
    metrics: dict[str, float] | None
    logged: dict[str, list[tuple[int | None, float | None]]]


class Absent(msgspec.Struct, tag=True):
    """The site has no update, and why."""

    ticket: int
    kind: Literal["refused", "lost", "late", "rejected"]
    reason: str


class Metrics(msgspec.Struct, tag=True):
    """The answer to Summarise."""

    ticket: int
    values: dict[str, float]


class DefectError(RuntimeError):
    """An error of a worker that is none of Hansa's: ``summary`` is its kind and message, ``trace`` the traceback."""

    def __init__(self, summary: str, trace: str) -> None:
        super().__init__(f"A defect in a worker:\n{trace}")
        self.summary = summary
        self.trace = trace


class Failed(msgspec.Struct, tag=True):
    """A request ended in an error: the name of a Hansa error, or none and a traceback where it is a defect.

    Ticket 0 is the building of the program.
    """

    ticket: int
    error: str
    message: str
    site: str | None = None
    round: int | None = None
    trace: str = ""

    def as_error(self) -> Exception:
        """Return the error as it was raised in the worker."""
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, HansaError):
            return kind(self.message, site=self.site, round=self.round)
        return DefectError(self.message, self.trace)


Work = Perform | Initial | Inspect | Export | Show
Answer = Done | Inspected | Shown | Answered | Absent | Metrics | Failed

TO_WORKER: msgspec.msgpack.Decoder[Start | Work | Summarise | Close] = msgspec.msgpack.Decoder(
    Start | Work | Summarise | Close
)
FROM_WORKER: msgspec.msgpack.Decoder[Ready | Answer] = msgspec.msgpack.Decoder(Ready | Answer)

LENGTH = struct.Struct("<I")

OUT_OF_MEMORY = 86
"""The exit code of a worker that needed more memory than it may take."""


def frame(message: msgspec.Struct) -> bytes:
    """Return ``message`` as bytes, after their number."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def failed(ticket: int, error: Exception) -> Failed:
    """Describe ``error``: by its nearest class in :mod:`hansa.errors`, or by its message and traceback."""
    if isinstance(error, HansaError):
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return Failed(ticket, name, error.message, error.site, error.round)
    trace = "".join(traceback.format_exception(error))
    return Failed(ticket, "", f"{type(error).__name__}: {error}", trace=trace)
