# SPDX-License-Identifier: Apache-2.0
"""A site's side of homomorphic encryption: the messages of a session, and updates that leave masked and encrypted.

A site keeps, for each course, what it joined last, the key of its mask in it, and where it is the key site also the
secret keys and what was opened of the sum (:mod:`.states`).

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
from typing import TypeVar

import msgspec
import numpy as np

from hansa.core import storage
from hansa.core.config import HomomorphicEncryptionSection
from hansa.core.lazy import Array
from hansa.core.ports import Phase
from hansa.core.tree import Layout, Spec
from hansa.core.values import Task, Update
from hansa.errors import PrivacyError
from hansa.homomorphic import agreement, ckks
from hansa.homomorphic import site as sides
from hansa.homomorphic.protocol import Finish, Invitation, Part, Terms, pack, unpack
from hansa.secagg.agreement import number_of
from hansa.secagg.protocol import pack_state, unpack_state
from hansa.secagg.ring import summands
from hansa.workers.runner import Course
from hansa.workers.states import States, weighed
from hansa.workflows.homomorphic import CIPHERTEXTS, SEALED
from hansa.workflows.secure import bounds_of

M = TypeVar("M", bound=msgspec.Struct)


class Sessions(States):
    """The sessions of the sites that this machine runs."""

    def exchange(self, course: Course, site: str, phase: Phase, letter: bytes) -> bytes:
        """Answer one message of the server.

        Raises:
            HansaError: what the protocol refuses.
        """

        def check(terms: Terms) -> None:
            section = _section_of(course)
            bounds = bounds_of(section, course.terms, len(terms.sites))
            agreement.check(terms, section, bounds, self.scope + course.name, weighed(course))

        match phase:
            case "offer":
                terms = unpack(letter, Terms)
                check(terms)
                return pack(self._key_site(course.name, site).offer(terms))
            case "accept":
                invitation = unpack(letter, Invitation)
                check(invitation.terms)
                before, keep = self._held(course.name, f"{site}.joined", sides.Joined)
                joined = sides.joined(invitation, site, self.signer(site), before)
                if joined != before:
                    keep(joined)
                return pack(joined.acceptance)
            case "open":
                return pack(self._key_site(course.name, site).open(unpack(letter, Part)))
            case "finish":
                self._key_site(course.name, site).finish(unpack(letter, Finish))
        return b""

    def masked(self, course: Course, update: Update, task: Task) -> Update:
        """Return ``update`` as ciphertexts, its weight and the job's metrics in them; nothing of it stands beside.

        Raises:
            PrivacyError: there is no key for it, a value is outside its range, or a metric is missing.
        """
        joined, keep = self._held(course.name, f"{update.site}.joined", sides.Joined)
        if joined is None or joined.invitation.terms.round != number_of(update.round, task):
            raise PrivacyError(
                f"The job has its updates encrypted, and this site has no key to {task} in round {update.round}. "
                "Nothing is sent.",
                site=update.site,
                round=update.round,
            )
        metrics = {**_metrics_of(update, task, _section_of(course)), agreement.COUNT: 1.0}
        words = self._file(course.name, joined.invitation.terms.num_words)
        place = 0
        for ciphertext in sides.sealed(joined, summands(update.parts, update.weight, metrics), keep):
            words[place : place + ckks.WORDS] = ciphertext
            place += ckks.WORDS
        return replace(update, parts={SEALED: {CIPHERTEXTS: words}}, weight=1.0, sums={}, logged={})

    def layout(self, course: str, site: str) -> Mapping[str, Layout] | None:
        """Return the form of a site's encrypted update in its last session, or None if it had none."""
        joined, _ = self._held(course, f"{site}.joined", sides.Joined)
        if joined is None:
            return None
        return {SEALED: {CIPHERTEXTS: Spec("uint64", (joined.invitation.terms.num_words,))}}

    def _key_site(self, course: str, site: str) -> sides.KeySite:
        key, store_key = self._held(course, f"{site}.key", sides.Key)
        opened, store_opened = self._held(course, f"{site}.opened", sides.Opened)
        return sides.KeySite(site, self.signer(site), sides.Kept(key, opened, store_key, store_opened))

    def _held(self, course: str, name: str, kind: type[M]) -> tuple[M | None, Callable[[M], None]]:
        """Return what is in a file, and what writes another state in its place."""
        before = self.read(course, name)

        def keep(state: M) -> None:
            nonlocal before
            data = pack_state(state)
            self.write(course, name, data, before)
            before = data

        return None if before is None else unpack_state(before, kind), keep

    def _file(self, course: str, size: int) -> Array:
        """Return ``size`` uint64 in a file without a name."""
        try:
            with tempfile.TemporaryFile(dir=self.folder(course)) as file:
                os.posix_fallocate(file.fileno(), 0, size * 8)
                return np.memmap(file, np.uint64, "r+", shape=(size,))
        except OSError as error:
            raise storage.full(self.folder(course), error) from error


def _section_of(course: Course) -> HomomorphicEncryptionSection:
    assert isinstance(course.secure, HomomorphicEncryptionSection), "the course has its updates encrypted"
    return course.secure


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
