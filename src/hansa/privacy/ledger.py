# SPDX-License-Identifier: Apache-2.0
"""What has been spent of a data set's privacy, over all jobs, in a file that shows when it was tampered with.

    NAME.jsonl    a line for each release that training was allowed to make, and one when its update may leave; each
                  has the SHA-256 of the line before
    NAME.head     how many lines count and the SHA-256 of the last, signed with the owner's key

A line is written and synced first, then the head, by one rename. The head decides: a line beyond it was never
confirmed, nothing was trained on it, and it is written over. So a crash at any instant leaves the books before or after
a charge.

Releases are added up by Rényi divergences, and by privacy loss distributions where those would already refuse; without
sampling both are exact for Gaussian noise (:mod:`hansa.privacy.accounting`).

| case | result |
|---|---|
| the same job, task and release again, as its agent or worker was killed | charged once |
| ... after its update may have left | charged again: who gets two draws of the noise learns more |
| a round that would exceed the budget | PolicyError, and nothing is charged |
| noise of the server's against the server; shares of other sites against all other sites | they count as none |
| a release that hides an example only, of a budget for whole users | PolicyError: no amount of it would do |
| a line that was changed, removed, added in between, or exchanged | TamperedError that names the line |
| lines cut off at the end | TamperedError: the head counts more |
| the head gone or altered, signed by somebody else, or that of other data | TamperedError |
| one line, whole or torn, beyond the head | a crash; it does not count |
| both files gone, or both put back to an older state | not seen here: keep the head's count elsewhere too |
| two processes at once | one after the other |
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from pydantic import Field

from hansa.core import storage
from hansa.core.config import Section
from hansa.errors import AccessError, PolicyError, StorageError
from hansa.privacy.accounting import Release, epsilon

_PURPOSE = b"hansa privacy budget v1\0"


Adversary = Literal["server", "server-and-corrupt", "sites"]

_AT_SERVER = frozenset({"central", "dp-ftrl"})


class Budget(Section):
    """What may be learnt of a data set in all, by whom."""

    epsilon: Annotated[float, Field(gt=0)] = Field(description="The ε that all jobs together may spend.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="At this δ; well below one over the examples.")
    unit: Literal["example", "user"] = Field(
        "example", description="Whose data it protects: one example, or all of this site's (it is one user's device)."
    )
    adversary: Adversary = Field(
        "server",
        description="Against whom: the server with all other sites, so that only noise added here counts; the server "
        "with as many sites as a job's secure_aggregation.corrupt says, so that distributed noise counts in full; or "
        "the other sites and the public, so that the server is trusted to add noise.",
    )


class TamperedError(StorageError):
    """A ledger is not as it was written."""


class Seal(Protocol):
    """Who vouches for a ledger."""

    def sign(self, data: bytes) -> tuple[bytes, str]:
        """Return a signature, and the certificate that it is checked by."""

    def check(self, data: bytes, signature: bytes, certificate: str) -> None:
        """Raise AccessError unless the signature is the owner's."""


