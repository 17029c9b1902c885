# SPDX-License-Identifier: Apache-2.0
"""A job at a site: its bundle, checked by the site's policy, and the warm worker process that trains it.

    jobs/ID/bundle.zip  bundle.manifest  files/    what the submitter signed
    jobs/ID/plans/                 the last plan received; its unchanged pieces are not fetched again
    jobs/ID/outbox/                answers on their way
    jobs/ID/mail/                  of messages between sites: this one's key, and what comes (`hansa.site.mail`)
    jobs/ID/spare/                 large files that are needed no more, for the next ones to be written over
    jobs/ID/work/                  what the site remembers from round to round, errors, ``sites.log``
    jobs/ID/attach                 where a process that the site's owner starts finds the job (recipe.attached)

| case | result |
|---|---|
| the worker dies at work (killed, out of memory, segfault) | started anew, ``ATTEMPTS`` times in all |
| it dies each time | the answer is ``lost``, with the cause |
| the recipe or the data raise a Hansa error | the answer is ``refused``, with the reason |
| they raise another error | the answer is ``lost``, with what `hansa.site.telling` lets out of it |
| a task is withdrawn while it waits its turn | the worker goes on with the one that it is at |
| a task is withdrawn while it is worked on | the worker ends; what another task needs is started anew |
| the roster changes | the signature is checked again before the next task: a revoked signer's job is refused |
| the server changes its mind about what was signed | ``refused``: a job has one bundle |
| a plan or message that is not of the digest it was announced by | ``refused`` |
| a plan above ``max_model_bytes``, a message above what its protocol needs | ``refused``; no file is fetched |
| another plan for a round that was answered; the signed job under another id | ``refused`` (`hansa.site.history`) |
| the data's privacy budget does not allow the round | ``refused``, before it is trained (`hansa.site.budget`) |
| a message of secure aggregation that the protocol refuses, or a job without it | ``refused``, with the reason |
| a message of another site that is not what it should be (`hansa.site.mail`) | ``refused``, with the reason |
| no task comes for ``IDLE_S`` | the worker ends; the next task starts another |
| another job brought the same files | they are taken from its bundle instead of fetched |
| a power cut spoils a plan, which is not synced, or its disk does | checked by its digest, and fetched again |
| a power cut spoils the bundle's manifest | as if there were none: what is whole of the bundle is not fetched again |
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

from hansa import bundle as bundles
from hansa.core import storage, wire
from hansa.core.config import Algorithm, Job
from hansa.core.ports import KeyPhase, MaskPhase, Phase
from hansa.core.values import Plan, Task, Update
from hansa.errors import (
    AccessError,
    ChecksumError,
    HansaError,
    PolicyError,
    SiteError,
    StorageError,
    WireError,
)
from hansa.homomorphic import protocol
from hansa.pki import sealed
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.runs.baselines import course_form
from hansa.runs.pieces import relays
from hansa.secagg.agreement import number_of
from hansa.secagg.protocol import MAX_BYTES, Terms, unpack
from hansa.site import budget, policy
from hansa.site.history import History
from hansa.site.mail import Mail
from hansa.site.outbox import Entry, Outbox, Outcome
from hansa.site.settings import SiteSettings
from hansa.site.telling import explained, without_foreign_frames
from hansa.site.warm import WarmWorker, whole
from hansa.transport.client import Connection
from hansa.transport.describing import Describing
from hansa.transport.messages import INLINE_BYTES, MAIL, PHASES, Assignment, Inspected, Missing, Posting
from hansa.transport.pieces import Manifest, describe
from hansa.transport.protocol import decode
from hansa.workers import homomorphic, messages, secure
from hansa.workers.messages import Absent, Answered, DefectError, Inspect, Perform, Work
from hansa.workers.runner import Course, terms_from, trace_name, trace_note
from hansa.workflows.secure import honest_of

IDLE_S = 900.0
"""How long a worker is kept warm for the next task."""

REASON_LENGTH = 4000

MOST_BYTES = 1 << 40
"""The largest plan or bundle that is fetched where the site's policy has no ``max_model_bytes``: 1 TiB."""

