# SPDX-License-Identifier: Apache-2.0
"""The tables of a server's database, as the newest migration leaves them.

    jobs ──< tasks    what sites were asked and what they answered
       ├───< leavers  sites that take no part in a job any more
       └───< events   a job's log
    numbers           the last that a job of each name was given
    sites             when each was last heard from
    audits            who did what; rows are only ever added
    owner             the server that may write (one row)

Times are ISO 8601 text, UTC. A change here needs a migration beside it; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

REVISION = "0002"
"""The newest migration; a database that stands at it needs none."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Number = BigInteger().with_variant(Integer, "sqlite")
"""Only a column declared INTEGER counts by itself in SQLite; there it has 64 bits all the same."""

JOB_STATES = ("queued", "running", "finished", "failed", "aborted")
TASK_STATES = ("open", "done", "missing", "late", "overdue", "replaced")


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


jobs = Table(
    "jobs",
    metadata,
    Column("number", Number, primary_key=True),
    Column("id", String(200), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("submitter", String(200), nullable=False),
    Column("key", String(200), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("rounds", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("error", Text, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("created", String(40), nullable=False),
    Column("started", String(40), nullable=False),
    Column("ended", String(40), nullable=False),
    UniqueConstraint("submitter", "key"),
    _one_of("state", JOB_STATES),
    sqlite_autoincrement=True,
)

tasks = Table(
    "tasks",
    metadata,
    Column("number", Number, primary_key=True),
    Column("task", String(200), nullable=False, unique=True),
    Column("job", String(200), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("course", String(200), nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("site", String(200), nullable=False),
    Column("plan", String(64), nullable=False),
    Column("state", String(20), nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("update", String(400), nullable=False),
    Column("claimed", BigInteger, nullable=True),
    Column("opened_s", Float, nullable=False),
    _one_of("state", TASK_STATES),
    # One task of a kind for a site and round, those aside whose plan has been replaced.
    Index(
        "uq_tasks_asked",
        "job",
        "course",
        "round",
        "kind",
        "site",
        unique=True,
        sqlite_where=text("state <> 'replaced'"),
        postgresql_where=text("state <> 'replaced'"),
    ),
    Index(None, "site", "state"),
    sqlite_autoincrement=True,
)

leavers = Table(
    "leavers",
    metadata,
    Column("job", String(200), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("site", String(200), primary_key=True),
    Column("answer", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("number", Number, primary_key=True),
    Column("job", String(200), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("time", String(40), nullable=False),
    Column("kind", String(200), nullable=False),
    Column("text", Text, nullable=False),
    Index(None, "job", "number"),
    sqlite_autoincrement=True,
)

numbers = Table(
    "numbers",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("last", BigInteger, nullable=False),
)

sites = Table(
    "sites",
    metadata,
    Column("site", String(200), primary_key=True),
    Column("release", String(200), nullable=False),
    Column("seen", String(40), nullable=False),
)

audits = Table(
    "audits",
    metadata,
    Column("number", Number, primary_key=True),
    Column("time", String(40), nullable=False),
    Column("actor", Text, nullable=False),
    Column("role", String(200), nullable=False),
    Column("action", String(200), nullable=False),
    Column("subject", Text, nullable=False),
    Column("outcome", String(200), nullable=False),
    Column("detail", Text, nullable=False),
    sqlite_autoincrement=True,
)

owner = Table(
    "owner",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("token", String(64), nullable=False),
    Column("since", String(40), nullable=False),
)
