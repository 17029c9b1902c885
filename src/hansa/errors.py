# SPDX-License-Identifier: Apache-2.0
"""Every exception Hansa raises on purpose, and the exit code each one ends a command with.

HansaError                  1
├── JobError                2   the job file or a flag: unknown key, wrong value, unknown name
├── DataError               3   a missing file or column, an unknown label, a site with no examples
├── ModelError              4   a base model that isn't there, a LoRA target that matches nothing
├── FitError                5   pieces that don't compose
├── SiteError               6   one site could not do its part (recorded; ends a job only below quorum)
│   ├── NonFiniteError      6   a site's loss or update is NaN or infinite
│   └── PolicyError         6   a site's own policy does not allow it
├── QuorumError             6   too few sites answered
├── StorageError            7   a full disk, a run directory that can't be written or read
├── WireError               8   bytes that are no Hansa value
│   ├── ChecksumError       8   bytes damaged on their way
│   └── VersionError        8   a value written in a format this release does not read
├── MissingExtraError       9   an optional library that this job needs is not installed
├── AccessError            10   who you are does not allow this: certificate, role or scope
├── UnreachableError       11   a server that can't be reached
├── PrivacyError           12   a privacy promise that can't be kept: a mechanism, an ε or a budget
├── AuditError             13   an attack broke a privacy promise
└── InterruptedRunError   130   stopped by the user; the finished rounds are on disk

0 is success and 70 a defect in Hansa itself (a traceback is shown). Exit codes are part of the interface.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SUCCESS = 0
DEFECT = 70


class HansaError(Exception):
    """Something a user can cause and can mend.

    Args:
        message: what happened, where, and what to do next, in one or two sentences.
        job: the job's name, where known.
        site: the site's name, where known.
        round: the round's number, where known.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, job: str | None = None, site: str | None = None, round: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.job = job
        self.site = site
        self.round = round

    def __str__(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (("job", self.job), ("site", self.site), ("round", self.round))
            if value is not None
        ]
        return f"{', '.join(where)}: {self.message}" if where else self.message


class JobError(HansaError):
    """The job or a flag is wrong: an unknown key or name, a value out of range, a missing file."""

    exit_code = 2


class DataError(HansaError):
    """Data that are missing, empty, or not what the job says they are."""

    exit_code = 3


class ModelError(HansaError):
    """A model, tokenizer or adapter that can't be loaded or doesn't fit the data."""

    exit_code = 4


class FitError(HansaError):
    """Pieces of a job that do not compose; raised before any site is contacted."""

    exit_code = 5


class SiteError(HansaError):
    """One site could not do its part of a round."""

    exit_code = 6


class NonFiniteError(SiteError):
    """A site's loss, gradient or update is NaN or infinite; nothing of it is used."""


class PolicyError(SiteError):
    """A site's policy does not allow what it was asked for; the reason reaches the submitter."""


class QuorumError(HansaError):
    """Fewer sites answered than the cohort's quorum asks for."""

    exit_code = 6


class StorageError(HansaError):
    """A disk that is full, or a file that can't be read or written."""

    exit_code = 7


class WireError(HansaError):
    """Bytes from a file or the network that are not a well-formed Hansa value."""

    exit_code = 8


class ChecksumError(WireError):
    """Bytes that were damaged: the checksum does not match."""


class VersionError(WireError):
    """A value written in a format version that this release does not read."""


class MissingExtraError(HansaError):
    """An optional library that the job needs is not installed."""

    exit_code = 9


class AccessError(HansaError):
    """Who asks may not: a certificate unknown, wrong, expired or revoked, or a role or scope too small."""

    exit_code = 10


class UnreachableError(HansaError):
    """A server that can't be reached: a wrong address, a refused connection, a network that is down."""

    exit_code = 11


class PrivacyError(HansaError):
    """A privacy promise that can't be kept: an ε that no noise gives, a budget that is spent, an unfit mechanism."""

    exit_code = 12


class AuditError(HansaError):
    """An audit's attack did what a privacy promise rules out; the report says which, and by how much."""

    exit_code = 13


class InterruptedRunError(HansaError):
    """The user stopped the run; every finished round is on disk and ``--resume`` goes on from there."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known word closest to ``word``, or an empty string.

    >>> nearest("fedvag", ["fedavg", "scaffold"])
    " Did you mean 'fedavg'?"
    """
    spellings = {item.lower(): item for item in known}
    matches = difflib.get_close_matches(word.lower(), spellings, n=1)
    return f" Did you mean {spellings[matches[0]]!r}?" if matches else ""