_POSTING_BYTES = sealed.MAX_BYTES + (1 << 10)
"""The longest message that asks to post: an address, and whose it is."""

_SPARE_BYTES = 16 << 20
_MASKED = 4
"""How many times its plan a masked update is at most: 64 bits for each half-precision element."""

_ENCRYPTED = 2 * 16
"""The same for an encrypted one: 32 bytes for each, first in a file of the worker's own."""

_LOG = logging.getLogger("hansa.site")


class JoinedJob:
    """One job at this site.

    Args:
        id: the job's id at the server.
        site: this site's name.
        kit: who the site is and whom it trusts.
        settings: what it allows.
        directory: the job's folder here.
        histories: the folder of what outlives jobs.

    Raises:
        StorageError: the folder can't be made.
    """

    def __init__(self, id: str, site: str, kit: Kit, settings: SiteSettings, directory: Path, histories: Path) -> None:
        self.id = id
        self._site = site
        self._kit = kit
        self._settings = settings
        self._directory = directory
        self._plans = directory / "plans"
        self._spares = storage.Spares(directory / storage.SPARES)
        try:
            for folder in (self._plans, directory / "work"):
                folder.mkdir(parents=True, exist_ok=True)
            self._spares.clear()
            self.outbox = Outbox(directory / "outbox", self._spares)
        except OSError as error:
            raise storage.full(directory, error) from error
        self._histories = histories
        self._history: History | None = None
        self._mail: Mail
        self._account: budget.Account | None = None
        self._examples: int | None = None
        self._charged: int | None = None
        self._bundle: str | None = None
        self._job: Job | None = None
        self._admitted_by = -1
        self._joining = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._last = time.monotonic()
        self._wanted: Counter[Path] = Counter()
        self._sound: set[Path] = set()  # plans that this process has checked
        self._described: tuple[str, Manifest] | None = None  # of the last update that was checked, till it is sent
        self._exchanging = asyncio.Lock()
        self._worker = WarmWorker(site, settings, directory, self._secagg)

    async def answer(self, connection: Connection, given: Assignment, told: Callable[[str], None]) -> Outcome:
        """Do what is assigned, its update going to the outbox; a failure of it is an outcome.

        Args:
            connection: where bundle and plan come from.
            given: what to do.
            told: called with each phase: waiting, receiving, working.

        Raises:
            HansaError: what is no fault of the job: a full disk, an error of the server.
        """
        self._wanted[self._plan_path(given)] += 1
        try:
            told("receiving")
            job = await self._join(connection, given)
            if given.kind == "train" and budget.draws_noise(job) and self._is_made(given):
                return Outcome()
            out = self.outbox.begin(given.task)
            if given.kind in PHASES:
                return await self._exchange(connection, job, given)
            if given.kind in MAIL:
                return await self._correspond(connection, job, given, out)
            plan = None if given.kind == "inspect" else await self._receive(connection, given, job)
            told("waiting")
            async with self._turn:
                self._last = time.monotonic()
                told("working")
                if plan is None:
                    found = await self._worker.ask(job, lambda ticket, n: Inspect(ticket, n, self._site))
                    assert isinstance(found, messages.Inspected), found
                    return Outcome(inspected=Inspected(found.counts, found.labels))
                return await self._perform(job, given, *plan, out, connection)
        except (PolicyError, WireError) as error:
            return refused(self._filtered(given, error.message))
        except SiteError as error:
            if isinstance(error.__cause__, DefectError):
                return lost(self._explained(given, error.message, error.__cause__.trace))
            return lost(error.message)
        except StorageError:
            await whole(self._spares.clear)
            raise
        finally:
            self._last = time.monotonic()
            self._wanted -= Counter([self._plan_path(given)])

    def finish(self, given: Assignment, outcome: Outcome) -> Entry:
        """Make an answer durable, an update together with the note that its plan is answered, and return it.

        Raises:
            StorageError: the disk is full.
        """
        if outcome != Outcome():
            return self.outbox.finish(given.task, outcome)
        assert self._history is not None, "the job was joined"
        assert self._job is not None, "likewise"
        if given.kind in MAIL:
            return self.outbox.finish(given.task, outcome)
        if given.kind == "train" and budget.draws_noise(self._job):
            self.outbox.keep(given.task)  # before the note, which after a kill says that it is whole
        return self.outbox.finish(given.task, outcome, [self._history.note(given)])

    def _is_made(self, given: Assignment) -> bool:
        """Say whether an update with noise of its own was made for this task, and the agent killed before it answered.

        It has been checked and noted, and its round is charged: it is sent as it is.
        """
        assert self._history is not None, "the job was joined"
        return self._history.has(given) and self.outbox.kept(given.task)

    async def _join(self, connection: Connection, given: Assignment) -> Job:
        """Return the job as this site runs it, its bundle checked by the roster and settings of now."""
        async with self._joining:
            path = self._directory / "bundle.zip"
            if self._bundle is None:
                manifest = await whole(partial(_read_manifest, path.with_suffix(".manifest")))
                self._bundle = None if manifest is None else manifest.digest
            if self._bundle not in (None, given.bundle):
                raise PolicyError("The server gave this job another bundle than the one that it began with.")
            if self._bundle is None or not path.exists():
                donors, most = await whole(self._other_bundles), self._settings.policy.max_model_bytes
                await self._fetch(connection, given.bundle, path, donors, most, durable=True)
                self._bundle = given.bundle
            version = self._kit.roster().version
            if self._job is None:
                self._job = await whole(partial(self._unpacked, path))
            elif version != self._admitted_by:
                await whole(partial(self._admitted, path))
            self._admitted_by = version
            return self._job

    def _other_bundles(self) -> list[tuple[Path, Manifest]]:
        found = []
        for described in self._directory.parent.glob("*/bundle.manifest"):
            if (manifest := _read_manifest(described)) is not None:
                found.append((described.with_suffix(".zip"), manifest))
        return found

    def _admitted(self, path: Path) -> bundles.Bundle:
        """Check the bundle's signature and the site's policy.

        Raises:
            PolicyError: the site does not take part, and why.
            StorageError: the bundle can't be read.
        """
        try:
            bundle = bundles.read(path, self._kit.roster())
        except StorageError:
            raise
        except HansaError as error:
            raise PolicyError(f"The job's bundle was not accepted: {error.message}") from error
        policy.decide(bundle, self._site, self._settings)
        return bundle

    def _unpacked(self, path: Path) -> Job:
        """Return an admitted bundle's job as this site runs it, its files in place."""
        bundle = self._admitted(path)
        self._history = History(self._histories, bundle, self.id)
        self._mail = Mail(self._directory, self._site, self._kit, self._history.digest, bundle.job)
        data = policy.trained_on(bundle.job)
        allowed = self._settings.privacy.budgets.get(data or "")
        if data is not None and allowed is not None:
            book = budget.ledger(self._kit.directory, data, self._kit)
            self._account = budget.Account(book, allowed, self._history.digest, self.id)
        files = self._directory / "files"
        shutil.rmtree(files, ignore_errors=True)
        try:
            files.mkdir()
            job = bundles.unpack(path, bundle, files)
        except OSError as error:
            raise storage.full(files, error) from error
        except WireError as error:
            raise PolicyError(f"The job's bundle was not accepted: {error.message}") from error
        return policy.localised(job, self._site, self._settings, self._kit.directory)

    def _secagg(self) -> Path:
        assert self._history is not None, "the job was joined"
        return self._history.secagg

    def _sessions(self, job: Job) -> secure.Sessions | homomorphic.Sessions:
        """Return this site's side of a job's secret sums: its own identity, whatever the job or the server say."""
        assert self._history is not None, "the job was joined"
        identity = Identities(self._kit)
        scope = f"{self._history.digest}/"
        if job.homomorphic_encryption is not None:
            return homomorphic.Sessions(self._history.secagg, lambda _: identity, scope)
        return secure.Sessions(self._history.secagg, lambda _: identity, scope)

    async def _exchange(self, connection: Connection, job: Job, given: Assignment) -> Outcome:
        """Answer a message of a secret sum, as the agent, for the worker has no identity."""
        section = job.secret_sums
        phases = MaskPhase if job.homomorphic_encryption is None else KeyPhase
        if section is None or given.kind not in get_args(phases):
            raise PolicyError("The server begins a secret sum of a kind that the signed job does not have.")
        most = MAX_BYTES if job.homomorphic_encryption is None else protocol.MAX_BYTES
        letter = await self._letter(connection, given, most)
        task: Task = "evaluate"
        if given.kind == "advertise":
            task = policy.check_session(unpack(letter, Terms), job, given)
        elif given.kind == "offer":
            task = policy.check_session(protocol.unpack(letter, protocol.Terms), job, given)
        elif given.kind == "accept":
            task = policy.check_session(protocol.unpack(letter, protocol.Invitation).terms, job, given)
        try:
            form = course_form(job, given.course, task, self._site)
            algorithm = Algorithm.model_validate(form.strategy)
            course = Course(given.course, (), algorithm, (), terms_from(form.terms), section)
            kind: Phase = given.kind  # type: ignore[assignment]  # one of this job's
            answering = partial(self._sessions(job).exchange, course, self._site, kind, letter)
            async with self._exchanging:
                return Outcome(letter=await whole(answering))
        except StorageError:
            raise  # tried again: the disk may have room then
        except HansaError as error:
            raise PolicyError(error.message) from error

    async def _correspond(self, connection: Connection, job: Job, given: Assignment, out: Path) -> Outcome:
        """Tell where messages to this site go, or make its own one for a peer: as the agent, which has an identity."""
        assert self._history is not None, "the job was joined"
        if not relays(job) or given.course != job.name or given.round not in policy.rounds(job, given.course):
            raise PolicyError("The server begins a message between sites that the signed job does not have.")
        try:
            if given.kind == "address":
                return Outcome(letter=await whole(partial(self._mail.address, given.course, given.round)))
            if given.round not in self._history.trained(given.course):
                raise PolicyError(f"This site has not trained round {given.round} of {given.course!r}.")
            posting = decode(Posting, await self._letter(connection, given, _POSTING_BYTES))
            await whole(partial(self._mail.post, given.course, given.round, posting, out))
            return Outcome()
        except AccessError as error:
            raise PolicyError(error.message) from error

    async def _receive(self, connection: Connection, given: Assignment, job: Job) -> tuple[Path, Plan]:
        """Return the plan's file and the plan; a large one's tensors stay in the file.

        Raises:
            PolicyError: the plan is not what it was announced as, or may not be carried out.
            StorageError: the disk is full, or has damaged the plan; the next try fetches it again.
        """
        path = await self._received(connection, given, self._settings.policy.max_model_bytes, "model")
        try:
            plan = await whole(partial(wire.open_plan, path, lazily=True), storage.num_bytes(path))
        except WireError as error:
            await self._check_disk(path, given)
            raise PolicyError(f"The server sent a plan that can't be read: {error.message}") from error
        policy.check_plan(plan, job, given, self._site)
        if plan.sealed is not None:
            coming, most = await whole(partial(self._mail.coming, plan)), self._settings.policy.max_model_bytes
            await self._fetch(connection, plan.sealed, coming, [], most, durable=False)
        return path, plan

    async def _letter(self, connection: Connection, given: Assignment, most: int) -> bytes:
        """Return a message, whose protocol bounds it: it has little to do with what this site allows of a model."""
        path = await self._received(connection, given, most, "message")
        return await whole(path.read_bytes)

    async def _received(self, connection: Connection, given: Assignment, most: int | None, what: str) -> Path:
        """Return the file of a plan or message, as the server has sent it, of so many bytes at most."""
        path = self._plan_path(given)
        if path not in self._sound or not path.exists():
            if given.inline:
                await whole(partial(self._put, path, given, most, what), len(given.inline))
            elif not await whole(partial(_is_whole, path, given)):
                connection.warm()
                await self._fetch(connection, given.plan, path, await whole(self._other_plans), most, durable=False)
            self._sound.add(path)
        return path

    def _put(self, path: Path, given: Assignment, most: int | None, what: str) -> None:
        """Write a small plan or message, which came with its assignment, if it is one as was announced."""
        if not _is_whole(path, given):
            policy.check_size(len(given.inline), most, what)
            storage.write_whole(path, given.inline, self._spares)
        _check_announced(path, given)

    async def _check_disk(self, path: Path, given: Assignment) -> None:
        """Raise StorageError if it was this disk that made a plan unreadable."""
        self._sound.discard(path)
        if not await whole(partial(_is_whole, path, given)):
            raise StorageError(f"{path} was damaged on this disk; it is fetched again.")

    def _plan_path(self, given: Assignment) -> Path:
        return self._plans / f"{given.plan}.hansa"

    async def _fetch(
        self,
        connection: Connection,
        digest: str,
        path: Path,
        donors: list[tuple[Path, Manifest]],
        most: int | None,
        *,
        durable: bool,
    ) -> None:
        """Fetch a file, and keep its manifest beside it, for what it can give to the next one."""
        limit, spares = most or MOST_BYTES, self._spares
        try:
            manifest = await connection.download(
                self.id, digest, path, donors=donors, max_bytes=limit, durable=durable, spares=spares
            )
        except ChecksumError as error:
            raise SiteError(f"The server's file is damaged: {error.message}") from error
        except WireError as error:
            raise PolicyError(f"What the server sends was not accepted: {error.message}") from error
        write = storage.write_atomic if durable else storage.write_whole
        await whole(partial(write, path.with_suffix(".manifest"), manifest.encode()))

    def _other_plans(self) -> list[tuple[Path, Manifest]]:
        found = []
        for path in self._plans.glob("*.hansa"):
            with contextlib.suppress(OSError, HansaError):  # a damaged one is of no use
                found.append((path, _read_manifest(path.with_suffix(".manifest")) or describe(path, wire.cuts(path))))
        return found

    def _forget_plans(self, last: Path) -> None:
        """Delete the plans that nobody works on any more, but the last: it has what the next one may share."""
        wanted = {path.stem for path in (last, *self._wanted)}
        self._sound = {path for path in self._sound if path.stem in wanted}
        for path in self._plans.iterdir():
            if path.name.partition(".")[0] not in wanted:
                self._spares.give(path)

    def _make_room(self, job: Job, given: Assignment, path: Path, out: Path) -> None:
        """Free what is needed no more, and see to it that there is room for an update.

        Raises:
            StorageError: there is none.
        """
        self._forget_plans(path)
        needed = _times(job) * path.stat().st_size
        if given.kind != "train" or not self._spares.take(out, needed) or out.stat().st_size < needed:
            _check_room(out, needed)

    async def _perform(
        self, job: Job, given: Assignment, path: Path, plan: Plan, out: Path, connection: Connection
    ) -> Outcome:
        assert self._history is not None, "the job was joined"
        once = given.kind == "train" and budget.draws_noise(job) and job.secret_sums is None
        self._history.check(given, once=once)
        form = course_form(job, given.course, given.kind, self._site)
        await whole(partial(self._make_room, job, given, path, out), storage.num_bytes(path))
        if plan.outbox is not None:
            try:
                await whole(partial(self._mail.open, plan))
            except AccessError as error:
                raise PolicyError(error.message) from error
        if given.kind == "train" and job.privacy is not None:
            budget.check_turn(job, self._history.trained(given.course), given.round)
            await self._charge(job, given)

        def request(ticket: int, threads: int) -> Work:
            return Perform(ticket, form, str(path), self._site, threads, str(out))

        limit = self._settings.policy.max_task_s
        try:
            async with asyncio.timeout(limit):
                answer = await self._worker.ask(job, request)
        except WireError as error:
            await self._check_disk(path, given)
            raise PolicyError(error.message) from error
        except TimeoutError:
            raise PolicyError(f"The round took longer than the {limit:g} s that this site allows.") from None
        if isinstance(answer, Absent):
            return Outcome(missing=Missing(answer.kind, _shortened(await whole(partial(self._reason, given, answer)))))
        assert isinstance(answer, Answered), answer
        if answer.spooled and path.stat().st_size > INLINE_BYTES:
            connection.warm()  # the update is checked and made durable meanwhile
        if not answer.spooled:
            empty = Update(
                self._site,
                answer.round,
                answer.version,
                {},
                answer.weight,
                answer.sums,
                answer.completed,
                answer.seconds,
            )
            await whole(partial(wire.spool, empty, out))
        if job.secret_sums is None:
            await whole(partial(self._check, out, plan, job, given.task), storage.num_bytes(out))
        else:
            layout = await whole(lambda: self._sessions(job).layout(given.course, self._site))
            await whole(lambda: policy.check_hidden(out, plan, self._site, layout))
        if given.kind == "train" and self._examples is not None and job.secret_sums is None:
            weight = (await whole(partial(wire.Spooled, out))).header.weight
            budget.check_examples(job, weight, self._examples)
        if plan.outbox is not None:
            await whole(partial(self._mail.made, plan))
        if given.kind == "train" and self._account is not None:
            if self._honest(job, given) != self._charged:
                raise PolicyError("Another session of secure aggregation has begun. The update was not sent.")
            await whole(partial(self._account.sent, job, given.task))
        return Outcome()

    def _check(self, path: Path, plan: Plan, job: Job, task: str) -> None:
        """Raise PolicyError unless an update may leave; a large one is described and synced meanwhile.

        So what is described is what was checked.

        Raises:
            StorageError: it can't be read or synced.
        """
        rules = self._settings.policy
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size <= INLINE_BYTES:
                    return policy.check_update(file, size, plan, job, self._site, rules)
                described = Describing(file, wire.cuts(path))
                with storage.syncing(path):
                    policy.check_update(described, size, plan, job, self._site, rules)
        except OSError as error:
            raise storage.full(path, error) from error
        self._described = task, described.manifest()
        return None

    def manifest(self, task: str, path: Path) -> Manifest:
        """Return the manifest of an update in its file: as it was checked if that has just been, or read anew."""
        described, self._described = self._described, None
        if described is not None and described[0] == task:
            return described[1]
        return describe(path, wire.cuts(path))

    async def _charge(self, job: Job, given: Assignment) -> None:
        """Check, once, that a job keeps its promise, and charge a round to the data's budget if there is one.

        Pieces that are not Hansa's own are as good as their signer, where the site's rules take them at all.
        """
        if self._examples is None:
            told = await self._worker.ask(job, lambda ticket, n: Inspect(ticket, n, self._site))
            assert isinstance(told, messages.Inspected), told
            examples = told.counts.get("train", 0)
            if policy.foreign(job) is None:
                await whole(partial(budget.check_promise, job, self._worker.traits))
            rules = self._settings.privacy
            if rules.epsilon is not None and rules.delta is not None:
                await whole(partial(budget.check_epsilon, job, examples, rules.epsilon, rules.delta))
            self._examples = examples
        if self._account is not None:
            self._charged = await whole(partial(self._honest, job, given))
            await whole(partial(self._account.charge, job, self._examples, given.task, given.round, self._charged))

    def _honest(self, job: Job, given: Assignment) -> int | None:
        """Return how many sites' shares a round's distributed noise is made of; None where the job has none.

        Raises:
            PolicyError: no session was set up for the round.
        """
        if job.privacy is None or job.privacy.mechanism != "distributed" or job.masks is None:
            return None
        sessions = self._sessions(job)
        assert isinstance(sessions, secure.Sessions), "a job has masks or encryption, not both"
        terms = sessions.terms(given.course, self._site)
        if terms is None or terms.round != number_of(given.round, "train"):
            raise PolicyError("No session of secure aggregation was set up for this round. Nothing is trained.")
        return honest_of(job.masks, len(terms.sites))

    def _reason(self, given: Assignment, answer: Absent) -> str:
        """Return why there is no update; of a traceback that the worker has written, what the submitter may read."""
        path = self._directory / "work" / "errors" / trace_name(given.course, self._site, given.round)
        note = trace_note(path.absolute())
        if not answer.reason.endswith(note):
            return self._filtered(given, answer.reason)
        trace = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return self._explained(given, answer.reason.removesuffix(note), trace)

    def _filtered(self, given: Assignment, reason: str) -> str:
        told = without_foreign_frames(reason, (self._directory / "files").absolute())
        if told != reason:
            _LOG.warning("%s: %s", given.task, reason)
            told += f"\nThe site's log has all of it, at task {given.task}."
        return told

    def _explained(self, given: Assignment, summary: str, trace: str) -> str:
        _LOG.warning("%s: %s\n%s", given.task, summary, trace)
        return explained(summary, trace, (self._directory / "files").absolute(), given.task)

    @property
    def warm(self) -> bool:
        """Whether the job has a worker process."""
        return self._worker.alive

    async def rest(self) -> None:
        """Give memory back if there has been no task for ``IDLE_S``: the job may have been aborted, or it is slow."""
        if not self._turn.locked() and time.monotonic() - self._last >= IDLE_S:
            async with self._turn:
                await self._worker.rest()

    async def close(self) -> None:
        """Let the worker close its program, then end it; nothing is begun any more."""
        await self._worker.close(at_once=self._turn.locked())

    def forget(self) -> None:
        """Delete everything of the job."""
        with contextlib.suppress(OSError):
            shutil.rmtree((self._directory / "attach").resolve(), ignore_errors=True)
        shutil.rmtree(self._directory, ignore_errors=True)


