# SPDX-License-Identifier: Apache-2.0
"""Jobs, tasks, events, sites, audits and the owner."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables in an empty database."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "jobs",
        sa.Column("number", number, nullable=False),
        sa.Column("id", sa.String(200), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("submitter", sa.String(200), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("bundle", sa.String(64), nullable=False),
        sa.Column("rounds", sa.BigInteger, nullable=False),
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
        sa.Column("started", sa.String(40), nullable=False),
        sa.Column("ended", sa.String(40), nullable=False),
        sa.CheckConstraint("state IN ('queued', 'running', 'finished', 'failed', 'aborted')", name="state"),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sa.UniqueConstraint("submitter", "key", name="uq_jobs_submitter_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "tasks",
        sa.Column("number", number, nullable=False),
        sa.Column("task", sa.String(200), nullable=False),
        sa.Column("job", sa.String(200), nullable=False),
        sa.Column("course", sa.String(200), nullable=False),
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("site", sa.String(200), nullable=False),
        sa.Column("plan", sa.String(64), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("update", sa.String(400), nullable=False),
        sa.Column("claimed", sa.BigInteger, nullable=True),
        sa.Column("opened_s", sa.Float, nullable=False),
        sa.CheckConstraint("state IN ('open', 'done', 'missing', 'late', 'overdue', 'replaced')", name="state"),
        sa.PrimaryKeyConstraint("number", name="pk_tasks"),
        sa.UniqueConstraint("task", name="uq_tasks_task"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_tasks_job", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    asked = sa.text("state <> 'replaced'")
    op.create_index(
        "uq_tasks_asked",
        "tasks",
        ["job", "course", "round", "kind", "site"],
        unique=True,
        sqlite_where=asked,
        postgresql_where=asked,
    )
    op.create_index("ix_tasks_site_state", "tasks", ["site", "state"])
    op.create_table(
        "leavers",
        sa.Column("job", sa.String(200), nullable=False),
        sa.Column("site", sa.String(200), nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job", "site", name="pk_leavers"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_leavers_job", ondelete="CASCADE"),
    )
    op.create_table(
        "events",
        sa.Column("number", number, nullable=False),
        sa.Column("job", sa.String(200), nullable=False),
        sa.Column("time", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(200), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_events_job", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job_number", "events", ["job", "number"])
    op.create_table(
        "sites",
        sa.Column("site", sa.String(200), nullable=False),
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("seen", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_sites"),
    )
    op.create_table(
        "audits",
        sa.Column("number", number, nullable=False),
        sa.Column("time", sa.String(40), nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("role", sa.String(200), nullable=False),
        sa.Column("action", sa.String(200), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("outcome", sa.String(200), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audits"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "owner",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("since", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_owner"),
    )
    _seal_audits()


def _seal_audits() -> None:
    """Let the database itself refuse to change or delete an audit entry."""
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audits_no_{action.lower()} BEFORE {action} ON audits "
                "BEGIN SELECT RAISE(ABORT, 'audit entries are only ever added'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audits_sealed() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit entries are only ever added'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audits_sealed BEFORE UPDATE OR DELETE OR TRUNCATE ON audits "
        "FOR EACH STATEMENT EXECUTE FUNCTION audits_sealed()"
    )
