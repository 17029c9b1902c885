# SPDX-License-Identifier: Apache-2.0
"""A site's side of secure aggregation: the messages of a session, and updates that leave masked.

State is a file for each course and site (:mod:`.states`).

| case | result |
|---|---|
| a session whose terms are not the job's | PrivacyError, nothing is sent |
| a plan of a round for which no session was set up | PrivacyError: an update never leaves unmasked |
| an update or a metric outside its range | PrivacyError that names it |
| killed at any instant | the same messages again, or a new attempt with other keys |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from hansa.core import tree as trees
from hansa.core.config import SecureAggregationSection
from hansa.core.ports import Phase
from hansa.core.tree import Layout, Spec
from hansa.core.values import Task, Update
from hansa.errors import AccessError, PrivacyError, StorageError
from hansa.privacy.draws import Secret
from hansa.privacy.protect import share_of_noise
from hansa.secagg import agreement, protocol
from hansa.secagg.local import LocalSigner
from hansa.secagg.ranges import values_for
from hansa.secagg.site import Site
from hansa.workers.runner import Course
from hansa.workers.states import States, weighed
from hansa.workflows.secure import MASKED, VECTOR, bounds_of, honest_of

_LOG = logging.getLogger("hansa.secagg")


class Kept(msgspec.Struct, frozen=True):
    """What a site has in its file: the session's terms, and its state."""

    terms: bytes
    state: bytes | None


class Sessions(States):
    """The sessions of the sites that this machine runs."""

    def exchange(self, course: Course, site: str, phase: Phase, letter: bytes) -> bytes:
        """Answer one message of the server.

        Raises:
            HansaError: what the protocol refuses.
        """
        if phase == "advertise":
            proposed, section = protocol.unpack(letter, protocol.Terms), _section_of(course)
            bounds = bounds_of(section, course.terms, len(proposed.sites))
            agreement.check(proposed, section, bounds, self.scope + course.name, weighed(course))
            return self._open(course.name, site, letter).advertise()
        session = self._open(course.name, site)
        match phase:
            case "share":
                return session.share(letter)
            case "receive":
                session.receive(letter)
            case "vote":
                return session.vote(letter)
            case "reveal":
                return session.reveal(letter)
            case "finish":
                if self.terms(course.name, site) == protocol.unpack(letter, protocol.Terms):  # or it is over already
                    session.finish()
        return b""

    def masked(self, course: Course, update: Update, task: Task) -> Update:
        """Return ``update`` as one masked vector, its weight and the job's metrics in it; nothing of it stands beside.

        Where the job's noise is distributed this site's share of it is added before.

        Raises:
            PrivacyError: no session was set up for it, a value is outside its range, or none of the metrics is named.
        """
        section, private = _section_of(course), course.terms
        terms = self.terms(course.name, update.site)
        if terms is None or terms.round != agreement.number_of(update.round, task):
            raise PrivacyError(
                f"The job has its updates masked, and no session was set up to {task} in round {update.round}. Nothing "
                "is sent.",
                site=update.site,
                round=update.round,
            )
        named, sums = section.metrics.keys(), update.sums.keys()
        if named and sums and not named & sums and not section.by_default:
            raise PrivacyError(
                f"secure_aggregation.metrics names {', '.join(sorted(named))}, and to {task} gives only: "
                f"{', '.join(sorted(sums))}.",
                site=update.site,
                round=update.round,
            )
        if sums - named:
            left_out = ", ".join(sorted(sums - named))
            _LOG.info("%s: not summed, as secure_aggregation.metrics does not name them: %s", update.site, left_out)
        parts = update.parts
        if private is not None and private.section.mechanism == "distributed" and task == "train":
            honest = honest_of(section, len(terms.sites))
            secret = Secret.kept(self.folder(course.name) / f"{update.site}.noise")
            parts = share_of_noise(parts, private, honest, secret, terms.digest().hex())
        summed = values_for(terms.encoding, parts, update.weight, update.sums)
        vector = self._open(course.name, update.site).masked(summed)
        return replace(update, parts={MASKED: {VECTOR: trees.tensor(vector)}}, weight=1.0, sums={}, logged={})

    def layout(self, course: str, site: str) -> Mapping[str, Layout] | None:
        """Return the form of a site's masked update in its last session, or None if it had none."""
        terms = self.terms(course, site)
        return None if terms is None else {MASKED: {VECTOR: Spec(terms.encoding.dtype.name, (terms.encoding.size,))}}

    def _open(self, course: str, site: str, proposed: bytes | None = None) -> Site:
        name = f"{site}.state"
        before = self.read(course, name)
        held = None if before is None else _unpacked(before, site)
        if proposed is None and held is None:
            raise PrivacyError("No session of secure aggregation was set up here.", site=site, job=course)
        terms = proposed if proposed is not None else held.terms if held is not None else b""

        def store(new: bytes) -> None:
            nonlocal before
            data = msgspec.msgpack.encode(Kept(terms, new))
            self.write(course, name, data, before)
            before = data

        state = None if held is None else held.state
        return Site(protocol.unpack(terms, protocol.Terms), site, self.signer(site), store, state)

    def terms(self, course: str, site: str) -> protocol.Terms | None:
        """Return the terms of a site's last session, or None if it had none."""
        held = self.read(course, f"{site}.state")
        return None if held is None else protocol.unpack(_unpacked(held, site).terms, protocol.Terms)


def _section_of(course: Course) -> SecureAggregationSection:
    assert isinstance(course.secure, SecureAggregationSection), "the course has its updates masked"
    return course.secure


def _unpacked(data: bytes, site: str) -> Kept:
    try:
        return msgspec.msgpack.decode(data, type=Kept)
    except msgspec.MsgspecError as error:
        raise StorageError(f"The state of secure aggregation can't be read: {error}.", site=site) from error


class Stored:
    """No identity (a :class:`~hansa.secagg.protocol.Signer`), for a process that only masks: the agent has checked the
    roll before it was stored, and nothing else is to be checked or signed here."""

    def credential(self) -> bytes:
        """Refuse."""
        raise self._refusal()

    def sign(self, data: bytes) -> bytes:
        """Refuse."""
        raise self._refusal()

    def check(self, site: str, credential: bytes, data: bytes, signature: bytes) -> None:
        """Refuse."""
        raise self._refusal()

    @staticmethod
    def _refusal() -> AccessError:
        return AccessError("This process has no identity: it masks updates, and answers no message.")


def simulated(directory: Path, site: str) -> LocalSigner:
    """Return the identity of one site of a simulation; all are made from one secret in its folder."""
    secret = Secret.kept(directory / "identities.key")
    return LocalSigner(site, lambda name: secret.derive("identity", name))
