"""Studies reuse jobs on their own data alone, whether or not the request named its seed."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.drop_column("study", "is_data_seed_fixed")