def refused(reason: str) -> Outcome:
    """Return the outcome of what this site does not do."""
    return Outcome(missing=Missing("refused", _shortened(reason)))


def lost(reason: str) -> Outcome:
    """Return the outcome of what this site could not do."""
    return Outcome(missing=Missing("lost", _shortened(reason)))


def _shortened(reason: str) -> str:
    """Return a reason that fits into a message: of a long traceback the end says most."""
    return reason if len(reason) <= REASON_LENGTH else f"... {reason[-REASON_LENGTH:]}"


def _times(job: Job) -> int:
    """Return how many times its plan an update of the job takes on the disk, at most."""
    if job.secret_sums is None:
        return 1
    return _MASKED if job.homomorphic_encryption is None else _ENCRYPTED


def _check_room(out: Path, num_bytes: int) -> None:
    """Raise StorageError if an update of so many bytes has no room: before a round is trained, not after."""
    held = out.stat().st_size if out.exists() else 0
    free, needed = shutil.disk_usage(out.parent).free, num_bytes - held + _SPARE_BYTES
    if free < needed:
        raise StorageError(f"An update needs up to {needed:,} bytes in {out.parent}, and {free:,} are free.")


def _read_manifest(path: Path) -> Manifest | None:
    """Return the manifest in a file; None where there is none, or a power cut has spoilt it."""
    try:
        return Manifest.decode(path.read_bytes())
    except (OSError, WireError):
        return None


def _is_whole(path: Path, given: Assignment) -> bool:
    """Say whether a plan is there as its server sent it; reads it once."""
    try:
        if given.inline:
            return path.read_bytes() == given.inline
        manifest = _read_manifest(path.with_suffix(".manifest"))
        return manifest is not None and describe(path, manifest.offsets).digest == given.plan
    except (OSError, StorageError):
        return False


def _check_announced(path: Path, given: Assignment) -> None:
    """Raise PolicyError, and leave no file, unless an inline file is that of its digest, which a site knows it by."""
    try:
        if describe(path, None if given.kind in PHASES | MAIL else wire.cuts(path)).digest == given.plan:
            return
    except WireError:  # no plan at all
        pass
    path.unlink(missing_ok=True)
    raise PolicyError("The server sent another plan than it announced.")
