"""What made a job: its newest attempt's program and machine, and the client that posted it."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("job", sa.Column("provenance", sa.JSON(), nullable=True))
    for table in ("job", "study"):
        op.add_column(table, sa.Column("client", sa.String(), nullable=False, server_default=""))
