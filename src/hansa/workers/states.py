# SPDX-License-Identifier: Apache-2.0
"""What the sites that a machine runs keep of secret sums, by masks or encrypted: a folder a course, a few files a site.

Any process of a site may go on where another stopped: a deployed site's agent answers the messages, and its worker,
which knows no identity, masks or encrypts the update. So what one has read and changes is written only if it is still
there.

| case | result |
|---|---|
| another process of the site changed a state meanwhile | PrivacyError; what it wrote stays |
| a state can't be read or written | StorageError |
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hansa.core import storage
from hansa.errors import PrivacyError, StorageError
from hansa.secagg.protocol import Signer
from hansa.workers.runner import Course


@dataclass(frozen=True)
class States:
    """The states of all sites here, and who the sites are.

    Attributes:
        directory: where they are kept; readable by its owner alone.
        signer: a site's identity.
        scope: as of :class:`~hansa.core.ports.SecureLine`.
    """

    directory: Path
    signer: Callable[[str], Signer]
    scope: str = ""

    def folder(self, course: str) -> Path:
        """Return a course's folder; it is made if need be."""
        folder = self.directory / course
        for path in (self.directory, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def read(self, course: str, name: str) -> bytes | None:
        """Return what is in a file, or None if there is none."""
        path = self.directory / course / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"The state of a secret sum in {path} can't be read: {error}.") from error

    def write(self, course: str, name: str, data: bytes, before: bytes | None) -> None:
        """Make ``data`` durable in place of ``before``, as it was read; None if there was nothing."""
        folder = self.folder(course)
        with (folder / name).with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read(course, name) != before:
                raise PrivacyError("Another session has begun at this site meanwhile.", job=course)
            storage.write_atomic(folder / name, data)


def weighed(course: Course) -> Mapping[str, bool]:
    """Return which parts of a course's updates are multiplied by their weight."""
    return course.pieces()[0].weighed
