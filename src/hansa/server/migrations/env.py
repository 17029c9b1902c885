# SPDX-License-Identifier: Apache-2.0
"""What Alembic runs: every migration that is missing, in one transaction on the connection that the store gives."""

from __future__ import annotations

from alembic import context

from hansa.server import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema.metadata)
context.run_migrations()
