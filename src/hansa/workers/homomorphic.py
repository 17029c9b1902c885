# SPDX-License-Identifier: Apache-2.0
"""A site's side of homomorphic encryption: the messages of a session, and updates that leave encrypted.

A site keeps, for each course, the key that it was invited to encrypt with, and where it is the key site also the secret
key and what was opened of the sum. Any process of a site may go on where another stopped: a deployed site's agent
answers the messages, and its worker, which knows no identity, encrypts the update.

| case | result |
|---|---|
| a session whose terms are not the job's | PrivacyError, nothing is sent |
| a plan of a round for which this site has no key | PrivacyError: an update never leaves readable |
| an update or a metric outside its range | PrivacyError that names it |
| killed at any instant | the same messages again; the update encrypted once more, or as it was |
| an update with more ciphertexts than memory holds | they lie in a file without a name, and go with it |
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from hansa.core import storage
from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.lazy import Array
from hansa.core.ports import Phase
from hansa.core.tree import Layout, Spec
from hansa.core.values import Task, Update
from hansa.errors import PrivacyError, StorageError
from hansa.homomorphic import agreement, ckks
from hansa.homomorphic import site as sides
from hansa.homomorphic.protocol import Finish, Invitation, Part, Terms, check_offer, pack, unpack
from hansa.privacy.plan import Terms as PrivateTerms
from hansa.secagg.agreement import number_of
from hansa.secagg.protocol import Signer, pack_state, unpack_state
from hansa.secagg.ring import summands
from hansa.workflows.homomorphic import CIPHERTEXTS, SEALED
from hansa.workflows.secure import bounds_of

M = TypeVar("M", bound=msgspec.Struct)


class Sessions:
    """The sessions of the sites that this machine runs.

    Args:
        directory: where states are kept; readable by its owner alone.
        signer: a site's identity.
        scope: as of :class:`~hansa.core.ports.SecureLine`.
    """

    def __init__(self, directory: Path, signer: Callable[[str], Signer], scope: str = "") -> None:
        self._directory = directory
        self._signer = signer
        self._scope = scope

    def exchange(
        self,
        course: str,
        section: HomomorphicEncryptionSection,
        private: PrivateTerms | None,
        weighed: Mapping[str, bool],
        site: str,
        phase: Phase,
        letter: bytes,
    ) -> bytes:
        """Answer one message of the server.

        Raises:
            HansaError: what the protocol refuses.
        """

        def check(terms: Terms) -> None:
            bounds = bounds_of(section, private, len(terms.sites))
            agreement.check(terms, section, bounds, self._scope + course, weighed)

        match phase:
            case "offer":
                terms = unpack(letter, Terms)
                check(terms)
                return pack(self._key_site(course, site).offer(terms))
            case "accept":
                invitation = unpack(letter, Invitation)
                check(invitation.terms)
                check_offer(invitation.terms, invitation.offer, self._signer(site))
                self._store(course, f"{site}.invitation", letter)
            case "open":
                return self._key_site(course, site).open(unpack(letter, Part)).tobytes()
            case "finish":
                self._key_site(course, site).finish(unpack(letter, Finish))
        return b""

    def masked(
        self,
        course: str,
        update: Update,
        task: Task,
        section: HomomorphicEncryptionSection,
        private: PrivateTerms | None,
    ) -> Update:
        """Return ``update`` as ciphertexts, its weight and the job's metrics in them; nothing of it stands beside.

        Raises:
            PrivacyError: there is no key for it, a value is outside its range, or a metric is missing.
        """
        invitation = self._invitation(course, update.site)
        if invitation is None or invitation.terms.round != number_of(update.round, task):
            raise PrivacyError(
                f"The job has its updates encrypted, and this site has no key to {task} in round {update.round}. "
                "Nothing is sent.",
                site=update.site,
                round=update.round,
            )
        metrics = {**_metrics_of(update, task, section), agreement.COUNT: 1.0}
        words = self._file(course, invitation.terms.num_words)
        place = 0
        for ciphertext in sides.sealed(invitation, summands(update.parts, update.weight, metrics), update.site):
            words[place : place + ckks.WORDS] = ciphertext
            place += ckks.WORDS
        return replace(update, parts={SEALED: {CIPHERTEXTS: words}}, weight=1.0, sums={}, logged={})

    def layout(self, course: str, site: str) -> Mapping[str, Layout] | None:
        """Return the form of a site's encrypted update in its last session, or None if it had none."""
        invitation = self._invitation(course, site)
        return None if invitation is None else {SEALED: {CIPHERTEXTS: Spec("uint64", (invitation.terms.num_words,))}}

    def _invitation(self, course: str, site: str) -> Invitation | None:
        letter = self._read(course, f"{site}.invitation")
        return None if letter is None else unpack(letter, Invitation)

    def _key_site(self, course: str, site: str) -> sides.KeySite:
        def held(name: str, kind: type[M]) -> M | None:
            data = self._read(course, name)
            return None if data is None else unpack_state(data, kind)

        def store(name: str) -> Callable[[msgspec.Struct], None]:
            return lambda value: self._store(course, name, pack_state(value))

        key, opened = f"{site}.key", f"{site}.opened"
        kept = sides.Kept(held(key, sides.Key), held(opened, sides.Opened), store(key), store(opened))
        return sides.KeySite(site, self._signer(site), kept)

    def _file(self, course: str, size: int) -> Array:
        """Return ``size`` uint64 in a file without a name."""
        try:
            with tempfile.TemporaryFile(dir=self._folder(course)) as file:
                os.posix_fallocate(file.fileno(), 0, size * 8)
                return np.memmap(file, np.uint64, "r+", shape=(size,))
        except OSError as error:
            raise storage.full(self._folder(course), error) from error

    def _folder(self, course: str) -> Path:
        folder = self._directory / course
        for path in (self._directory, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def _store(self, course: str, name: str, data: bytes) -> None:
        storage.write_atomic(self._folder(course) / name, data)

    def _read(self, course: str, name: str) -> bytes | None:
        path = self._directory / course / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"The state of homomorphic encryption in {path} can't be read: {error}.") from error


def _metrics_of(update: Update, task: Task, section: HomomorphicEncryptionSection) -> dict[str, float]:
    """Return the sums of metrics that a job has added up in secret.

    Raises:
        PrivacyError: the job names one that the update does not have.
    """
    missing = sorted(section.metrics.keys() - update.sums.keys())
    if missing and update.sums:  # a private job's training has none: zeros stand for them
        raise PrivacyError(
            f"The job's sums are to have the metric {missing[0]!r}, and to {task} gives only: "
            f"{', '.join(sorted(update.sums)) or 'nothing'}.",
            site=update.site,
            round=update.round,
        )
    return {name: update.sums.get(name, 0.0) for name in section.metrics}
