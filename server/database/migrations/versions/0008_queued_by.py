"""Whose request queued a job or a study: the name of its token. The size of a kept answer."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    for table in ("job", "study"):
        op.add_column(table, sa.Column("queued_by", sa.String(), nullable=False, server_default=""))
    op.add_column(
        "idempotency_key", sa.Column("num_bytes", sa.Integer(), nullable=False, server_default="0")
    )
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    size = "length(CAST(answer AS BLOB))" if is_sqlite else "octet_length(answer)"
    op.execute(f"UPDATE idempotency_key SET num_bytes = {size}")
    op.create_index(
        "ix_idempotency_key_token",
        "idempotency_key",
        ["token_name", "created_at", "key", "num_bytes"],
    )
