# SPDX-License-Identifier: Apache-2.0
"""The numbers that jobs have been given."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the table of the last number of each name; jobs that are there are passed over when a number is given."""
    op.create_table(
        "numbers",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_numbers"),
    )
