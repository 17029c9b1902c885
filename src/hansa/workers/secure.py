# SPDX-License-Identifier: Apache-2.0
"""A site's side of secure aggregation: the messages of a session, and updates that leave masked.

State is a file for each course and site, so any process of a site may go on where another stopped: a deployed site's
agent answers the messages, and its worker, which knows no identity, masks the update.

| case | result |
|---|---|
| a session whose terms are not the job's | PrivacyError, nothing is sent |
| a plan of a round for which no session was set up | PrivacyError: an update never leaves unmasked |
| an update or a metric outside its range | PrivacyError that names it |
| killed at any instant | the same messages again, or a new attempt with other keys |
| another process of the site changed the state meanwhile | PrivacyError; what it wrote stays |
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from hansa.core import storage
from hansa.core import tree as trees
from hansa.core.config import SecureAggregationSection
from hansa.core.ports import Phase
from hansa.core.tree import Layout, Spec
from hansa.core.values import Task, Update
from hansa.errors import AccessError, HansaError, PrivacyError
from hansa.privacy.draws import Secret
from hansa.privacy.plan import Terms
from hansa.privacy.protect import share_of_noise
from hansa.secagg import agreement, protocol
from hansa.secagg.local import LocalSigner
from hansa.secagg.protocol import Signer
from hansa.secagg.ranges import values_for
from hansa.secagg.site import Site
from hansa.workflows.secure import MASKED, VECTOR, bounds_of, honest_of

_LOG = logging.getLogger("hansa.secagg")


class Kept(msgspec.Struct, frozen=True):
    """What a site has in its file: the session's terms, and its state."""

    terms: bytes
    state: bytes | None


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
        section: SecureAggregationSection,
        private: Terms | None,
        weighed: Mapping[str, bool],
        site: str,
        phase: Phase,
        letter: bytes,
    ) -> bytes:
        """Answer one message of the server.

        Raises:
            HansaError: what the protocol refuses.
        """
        if phase == "advertise":
            proposed = protocol.unpack(letter, protocol.Terms)
            agreement.check(
                proposed,
                section,
                bounds_of(section, private, len(proposed.sites)),
                self._scope + course,
                weighed,
            )
            return self._open(course, site, letter).advertise()
        session = self._open(course, site)
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
                if self.terms(course, site) == protocol.unpack(letter, protocol.Terms):  # or it is over already
                    session.finish()
        return b""

    def masked(
        self, course: str, update: Update, task: Task, section: SecureAggregationSection, private: Terms | None
    ) -> Update:
        """Return ``update`` as one masked vector, its weight and the job's metrics in it; nothing of it stands beside.

        Where the job's noise is distributed this site's share of it is added before.

        Raises:
            PrivacyError: no session was set up for it, a value is outside its range, or none of the metrics is named.
        """
        terms = self.terms(course, update.site)
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
            secret = Secret.kept(self._directory / course / f"{update.site}.noise")
            parts = share_of_noise(parts, private, honest, secret, terms.digest().hex())
        summed = values_for(terms.encoding, parts, update.weight, update.sums)
        vector = self._open(course, update.site).masked(summed)
        return replace(update, parts={MASKED: {VECTOR: trees.tensor(vector)}}, weight=1.0, sums={}, logged={})

    def layout(self, course: str, site: str) -> Mapping[str, Layout] | None:
        """Return the form of a site's masked update in its last session, or None if it had none."""
        terms = self.terms(course, site)
        return None if terms is None else {MASKED: {VECTOR: Spec(terms.encoding.dtype.name, (terms.encoding.size,))}}

    def _open(self, course: str, site: str, proposed: bytes | None = None) -> Site:
        path = self._directory / course / f"{site}.state"
        held = _read(path)
        if proposed is None and held is None:
            raise PrivacyError("No session of secure aggregation was set up here.", site=site, job=course)
        terms = proposed if proposed is not None else held.terms if held is not None else b""
        state = held.state if held is not None else None

        def store(new: bytes) -> None:
            nonlocal held
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if _read(path) != held:
                    raise PrivacyError("Another session has begun at this site meanwhile.", site=site, job=course)
                kept = Kept(terms, new)
                storage.write_atomic(path, msgspec.msgpack.encode(kept))
                held = kept

        return Site(protocol.unpack(terms, protocol.Terms), site, self._signer(site), store, state)

    def terms(self, course: str, site: str) -> protocol.Terms | None:
        """Return the terms of a site's last session, or None if it had none."""
        held = _read(self._directory / course / f"{site}.state")
        return None if held is None else protocol.unpack(held.terms, protocol.Terms)


def _read(path: Path) -> Kept | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise HansaError(f"The state of secure aggregation in {path} can't be read: {error}.") from error


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