_Count = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What every line has.

    Attributes:
        number: which line, from 1.
        before: the SHA-256 of the line before; of nothing for the first.
        at: when it was written (UTC).
        job: the digest of what was signed.
        task: the task's name.
    """

    number: _Count
    before: str
    at: str
    job: str
    task: str


class Sent(_Line, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="sent"):
    """The update of a task may leave from now on."""


class Entry(_Line, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="charge"):
    """A charge.

    Attributes:
        id: the job's id at the server.
        round: the task's round.
        mechanism: how it is kept private.
        unit: whom its noise hides.
        noise_multiplier, rate, count, grid: the release; no grid where the noise is normal.
        honest: of distributed noise, how many sites' shares make it up; each adds one.
    """

    id: str
    round: int
    mechanism: str
    unit: Literal["example", "user"]
    noise_multiplier: _Positive
    rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    count: _Count
    grid: _Positive | None = None
    honest: _Count | None = None

    @property
    def release(self) -> Release:
        """What was released."""
        return Release(self.noise_multiplier, self.rate, self.count, self.grid or math.inf)


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data: str
    count: Annotated[int, msgspec.Meta(ge=0)]
    digest: str
    signature: str = ""
    certificate: str = ""

    @property
    def signed(self) -> bytes:
        return _PURPOSE + msgspec.json.encode([self.data, self.count, self.digest])


@dataclass(frozen=True)
class Charge:
    """What a task is about to release of a data set.

    Attributes:
        job: the digest of what was signed.
        id: the job's id.
        task: the task's name.
        round: its round.
        mechanism: how it is kept private.
        unit: whom its noise hides; hiding a user hides his examples.
        release: the noise and how often.
        honest: of distributed noise, how many sites' shares make it up.
    """

    job: str
    id: str
    task: str
    round: int
    mechanism: str
    unit: Literal["example", "user"]
    release: Release
    honest: int | None = None


@dataclass(frozen=True)
class Books:
    """A ledger as it was read.

    Attributes:
        lines: those that count.
        size: their bytes.
        digest: the SHA-256 of the last.
    """

    lines: Sequence[Entry | Sent] = ()
    size: int = 0
    digest: str = field(default=hashlib.sha256().hexdigest())

    @property
    def entries(self) -> list[Entry]:
        """What was charged."""
        return [line for line in self.lines if isinstance(line, Entry)]

    def open(self, charge: Charge) -> bool:
        """Say whether a charge is paid, and its update has not left."""
        last = None
        for line in self.lines:
            if (line.job, line.task) == (charge.job, charge.task):
                last = line
        return isinstance(last, Entry) and (last.release, last.honest) == (charge.release, charge.honest)

    def spent(self, budget: Budget, *more: Entry | Charge, enough: float = 0.0) -> float:
        """Return the ε of all and ``more`` as a budget counts it; up to ``enough`` an upper bound will do."""
        every = [*self.entries, *more]
        if budget.unit == "user" and any(entry.unit == "example" for entry in every):
            return math.inf
        counts: Counter[tuple[float, float, float]] = Counter()
        for entry in every:
            seen = _seen(entry, budget.adversary)
            counts[seen.noise_multiplier, seen.rate, seen.grid] += seen.count
        releases = [Release(noise, rate, count, grid) for (noise, rate, grid), count in sorted(counts.items())]
        bound = epsilon(releases, budget.delta, "rdp")
        return bound if bound <= enough else min(bound, epsilon(releases, budget.delta, "pld"))


def _seen(entry: Entry | Charge, adversary: Adversary) -> Release:
    """Return what a release is to an adversary: noise that it adds itself, or knows, hides nothing from it."""
    if adversary != "sites" and entry.mechanism in _AT_SERVER:
        return replace(entry.release, noise_multiplier=0.0)
    if adversary != "server-and-corrupt" and entry.honest is not None:
        return replace(entry.release, noise_multiplier=entry.release.noise_multiplier / math.sqrt(entry.honest))
    return entry.release


class Ledger:
    """The ledger of one data set.

    Args:
        folder: where it lies; made by the first charge.
        data: the data set's name at its site.
        seal: who vouches for it; None leaves the head unsigned.
    """

    def __init__(self, folder: Path, data: str, seal: Seal | None = None) -> None:
        self._folder = folder
        self._data = data
        self._seal = seal
        self._path = folder / f"{data}.jsonl"
        self._head = folder / f"{data}.head"

    def charge(self, charge: Charge, budget: Budget) -> float:
        """Write a charge down, durably, before its training begins; return the ε that is spent with it.

        Raises:
            PolicyError: it would exceed the budget.
            StorageError: the ledger can't be written; TamperedError where it is not as it was written.
        """
        with self._locked():
            books = self._load()
            if books.open(charge):
                return books.spent(budget, enough=budget.epsilon)
            after = books.spent(budget, charge, enough=budget.epsilon)
            if after > budget.epsilon:
                raise PolicyError(self._refusal(books.spent(budget), after, charge, budget))
            release = charge.release
            entry = Entry(
                **self._next(books, charge.job, charge.task),
                id=charge.id,
                round=charge.round,
                mechanism=charge.mechanism,
                unit=charge.unit,
                noise_multiplier=release.noise_multiplier,
                rate=release.rate,
                count=release.count,
                grid=release.grid if math.isfinite(release.grid) else None,
                honest=charge.honest,
            )
            self._append(books, entry)
            return after

    def sent(self, job: str, task: str) -> None:
        """Write down, durably, that the update of a task may leave: to make it again is another release.

        Raises:
            StorageError: the ledger can't be written; TamperedError where it is not as it was written.
        """
        with self._locked():
            books = self._load()
            self._append(books, Sent(**self._next(books, job, task)))

    @staticmethod
    def _next(books: Books, job: str, task: str) -> dict[str, Any]:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return {"number": len(books.lines) + 1, "before": books.digest, "at": at, "job": job, "task": task}

    def read(self) -> Books:
        """Return what is spent, after checking every line.

        Raises:
            StorageError: it can't be read; TamperedError where it is not as it was written, and how.
        """
        if not self._folder.exists():
            return Books()
        with self._locked():
            return self._load()

    def seal(self) -> Books:
        """Sign the head anew, whoever signed it: the owner has looked at the ledger and vouches for it.

        Raises:
            StorageError: it can't be written; TamperedError where lines and head do not belong together.
        """
        with self._locked():
            books = self._load(signed=False)
            if books.lines:
                self._write_head(len(books.lines), books.digest)
            return books

    def _load(self, *, signed: bool = True) -> Books:
        try:
            data, head = _read(self._path), _read(self._head)
        except OSError as error:
            raise StorageError(f"The ledger {self._path} can't be read: {error.strerror}.") from error
        if head is None:
            if data:
                raise self._tampered(f"its head, {self._head.name}, is gone")
            return Books()
        said = self._checked(head, signed=signed)
        lines = (data or b"").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < said.count:
            raise self._tampered(f"line {len(whole) + 1} is missing; {said.count} were written")
        if len(lines) > said.count + 1:
            raise self._tampered(f"line {said.count + 2} was added; {said.count} were written")
        read: list[Entry | Sent] = []
        digest = Books().digest
        for number, line in enumerate(whole[: said.count], 1):
            entry = self._entry(number, line)
            if entry.number != number:
                raise self._tampered(f"line {entry.number} stands where line {number} was")
            if entry.before != digest:
                raise self._tampered(f"line {max(number - 1, 1)} was changed")
            read.append(entry)
            digest = hashlib.sha256(line).hexdigest()
        if digest != said.digest:
            raise self._tampered(f"line {said.count} was changed")
        return Books(read, sum(map(len, whole[: said.count])), digest)

    def _entry(self, number: int, line: bytes) -> Entry | Sent:
        try:
            return msgspec.json.decode(line, type=Entry | Sent)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._tampered(f"line {number} was changed: {error}") from error

    def _checked(self, data: bytes, *, signed: bool) -> _Head:
        try:
            head = msgspec.json.decode(data, type=_Head)
            signature = base64.b64decode(head.signature, validate=True)
            if head.data != self._data:
                raise self._tampered(f"its head is that of {head.data[:100]!r}")
            if signed and self._seal is not None:
                self._seal.check(head.signed, signature, head.certificate)
        except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as error:
            raise self._tampered(f"its head, {self._head.name}, was changed: {error}") from error
        except AccessError as error:
            raise self._tampered(f"its head, {self._head.name}, was changed: {error.message}") from error
        return head

    def _append(self, books: Books, entry: Entry | Sent) -> None:
        line = msgspec.json.encode(entry) + b"\n"
        try:
            if not self._head.exists():  # so that a ledger without a head is never one that was just begun
                self._write_head(0, books.digest)
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.truncate(books.size)
                file.seek(books.size)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            storage.sync_directory(self._folder)
        except OSError as error:
            raise storage.full(self._path, error) from error
        self._write_head(entry.number, hashlib.sha256(line).hexdigest())

    def _write_head(self, count: int, digest: str) -> None:
        head = _Head(self._data, count, digest)
        if self._seal is not None:
            signature, certificate = self._seal.sign(head.signed)
            encoded = base64.b64encode(signature).decode()
            head = msgspec.structs.replace(head, signature=encoded, certificate=certificate)
        storage.write_atomic(self._head, msgspec.json.encode(head))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / f".{self._data}.lock").open("w")
        except OSError as error:
            raise storage.full(self._folder, error) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _refusal(self, spent: float, after: float, charge: Charge, budget: Budget) -> str:
        if after == math.inf and charge.unit != budget.unit == "user":
            why = f"{charge.mechanism!r} hides one {charge.unit}, and the budget is for a {budget.unit}"
        else:
            why = f"round {charge.round} of {charge.id} would make it {after:.4g}"
        return (
            f"The privacy budget of {self._data!r} does not allow this round: of ε = {budget.epsilon:g} at δ = "
            f"{budget.delta:g}, {spent:.4g} is spent, and {why}."
        )

    def _tampered(self, what: str) -> TamperedError:
        return TamperedError(
            f"The privacy ledger {self._path} is not as it was written: {what}. Nothing is trained on {self._data!r} "
            "until its owner has put it right, from a backup of both files."
        )


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
