# SPDX-License-Identifier: Apache-2.0
"""What a server remembers: jobs, what sites were asked and answered, logs, and the audit log.

SQLite (write-ahead log, synchronous = FULL) by default, or PostgreSQL. Usable from any thread.

    job    queued ──> running ──> finished          task   open ──> done | missing | late
             ^  │        └──────> failed, aborted          late ──> overdue: the update came after all
             │  └──────> aborted       │
             └─────────────────────────┘                   any ──> replaced, by a task with another plan

Guarantees, each with its test:

- A method that changes something returns after the change is durable, and a killed process leaves all or nothing of it.
- The first answer to a task stands, whatever comes after it, restarts included.
- A task asked for again with the same plan is the same task, with its answer.
- One server writes to a database: a second one is refused, and one that lost the database to another can't write.
- A job submitted twice with the same key is one job.

    case                                      what happens
    ----------------------------------------  -------------------------------------------------------------
    a schema newer than this release          VersionError; nothing is changed
    a schema older than this release          migrated, in one transaction
    a damaged, read-only or full database     StorageError; what was there stays
    an answer to an unknown task, or by       False; nothing is changed
    another site than the one that was asked
    an update after the task was answered     False
    a late update, the first or the second    True, then False
    a failed job queued again                 sites that gave no update are asked again; updates are kept
    the same, while a round is evaluated      only the evaluation is asked for again: the round's model stands
    another attempt of secure aggregation     what was answered under the masks of the last one is asked for again
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Row, event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from hansa.core.ports import MailPhase, Phase
from hansa.errors import AccessError, JobError, MissingExtraError, StorageError, VersionError
from hansa.runs.run import now
from hansa.server import schema
from hansa.server.schema import audits, events, jobs, leavers, numbers, owner, sites, tasks

JobState = Literal["queued", "running", "finished", "failed", "aborted"]
TaskState = Literal["open", "done", "missing", "late", "overdue", "replaced"]
TaskKind = Literal["inspect", "train", "evaluate"] | Phase | MailPhase

_MOVES: dict[JobState, tuple[JobState, ...]] = {
    "queued": ("failed", "aborted"),
    "running": ("queued",),
    "finished": ("running",),
    "failed": ("running",),
    "aborted": ("queued", "running"),
}
"""State -> those it is reached from."""

LATE_ROUNDS = 8
"""A late update is waited for so many rounds; what has to be kept for it is one plan a round."""

# Statements that every round needs: to put one together takes longer than to carry it out.
_JOB = sa.select(jobs).where(jobs.c.id == sa.bindparam("id"))
_NAMED = sa.select(tasks).where(tasks.c.task.in_(sa.bindparam("names", expanding=True)))
_TASKS = (
    sa.select(tasks).where(tasks.c.job == sa.bindparam("job"), tasks.c.state != "replaced").order_by(tasks.c.number)
)
_TASKS_OF_KIND = _TASKS.where(tasks.c.kind == sa.bindparam("kind"))
_ASKED = _TASKS_OF_KIND.where(tasks.c.course == sa.bindparam("course"), tasks.c.round == sa.bindparam("round"))
_SITES: sa.BindParameter[str] = sa.bindparam("sites", expanding=True)
_AGENDA = (
    sa.select(tasks)
    .join(jobs, jobs.c.id == tasks.c.job)
    .where(tasks.c.site.in_(_SITES), tasks.c.state.in_(("open", "late")), jobs.c.state == "running")
    .order_by(tasks.c.number)
)
_UNFINISHED = sa.select(jobs).where(jobs.c.state != "finished").order_by(jobs.c.number)
_LEFT = sa.select(leavers.c.job, leavers.c.site).where(leavers.c.site.in_(_SITES))
_LEAVERS = sa.select(leavers.c.site, leavers.c.answer).where(leavers.c.job == sa.bindparam("job"))
_ANSWERS: dict[str, sa.Update] = {
    state: tasks.update()
    .where(tasks.c.task == sa.bindparam("asked"), tasks.c.site == sa.bindparam("who"), tasks.c.state.in_(before))
    .values(state=after, answer=sa.bindparam("said"), update=sa.bindparam("key"))
    for state, before, after in (
        ("done", ("open", "late"), sa.case((tasks.c.state == "late", "overdue"), else_="done")),
        ("missing", ("open", "late"), "missing"),
        ("late", ("open",), "late"),
    )
}
_OVERDUE = sa.select(
    sa.exists().where(
        tasks.c.job == sa.bindparam("job"), tasks.c.course == sa.bindparam("course"), tasks.c.state == "overdue"
    )
)
_FORGET = (
    tasks.delete()
    .where(
        tasks.c.job == sa.bindparam("job"),
        tasks.c.course == sa.bindparam("course"),
        tasks.c.kind != "inspect",
        sa.or_(
            (tasks.c.round < sa.bindparam("before")) & tasks.c.state.not_in(("late", "overdue")),
            (tasks.c.round < sa.bindparam("long_before")) & (tasks.c.state == "late"),
            (tasks.c.claimed < sa.bindparam("before")) & (tasks.c.state == "overdue"),
        ),
    )
    .returning(tasks.c.update)
)
_PROGRESSED = (
    jobs.update().where(jobs.c.id == sa.bindparam("job")).values(round=sa.bindparam("to"), size=sa.bindparam("bytes"))
)
_EVENT = events.insert().returning(events.c.number)
_EVENTS = (
    sa.select(events)
    .where(events.c.job == sa.bindparam("job"), events.c.number > sa.bindparam("after"))
    .order_by(events.c.number)
    .limit(sa.bindparam("limit"))
)
_OWNER = sa.select(owner.c.token).with_for_update(read=True)

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 10_000
_ADVISORY_LOCK = 0x68616E7361  # "hansa"
_LONGEST = 4096
_LOCK_ATTEMPTS = 10
_LOCK_PAUSE_S = 0.2

# So that PostgreSQL soon notices a server whose machine is gone, and frees its lock (no effect on local sockets).
_KEEPALIVE = sa.text("SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 4")


@dataclass(frozen=True)
class JobRow:
    """A job.

    Attributes:
        id: its name at the server.
        name: the job's own name.
        submitter: who submitted it.
        bundle: the manifest of its bundle.
        rounds: how many it has.
        round: the last that is finished.
        size: bytes it holds at the server.
        state: where it stands.
        error: why it failed.
        kind: the name of that error's class in :mod:`hansa.errors`, or of a defect's.
        created, started, ended: ISO 8601, UTC; empty where it has not happened.
    """

    id: str
    name: str
    submitter: str
    key: str
    bundle: str
    rounds: int
    round: int
    size: int
    state: JobState
    error: str
    kind: str
    created: str
    started: str
    ended: str


@dataclass(frozen=True)
class TaskRow:
    """One thing that one site was asked for.

    Attributes:
        task: its name.
        job: the job's id.
        course: the job's name, or that of one of its baselines.
        round: the round's number; 0 for ``inspect``.
        kind: inspect, train or evaluate, or a phase of secure aggregation.
        site: who was asked.
        plan: the manifest of the plan, or of the message; empty for ``inspect``.
        state: where it stands.
        answer: what the site said beside its update, as JSON; to a message of secure aggregation, its bytes.
        update: under which key the update is kept; empty where there is none.
        claimed: the round that uses this overdue update, if one does.
        opened_s: when it was first asked for, in seconds since the epoch.
    """

    task: str
    job: str
    course: str
    round: int
    kind: TaskKind
    site: str
    plan: str
    state: TaskState
    answer: bytes
    update: str
    claimed: int | None
    opened_s: float


@dataclass(frozen=True)
class Said:
    """A site's answer to a task.

    Attributes:
        task: the task's name.
        site: who answers.
        state: ``done``; ``missing``: there will be no update; ``late``: the deadline is over, and an update that comes
            after all makes it ``overdue``.
        answer: what the site said, as JSON.
        update: the key of its update, which is durable.
    """

    task: str
    site: str
    state: Literal["done", "missing", "late"]
    answer: bytes = b""
    update: str = ""


@dataclass(frozen=True)
class SiteRow:
    """A site: the release it ran and the time when it was last heard from."""

    site: str
    release: str
    seen: str


@dataclass(frozen=True)
class EventRow:
    """A line of a job's log."""

    number: int
    job: str
    time: str
    kind: str
    text: str


