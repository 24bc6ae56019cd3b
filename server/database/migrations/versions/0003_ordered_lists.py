"""Indices for job lists with each filter, in the order of the list; labels in a table."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_PAGE_SIZE = 1000


def upgrade() -> None:
    with op.batch_alter_table("job") as job:
        job.drop_index("ix_job_name")
        job.drop_index("ix_job_option_status")
        for name, columns in {
            "ix_job_status_created_at": ["status"],
            "ix_job_option_created_at": ["option"],
            "ix_job_option_status_created_at": ["option", "status"],
            "ix_job_name_created_at": ["name"],
        }.items():
            job.create_index(name, [*columns, "created_at", "id"])
    op.create_table(
        "job_label",
        sa.Column("job_id", sa.String(length=12), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    _copy_labels(op.get_bind())
    op.create_index(
        "ix_job_label_created_at", "job_label", ["key", "value", "created_at", "job_id"]
    )


def _copy_labels(connection: sa.Connection) -> None:
    created_at = sa.Column("created_at", sa.DateTime(timezone=True))
    job = sa.table("job", sa.column("id", sa.String), sa.column("metadata", sa.JSON), created_at)
    names = ("job_id", "key", "value", "created_at")
    job_label = sa.table("job_label", *(sa.column(name) for name in names))
    stored = connection.execute(sa.select(job.c.id, job.c.created_at, job.c.metadata)).all()
    rows = [
        {"job_id": job_id, "key": key, "value": value, "created_at": created_at}
        for job_id, created_at, labels in stored
        for key, value in labels.items()
        # PostgreSQL cannot store a text with a NUL, and no request can filter by one.
        if "\0" not in key + value
    ]
    for first in range(0, len(rows), _PAGE_SIZE):
        connection.execute(sa.insert(job_label), rows[first : first + _PAGE_SIZE])
