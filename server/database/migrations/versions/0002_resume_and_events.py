"""Pause, resume points, delayed retries, events with values, versions of workers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TIMES = ("progress_at", "available_at", "claimed_at", "pause_requested_at")


def upgrade() -> None:
    with op.batch_alter_table("job") as job:
        for name in _TIMES:
            job.add_column(sa.Column(name, sa.DateTime(timezone=True), nullable=True))
        job.add_column(sa.Column("resume_point", sa.JSON(), nullable=True))
        job.add_column(
            sa.Column("claimed_progress", sa.Float(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("job_event") as job_event:
        job_event.add_column(sa.Column("data", sa.JSON(), nullable=True))
        job_event.drop_index("ix_job_event_job_id")
        job_event.create_index("ix_job_event_job_id_id", ["job_id", "id"])
    with op.batch_alter_table("worker") as worker:
        for name in ("version", "torch_version"):
            worker.add_column(sa.Column(name, sa.String(), nullable=False, server_default=""))
