"""Idempotency keys, pinned jobs, and how often a job went back to the queue."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # Not as a batch: because of the first column's default, SQLite would copy the table, and
    # dropping the old one would delete all rows that belong to a job through their foreign keys.
    op.add_column(
        "job", sa.Column("is_pinned", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.add_column(
        "job", sa.Column("num_requeues", sa.Integer(), nullable=False, server_default="0")
    )
    is_requeued = sa.text("num_requeues > 0")
    op.create_index(
        "ix_job_requeued",
        "job",
        ["num_requeues"],
        sqlite_where=is_requeued,
        postgresql_where=is_requeued,
    )
    op.create_table(
        "idempotency_key",
        sa.Column("token_name", sa.String(), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
