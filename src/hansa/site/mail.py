# SPDX-License-Identifier: Apache-2.0
"""Messages between sites, at one site: opened for the worker that trains, and sealed when another's turn has come.

    jobs/ID/mail/key       this site's key for the round, and who made what it was sent; readable by its owner
    jobs/ID/mail/*.hansa   a sealed message on its way in
    jobs/ID/work/mail/     contents, as the worker reads and writes them: what came, and this site's own

The agent seals and opens; the worker has no key and sees contents only. A message is made by training a round, and
goes only to who the signed job lets have it.

| case | result |
|---|---|
| a message that was altered, replayed, redirected, or sent for something else | refused (`hansa.pki.sealed`) |
| a message from, or for, a site that the signed job or the roster does not have | PolicyError |
| the server asks for the message itself | only after a quorum of turns; below, it would learn single sites' models |
| asked to post a round that this site has not trained | PolicyError |
| another round | the key of the one before is written over: its messages can't be opened any more |
| killed at any instant | what came is opened again, with the same key; what is this site's own is durable |
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hansa.core import storage, wire
from hansa.core.config import Job
from hansa.core.ports import SERVER, topic
from hansa.core.values import Plan, Update
from hansa.errors import PolicyError, StorageError
from hansa.pki import sealed
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.pki.sealed import Place
from hansa.transport.messages import Posting
from hansa.workers.memory import Mailboxes
from hansa.workflows.scatter_gather import sample, wanted


class _Kept(msgspec.Struct, frozen=True):
    """What this site keeps of a round.

    Attributes:
        place: the round.
        private: the key of this site's address.
        trail: who made what this site trains from, in order; None before it was opened.
    """

    place: Place
    private: bytes
    trail: tuple[str, ...] | None = None


class Mail:
    """One site's messages of one job.

    Args:
        directory: the job's folder.
        site: this site's name.
        kit: who it is, and whom it trusts.
        digest: of the signed job.
        job: the signed job.
    """

    def __init__(self, directory: Path, site: str, kit: Kit, digest: str, job: Job) -> None:
        self._directory = directory / "mail"
        self._file = self._directory / "key"
        self._boxes = Mailboxes(directory / "work" / "mail")
        self._site, self._digest, self._job = site, digest, job
        self._sites = sorted(job.cohort.sites or ())  # policy has seen to it that a job with messages names them
        self._identities = Identities(kit)

    def address(self, course: str, round: int) -> bytes:
        """Return where messages for a round go.

        Raises:
            StorageError: the key can't be kept.
        """
        place = Place(self._digest, course, round)
        return sealed.address(self._at(place).private, place, self._site, self._identities)

    def coming(self, plan: Plan) -> Path:
        """Return where the sealed message of a plan is to be fetched to.

        Raises:
            PolicyError: it is of no site that may have sent one.
        """
        assert plan.sealed is not None, "the plan was checked"
        self._check_peer(_sender(plan))
        self._at(Place(self._digest, plan.job, plan.round))
        return self._directory / f"{plan.sealed}.hansa"

    def open(self, plan: Plan) -> None:
        """Put the message that a plan trains from into the worker's mailbox; of a plan without one, note that.

        Raises:
            AccessError, WireError: it is not what it should be.
            PolicyError: its trail is not one of this job's.
            StorageError: the disk is full.
        """
        place = Place(self._digest, plan.job, plan.round)
        kept = self._at(place)
        trail: tuple[str, ...] = ()
        if plan.inbox is not None:
            sender, out = _sender(plan), self._boxes.path(self._site, plan.inbox)
            trail = sealed.unseal(self.coming(plan), out, kept.private, place, sender, self._site, self._identities)
            if trail[-1] != sender or self._site in trail or len(set(trail)) < len(trail):
                raise PolicyError(f"The message from {sender!r} was made by {', '.join(trail)[:200]}: not in turns.")
        self._keep(msgspec.structs.replace(kept, trail=trail))

    def made(self, plan: Plan) -> None:
        """Make durable what the worker has left for this site's peers, and let go of what it was made from.

        Raises:
            StorageError: it is not there, or the disk fails.
        """
        assert plan.outbox is not None, "the plan was checked"
        path = self._boxes.path(self._site, plan.outbox)
        try:
            storage.sync([path, path.parent])
            if plan.inbox is not None:
                self._boxes.path(self._site, plan.inbox).unlink(missing_ok=True)
            for sealed_file in self._directory.glob("*.*"):
                sealed_file.unlink(missing_ok=True)
        except OSError as error:
            raise storage.full(path, error) from error

    def post(self, course: str, round: int, posting: Posting, out: Path) -> None:
        """Write this site's message of a round to ``out``: sealed for a site, as an update for the server.

        Raises:
            PolicyError: there is none, or who asks may not have it.
            AccessError, WireError: the address is not the recipient's.
            StorageError: the disk is full.
        """
        place = Place(self._digest, course, round)
        kept = self._read()
        if kept is None or kept.place != place or kept.trail is None:
            raise PolicyError(f"This site has no message of round {round} of {course!r}.")
        box, trail = topic(course, self._site), (*kept.trail, self._site)
        parts = self._boxes.take(self._site, box, round)
        if posting.recipient == SERVER:
            self._check_turns(round, trail)
            wire.spool(Update(self._site, round, 0, parts, 1.0, {}), out)
            return
        self._check_peer(posting.recipient)
        to = sealed.read_address(posting.address, place, posting.recipient, self._identities)
        sealed.seal(self._boxes.path(self._site, box), out, to, self._site, trail, self._identities)

    def _check_peer(self, name: str) -> None:
        if name == self._site or name not in self._sites:
            raise PolicyError(f"{name[:100]!r} is no peer of this site in the signed job.")

    def _check_turns(self, round: int, trail: tuple[str, ...]) -> None:
        """Refuse the server a model that too few sites have made: the signed job says how few that is."""
        cohort = self._job.cohort
        needed = wanted(cohort.quorum, len(sample(self._sites, cohort.sample, self._job.seed, round)))
        if len(trail) < needed:
            raise PolicyError(
                f"The server asks for the model after {len(trail)} turns; the signed job's quorum is {needed}. It was "
                "not sent."
            )

    def _at(self, place: Place) -> _Kept:
        """Return what is kept of a round; the first time it is asked for, a fresh key."""
        kept = self._read()
        if kept is None or kept.place != place:
            kept = _Kept(place, sealed.new_key())
            self._keep(kept)
        return kept

    def _read(self) -> _Kept | None:
        try:
            return msgspec.msgpack.decode(self._file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"The key of messages in {self._file} can't be read: {error}.") from error

    def _keep(self, kept: _Kept) -> None:
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage.full(self._directory, error) from error
        storage.write_atomic(self._file, msgspec.msgpack.encode(kept))


def _sender(plan: Plan) -> str:
    return (plan.inbox or "").removeprefix(topic(plan.job, ""))