@dataclass(frozen=True)
class AuditRow:
    """Who (``actor``, in which ``role``) did what (``action``) to whom or what (``subject``), and the outcome."""

    number: int
    time: str
    actor: str
    role: str
    action: str
    subject: str
    outcome: str
    detail: str


class Store:
    """A server's database; made by :meth:`open`, or by :meth:`view` to look only."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._writer = engine.execution_options(immediate=True)
        self._name = name
        sqlite = engine.dialect.name == "sqlite"
        self._file = Path(str(engine.url.database)) if sqlite else None
        self._token = ""
        self._held = contextlib.ExitStack()
        # A server is one process, so a lock makes what is read in a write transaction hold until it ends.
        self._writing = threading.Lock()

    @classmethod
    def open(cls, url: str | None, directory: Path) -> Store:
        """Open the database as the one server that writes to it, and bring its tables up to date.

        Args:
            url: ``sqlite:///PATH``, relative to ``directory``, or ``postgresql://...``; None is ``sqlite:///hansa.db``.
            directory: the server's folder, which it locks.

        Raises:
            StorageError: another server is at work, or the database can't be reached, read or written.
            VersionError: a newer release made its tables.
            MissingExtraError: the driver of PostgreSQL is not installed.
            JobError: the URL is not one of a database.
        """
        store = cls._connect(url, directory)
        try:
            store._held.enter_context(_locked(directory / "server.lock"))
            store._own()
        except BaseException:  # let go of what was begun; raised again
            store.close()
            raise
        return store

    @classmethod
    def view(cls, url: str | None, directory: Path) -> Store:
        """Open a database to read it, whether or not a server is at work; nothing is changed.

        Raises:
            StorageError: there is none, or it can't be read.
            VersionError: another release made its tables.
        """
        store = cls._connect(url, directory)
        try:
            if store._file is not None and not store._file.is_file():
                raise StorageError(f"There is no server's database at {store._name}.")
            with store._reported(), store._engine.connect() as connection:
                revision = _revision(connection)
            if revision is None:
                raise StorageError(f"There is no server's database at {store._name}.")
            if revision != schema.REVISION:
                raise VersionError(f"The database {store._name} was made by another release (schema {revision}).")
        except BaseException:  # let go of what was begun; raised again
            store.close()
            raise
        return store

    @classmethod
    def _connect(cls, url: str | None, directory: Path) -> Store:
        try:
            target = sa.make_url(url or "sqlite:///hansa.db")
            if target.drivername in ("postgresql", "postgres"):
                target = target.set(drivername="postgresql+psycopg")
            if target.get_backend_name() not in ("sqlite", "postgresql") or not target.database:
                raise JobError(
                    f"The database {target.render_as_string()} is neither sqlite:///PATH nor postgresql://..."
                )
            if target.get_backend_name() == "sqlite":
                target = target.set(database=str(directory.absolute() / target.database))
                engine = sa.create_engine(target, pool_size=8)
            else:
                engine = sa.create_engine(
                    target,
                    pool_size=8,
                    pool_pre_ping=True,
                    connect_args={"connect_timeout": 10, "application_name": "hansa server"},
                )
        except (ArgumentError, NoSuchModuleError) as error:
            raise JobError(f"The database is not given as a URL such as postgresql://user@host/name: {error}") from None
        except ModuleNotFoundError:
            raise MissingExtraError("PostgreSQL needs its driver: pip install 'hansa[postgres]'.") from None
        event.listen(engine, "connect", _prepare_sqlite if engine.dialect.name == "sqlite" else _prepare_postgres)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "begin", _begin_sqlite)
        return cls(engine, target.render_as_string(hide_password=True))

    def _own(self) -> None:
        """Take the lock of the database, bring the tables up to date, and become their owner."""
        with self._reported():
            if self._file is not None:
                self._held.enter_context(_locked(self._file.with_name(f"{self._file.name}.lock")))
                with self._engine.connect() as connection:
                    verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                    if verdict != "ok":
                        raise StorageError(f"The database {self._name} is damaged: {verdict}. Restore a copy of it.")
            else:
                self._held.enter_context(_advisory_lock(self._engine, self._name))
            with self._writer.begin() as connection:
                _migrate(connection, self._name)
                self._token = secrets.token_hex(16)
                connection.execute(owner.delete())
                connection.execute(owner.insert().values(id=1, token=self._token, since=now()))

    def close(self) -> None:
        """Let go of the database."""
        self._held.close()
        self._engine.dispose()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(error.orig if isinstance(error, DBAPIError) else error).strip().partition("\n")[0]
            raise StorageError(f"The database {self._name} could not do it: {cause}.{_advice(cause)}") from error

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        """Give a connection to read by; what one statement reads is of one moment."""
        with self._reported(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        assert self._token, "this store is for reading only"
        with self._writing, self._reported(), self._writer.begin() as connection:
            # The row is locked until the end, so a server that takes over waits for what this one has begun.
            token = connection.execute(_OWNER).scalar_one()
            if token != self._token:
                raise StorageError(f"Another server has taken over the database {self._name}. Stop this one.")
            yield connection

    def ping(self) -> None:
        """Raise StorageError if the database can't be read."""
        with self._read() as connection:
            connection.execute(sa.select(owner.c.id)).first()

    # Jobs

    def next_id(self, name: str) -> str:
        """Return an id for a job called ``name`` that no job has had: NAME-0001, NAME-0002, ..., deleted ones too."""
        with self._write() as connection:
            mine = sa.select(numbers.c.last).where(numbers.c.name == name)
            last = connection.execute(mine).scalar_one_or_none()
            number = (last or 0) + 1
            while _find(connection, f"{name}-{number:04d}") is not None:
                number += 1
            if last is None:
                connection.execute(numbers.insert().values(name=name, last=number))
            else:
                connection.execute(numbers.update().where(numbers.c.name == name).values(last=number))
            return f"{name}-{number:04d}"

    def add_job(
        self,
        id: str,
        name: str,
        submitter: str,
        bundle: str,
        key: str,
        rounds: int,
        *,
        size: int = 0,
        most_jobs: int | None = None,
        most_bytes: int | None = None,
    ) -> str:
        """Queue a job and return its id; that of the first where ``submitter`` gave the same key before.

        Args:
            id, name, submitter, bundle, key, rounds, size: see :class:`JobRow`.
            most_jobs: how many of the submitter's jobs may be queued or running at a time.
            most_bytes: how many bytes all his jobs may hold.

        Raises:
            AccessError: it would be more than the submitter may have.
            JobError: another job has this id.
        """
        with self._write() as connection:
            first = connection.execute(
                sa.select(jobs.c.id).where(jobs.c.submitter == submitter, jobs.c.key == key)
            ).scalar_one_or_none()
            if first is not None:
                return str(first)
            if _find(connection, id) is not None:
                raise JobError(f"There is a job {id!r} already.")
            _check_active(connection, submitter, most_jobs)
            _check_held(connection, submitter, size, most_bytes)
            values = {"id": id, "name": name, "submitter": submitter, "key": key, "bundle": bundle, "rounds": rounds}
            rest = {"round": 0, "size": size, "state": "queued", "error": "", "kind": "", "started": "", "ended": ""}
            connection.execute(jobs.insert().values(**values, **rest, created=now()))
            return id

    def job(self, id: str) -> JobRow:
        """Return one job (JobError if there is none)."""
        with self._read() as connection:
            return _job(connection, id)

    def find_job(self, id: str) -> JobRow | None:
        """Return one job, or None if there is none."""
        with self._read() as connection:
            return _find(connection, id)

    def jobs(self, submitter: str | None = None, state: JobState | None = None) -> list[JobRow]:
        """Return all jobs, or a submitter's, or those in a state, oldest first."""
        query = sa.select(jobs).order_by(jobs.c.number)
        if submitter is not None:
            query = query.where(jobs.c.submitter == submitter)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with self._read() as connection:
            return [JobRow(**_values(row)) for row in connection.execute(query)]

    def count_jobs(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        with self._read() as connection:
            found = {str(state): int(count) for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in schema.JOB_STATES}

    def held(self, submitter: str) -> int:
        """Return how many bytes a submitter's jobs hold, or are about to."""
        with self._read() as connection:
            return _held(connection, submitter)

    def hold(self, id: str, size: int, most_bytes: int | None = None) -> None:
        """Note that a job holds, or is about to hold, ``size`` bytes in all.

        Raises:
            JobError: there is no such job.
            AccessError: all of its submitter's jobs would hold more than ``most_bytes``; nothing is noted.
        """
        with self._write() as connection:
            job = _job(connection, id)
            _check_held(connection, job.submitter, size - job.size, most_bytes)
            connection.execute(jobs.update().where(jobs.c.id == id).values(size=size))

    def grow(self, id: str, more: int, most_bytes: int | None) -> None:
        """Note, as `hold` does, that a job is about to hold ``more`` bytes than are noted."""
        with self._write() as connection:
            _check_held(connection, _job(connection, id).submitter, more, most_bytes)
            connection.execute(jobs.update().where(jobs.c.id == id).values(size=jobs.c.size + more))

    def set_state(
        self, id: str, state: JobState, error: str = "", kind: str = "", *, most_jobs: int | None = None
    ) -> JobRow:
        """Move a job to another state and return it; moving it to where it stands changes nothing.

        A job that is queued again asks anew the sites that had no answer for its unfinished round. Where the model of
        that round is being evaluated already, what it was made of stands: sites evaluate one model a round.

        Raises:
            JobError: there is no such job, or it can't go there from where it stands.
            AccessError: it is to be queued, and its submitter has ``most_jobs`` queued or running.
        """
        with self._write() as connection:
            job = _job(connection, id)
            if job.state == state:
                return job
            if job.state not in _MOVES[state]:
                raise JobError(f"The job is {job.state}; it can't become {state}.", job=id)
            if state == "queued":
                _check_active(connection, job.submitter, most_jobs)
            values: dict[str, Any] = {"state": state, "error": _clean(error), "kind": _clean(kind)[:40]}
            if state == "running":
                values["started"] = job.started or now()
            values["ended"] = now() if state in ("finished", "failed", "aborted") else ""
            connection.execute(jobs.update().where(jobs.c.id == id).values(**values))
            if state == "queued":
                missing = (tasks.c.job == id) & tasks.c.state.in_(("missing", "late"))
                stands = (tasks.c.kind == "train") & _judged(tasks.c.job, tasks.c.course, tasks.c.round)
                connection.execute(tasks.update().where(missing & ~stands).values(state="replaced"))
            return _job(connection, id)

    def progressed(self, id: str, round: int, size: int, text: str) -> None:
        """Note the last finished round of a job, with a line in its log, and the bytes it now holds."""
        with self._write() as connection:
            connection.execute(_PROGRESSED, {"job": id, "to": round, "bytes": size})
            _log(connection, id, "round", text)

    def delete_job(self, id: str) -> None:
        """Forget a job with its tasks and its log.

        Raises:
            JobError: there is no such job, or it is under way.
        """
        with self._write() as connection:
            job = _job(connection, id)
            if job.state in ("queued", "running"):
                raise JobError(f"The job is {job.state}. Abort it before you delete it.", job=id)
            connection.execute(jobs.delete().where(jobs.c.id == id))

    # Tasks

    def open_tasks(
        self,
        job: str,
        course: str,
        round: int,
        kind: TaskKind,
        plan: str | Mapping[str, str],
        sites: Sequence[str],
        renewing: Literal["train", "evaluate"] | None = None,
    ) -> dict[str, TaskRow]:
        """Ask ``sites`` for something, and return a task for each.

        A site that was asked before with the same plan keeps its task and its answer; with another plan it gets a
        new task. That of a site that has left the job is closed, with the answer it left with.

        Args:
            job, course, round, kind: see :class:`TaskRow`.
            plan: the plan, or each site's.
            sites: who is asked.
            renewing: a kind of tasks of the same round whose answers are worth nothing once there is a new task here.

        Raises:
            JobError: there is no such job.
        """
        asked = {"job": job, "course": course, "round": round, "kind": kind}
        with self._write() as connection:
            _job(connection, job)
            stored = {row.site: row for row in connection.execute(_ASKED, asked)}
            plans = dict.fromkeys(sites, plan) if isinstance(plan, str) else plan
            replaced = [row.number for row in stored.values() if row.plan != plans.get(row.site, row.plan)]
            if replaced:
                connection.execute(tasks.update().where(tasks.c.number.in_(replaced)).values(state="replaced"))
            left = _leavers(connection, job)
            common: dict[str, Any] = {**asked, "update": "", "claimed": None, "opened_s": time.time()}
            fresh = [
                {
                    **common,
                    "task": secrets.token_hex(8),
                    "site": site,
                    "plan": plans[site],
                    "state": "missing" if site in left else "open",
                    "answer": left.get(site, b""),
                }
                for site in sites
                if site not in stored or stored[site].plan != plans[site]
            ]
            if fresh:
                connection.execute(tasks.insert(), fresh)
            if fresh and renewing is not None:
                theirs = (tasks.c.job == job) & (tasks.c.course == course) & (tasks.c.round == round)
                stale = theirs & (tasks.c.kind == renewing)
                connection.execute(tasks.update().where(stale).values(state="replaced"))
            rows = {site: _task(row) for site, row in stored.items()}
            rows |= {values["site"]: TaskRow(**values) for values in fresh}
            return {site: rows[site] for site in sites}

    def answer(
        self,
        task: str,
        site: str,
        state: Literal["done", "missing", "late"],
        answer: bytes = b"",
        update: str = "",
    ) -> bool:
        """Take one answer as `answers` does, and say whether it counts."""
        return self.answers([Said(task, site, state, answer, update)])[0]

    def answers(self, said: Sequence[Said]) -> list[bool]:
        """Take answers in their order, all or none, and say which of them count: the first to a task stands."""
        if not said:
            return []
        with self._write() as connection:
            return [
                connection.execute(
                    _ANSWERS[item.state],
                    {"asked": item.task, "who": item.site, "said": item.answer, "key": item.update},
                ).rowcount
                == 1
                for item in said
            ]

    def task(self, task: str) -> TaskRow | None:
        """Return one task, or None if it is not known (any more)."""
        return self.find_tasks(task).get(task)

    def find_tasks(self, *names: str) -> dict[str, TaskRow]:
        """Return those of the named tasks that are known."""
        with self._read() as connection:
            return {row.task: _task(row) for row in connection.execute(_NAMED, {"names": names})}

    def tasks(self, job: str, kind: TaskKind | None = None) -> list[TaskRow]:
        """Return a job's tasks, replaced ones aside, in the order in which they were first asked for."""
        query, values = (_TASKS, {"job": job}) if kind is None else (_TASKS_OF_KIND, {"job": job, "kind": kind})
        with self._read() as connection:
            return [_task(row) for row in connection.execute(query, values)]

    def num_plans(self, job: str, course: str, round: int, kind: TaskKind) -> int:
        """Return how many different plans there were for tasks of a kind in one round, replaced ones included."""
        of_round = (tasks.c.job == job) & (tasks.c.course == course) & (tasks.c.round == round) & (tasks.c.kind == kind)
        with self._read() as connection:
            return int(connection.scalar(sa.select(sa.func.count(tasks.c.plan.distinct())).where(of_round)) or 0)

    def agenda(self, *sites: str) -> list[TaskRow]:
        """Return what sites have to do for the jobs that are running; what is late is still welcome."""
        with self._read() as connection:
            return [_task(row) for row in connection.execute(_AGENDA, {"sites": sites})]

    def leave(self, job: str, site: str, answer: bytes) -> None:
        """Take a site out of a job for good; ``answer`` closes its tasks, those to come too (JobError: no such job)."""
        mine = (tasks.c.job == job) & (tasks.c.site == site) & tasks.c.state.in_(("open", "late"))
        with self._write() as connection:
            _job(connection, job)
            if site not in _leavers(connection, job):
                connection.execute(leavers.insert().values(job=job, site=site, answer=answer))
            connection.execute(tasks.update().where(mine).values(state="missing", answer=answer))

    def unfinished(self, *sites: str) -> dict[str, list[JobRow]]:
        """Return, for each site, the jobs that have not finished, but for those that it has left, oldest first."""
        with self._read() as connection:
            left = {(row.job, row.site) for row in connection.execute(_LEFT, {"sites": sites})}
            rows = [JobRow(**_values(row)) for row in connection.execute(_UNFINISHED)]
        return {site: [row for row in rows if (row.id, site) not in left] for site in sites}

    def overdue(self, job: str, course: str, round: int) -> list[TaskRow]:
        """Return the overdue updates that ``round`` is to use: those that no round has claimed are now its own.

        Asked again after a restart, the round gets the same ones, and what has come since, unless its model is being
        evaluated already.
        """
        with self._read() as connection:
            if not connection.execute(_OVERDUE, {"job": job, "course": course}).scalar_one():
                return []
        mine = (tasks.c.job == job) & (tasks.c.course == course) & (tasks.c.state == "overdue")
        with self._write() as connection:
            if not connection.execute(sa.select(_judged(job, course, round))).scalar_one():
                connection.execute(tasks.update().where(mine & tasks.c.claimed.is_(None)).values(claimed=round))
            query = sa.select(tasks).where(mine & (tasks.c.claimed == round)).order_by(tasks.c.round, tasks.c.site)
            return [_task(row) for row in connection.execute(query)]

    def forget(self, job: str, course: str, before_round: int) -> list[str]:
        """Forget what earlier rounds were answered, and return the keys of their updates, to be freed.

        What is late by no more than ``LATE_ROUNDS``, or overdue and not used yet, stays; so does ``inspect``.
        """
        known = {"job": job, "course": course, "before": before_round, "long_before": before_round - LATE_ROUNDS}
        with self._write() as connection:
            return [key for key in connection.execute(_FORGET, known).scalars() if key]

    # Sites

    def seen(self, site: str, release: str) -> None:
        """Note that a site has been heard from."""
        values = {"release": release, "seen": now()}
        with self._write() as connection:
            if not connection.execute(sites.update().where(sites.c.site == site).values(**values)).rowcount:
                connection.execute(sites.insert().values(site=site, **values))

    def sites(self) -> list[SiteRow]:
        """Return the sites that were ever heard from, by name."""
        with self._read() as connection:
            return [SiteRow(**_values(row)) for row in connection.execute(sa.select(sites).order_by(sites.c.site))]

    # Logs

    def event(self, job: str, kind: str, text: str) -> int:
        """Add a line to a job's log and return its number (JobError if there is no such job)."""
        with self._write() as connection:
            return _log(connection, job, kind, text)

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Return the first ``limit`` lines of a job's log after number ``after``."""
        values = {"job": job, "after": after, "limit": limit}
        with self._read() as connection:
            return [EventRow(**_values(row)) for row in connection.execute(_EVENTS, values)]

    def audit(self, actor: str, role: str, action: str, subject: str, outcome: str, detail: str = "") -> None:
        """Add an entry to the audit log; no method and no statement changes or deletes one."""
        values = {"actor": actor, "role": role, "action": action, "subject": subject, "outcome": outcome}
        clean = {name: _clean(value)[:200] for name, value in values.items()}
        with self._write() as connection:
            connection.execute(audits.insert().values(**clean, detail=_clean(detail), time=now()))

    def audits(self, after: int = 0, limit: int = 1000) -> list[AuditRow]:
        """Return the first ``limit`` audit entries after number ``after``."""
        query = sa.select(audits).where(audits.c.number > after).order_by(audits.c.number).limit(limit)
        with self._read() as connection:
            return [AuditRow(**_values(row)) for row in connection.execute(query)]


def _values(row: Row[Any]) -> dict[str, Any]:
    """Return a row's values; the number that orders jobs and tasks is the database's own business."""
    values = dict(row._mapping)
    if "task" in values or "bundle" in values:
        del values["number"]
    return values


def _check_active(connection: Connection, submitter: str, most: int | None) -> None:
    mine = (jobs.c.submitter == submitter) & jobs.c.state.in_(("queued", "running"))
    active = connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one()
    if most is not None and active >= most:
        raise AccessError(
            f"{submitter} has {active} jobs queued or running, and may have {most} (quota.jobs in server.toml). "
            "Wait for one to end, or abort one."
        )


def _held(connection: Connection, submitter: str) -> int:
    total = sa.select(sa.func.coalesce(sa.func.sum(jobs.c.size), 0)).where(jobs.c.submitter == submitter)
    return int(connection.execute(total).scalar_one())


def _check_held(connection: Connection, submitter: str, more: int, most: int | None) -> None:
    if most is not None and more > 0:
        check_quota(submitter, _held(connection, submitter) + more, most)


def check_quota(submitter: str, num_bytes: int, most: int) -> None:
    """Raise AccessError if ``num_bytes`` are more than all that a submitter may have at the server."""
    if num_bytes > most:
        raise AccessError(
            f"The jobs of {submitter} would hold {num_bytes:,} bytes at the server, and may hold {most:,} "
            "(quota.bytes in server.toml). Delete finished jobs; `hansa job resume` then goes on with one that met "
            "the quota."
        )


def _judged(job: Any, course: Any, round: Any) -> sa.Exists:
    """Return whether sites have been asked to evaluate a round's model; job, course and round are values or columns."""
    judged = tasks.alias()
    same = (judged.c.job == job) & (judged.c.course == course) & (judged.c.round == round)
    return sa.exists().where(same & (judged.c.kind == "evaluate") & (judged.c.state != "replaced"))


def _task(row: Row[Any]) -> TaskRow:
    return TaskRow(**_values(row))


def _find(connection: Connection, id: str) -> JobRow | None:
    row = connection.execute(_JOB, {"id": id}).one_or_none()
    return None if row is None else JobRow(**_values(row))


def _job(connection: Connection, id: str) -> JobRow:
    job = _find(connection, id)
    if job is None:
        raise JobError(f"There is no job {id!r}. `hansa job list` lists them.")
    return job


def _log(connection: Connection, job: str, kind: str, text: str) -> int:
    _job(connection, job)
    line = {"job": job, "time": now(), "kind": kind, "text": _clean(text)}
    return int(connection.execute(_EVENT, line).scalar_one())


def _leavers(connection: Connection, job: str) -> dict[str, bytes]:
    return {row.site: row.answer for row in connection.execute(_LEAVERS, {"job": job})}


def _clean(text: str) -> str:
    """Return text that every database holds, and no longer than a line of a log should be."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()[:_LONGEST]


def _advice(cause: str) -> str:
    if "readonly" in cause or "unable to open" in cause:
        return " Check that its folder and files belong to the server's user."
    if "full" in cause or "disk I/O" in cause:
        return " Free some space; nothing that was accepted is lost."
    if "malformed" in cause or "not a database" in cause:
        return " The file is damaged; restore a copy of it."
    return ""


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin in _begin_sqlite, and hold DDL too
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction that writes; what only reads is one statement, and needs none."""
    if connection.get_execution_options().get("immediate"):
        connection.connection.cursor().execute("BEGIN IMMEDIATE")


def _prepare_postgres(connection: Any, _: object) -> None:
    connection.autocommit = True
    connection.execute("SET synchronous_commit = on")
    connection.autocommit = False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Hold a file's lock, which the kernel frees with the process."""
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
    except BlockingIOError:
        raise StorageError(f"Another server is at work in {path.parent} (it holds {path.name}).") from None
    except OSError as error:
        raise StorageError(f"Can't lock {path}: {error.strerror}.") from error


@contextlib.contextmanager
def _advisory_lock(engine: Engine, name: str) -> Iterator[None]:
    """Hold PostgreSQL's lock in a session of its own, which ends with the process."""
    with engine.connect() as session:
        session.execute(_KEEPALIVE)
        attempt = sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))
        for _ in range(_LOCK_ATTEMPTS):  # a server killed just now may not have been noticed yet
            if session.execute(attempt).scalar_one():
                break
            time.sleep(_LOCK_PAUSE_S)
        else:
            raise StorageError(f"Another server is at work on the database {name}.")
        session.commit()
        try:
            yield
        finally:
            session.invalidate()  # not back to the pool: the lock goes with the session


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()


def _migrate(connection: Connection, name: str) -> None:
    """Bring the tables up to date in the connection's transaction (VersionError if they are newer)."""
    revision = _revision(connection)
    if revision == schema.REVISION:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise VersionError(
            f"The database {name} was made by a newer release of Hansa (schema {revision}; this release knows "
            f"{schema.REVISION}). Start it with that release."
        )
    command.upgrade(config, "head")
