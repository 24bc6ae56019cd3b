"""Own options, studies, and the identity of every job's configuration."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0006"
down_revision = "0005"

_logger = logging.getLogger("server.database.migrations")

_NOT_IDENTITY = ("seed", "data_seed", "checkpoint_every")
_BUILT_IN_DATASETS = ("atomic", "arc")
_BATCH_SIZE = 500


def upgrade() -> None:
    _create_tables()
    # Not as a batch: SQLite would copy the table, see revision 0004.
    op.add_column(
        "job", sa.Column("config_sha256", sa.String(64), nullable=False, server_default="")
    )
    op.add_column("job", sa.Column("study_id", sa.String(12), nullable=True))
    _widen_option()
    _fill_config_sha256()
    op.create_index("ix_job_study_id", "job", ["study_id"])
    op.create_index("ix_job_config_sha256_created_at", "job", ["config_sha256", "created_at", "id"])


def _widen_option() -> None:
    """The names of own options may be longer than those of the built-in ones.

    SQLite never checks a length; there only the table's text changes, see revision 0005.
    """
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        op.alter_column("job", "option", type_=sa.String(64), existing_nullable=False)
        return
    version: int = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    try:
        connection.exec_driver_sql(
            "UPDATE sqlite_master SET sql = replace(sql, 'option VARCHAR(20)', "
            "'option VARCHAR(64)') WHERE type = 'table' AND name = 'job'"
        )
        connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    except sa.exc.DBAPIError as error:
        _logger.info("the text of the table job stays as it is: %s", error.orig)
    finally:
        connection.exec_driver_sql("PRAGMA writable_schema = OFF")


def _create_tables() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "own_option",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("base", sa.String(64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("preset", sa.JSON(), nullable=False),
        sa.Column("summary", sa.String(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
    )
    op.create_table(
        "study",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("quick_test", sa.Boolean(), nullable=False),
        sa.Column("arms", sa.JSON(), nullable=False),
        sa.Column("seeds", sa.JSON(), nullable=False),
        sa.Column("rounds", sa.JSON(), nullable=False),
        sa.Column("data_seed", sa.Integer(), nullable=True),
        sa.Column("is_data_seed_fixed", sa.Boolean(), nullable=False),
        sa.Column("looks", sa.JSON(), nullable=False),
        sa.Column("num_planned_looks", sa.Integer(), nullable=False),
        sa.Column("until_decided", sa.Boolean(), nullable=False),
        sa.Column("max_seeds", sa.Integer(), nullable=False),
        sa.Column("thresholds", sa.JSON(), nullable=False),
        sa.Column("reuse", sa.Boolean(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("cancel_requested_at", moment, nullable=True),
        sa.Column("pause_requested_at", moment, nullable=True),
        sa.Column("decided_at", moment, nullable=True),
    )
    op.create_index("ix_study_created_at_id", "study", ["created_at", "id"])
    op.create_index(
        "ix_study_racing",
        "study",
        ["id"],
        sqlite_where=sa.text("until_decided IS 1 AND decided_at IS NULL"),
        postgresql_where=sa.text("until_decided IS true AND decided_at IS NULL"),
    )
    op.create_table(
        "study_job",
        sa.Column(
            "study_id",
            sa.String(12),
            sa.ForeignKey("study.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("seed", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("arm", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column(
            "job_id", sa.String(12), sa.ForeignKey("job.id", ondelete="SET NULL"), nullable=True
        ),
        sa.Column("is_reused", sa.Boolean(), nullable=False),
    )
    op.create_index("ix_study_job_job_id", "study_job", ["job_id"])


def _fill_config_sha256() -> None:
    """A statement for some hundred jobs, each of which may have a configuration of its own.

    One for each job would be slower on PostgreSQL, whose driver sends them without waiting for
    answers: if the database then falls behind, the connection times out.
    """
    connection = op.get_bind()
    identities = list(_compute_identities(connection))
    for first in range(0, len(identities), _BATCH_SIZE):
        _store_identities(connection, identities[first : first + _BATCH_SIZE])


def _store_identities(connection: sa.Connection, identities: Sequence[tuple[str, str]]) -> None:
    # SQLite and PostgreSQL both name the columns of VALUES like this.
    values = ", ".join(f"(:id{n}, :sha256_{n})" for n in range(len(identities)))
    update = sa.text(
        f"UPDATE job SET config_sha256 = identity.column2 FROM (VALUES {values}) AS identity "
        "WHERE job.id = identity.column1"
    )
    ids = {f"id{n}": job_id for n, (job_id, _) in enumerate(identities)}
    hashes = {f"sha256_{n}": sha256 for n, (_, sha256) in enumerate(identities)}
    connection.execute(update, ids | hashes)


def _compute_identities(connection: sa.Connection) -> Iterator[tuple[str, str]]:
    """Each job's id with the identity of its configuration."""
    job = sa.table("job", sa.column("id", sa.String), sa.column("config", sa.JSON))
    hashes: dict[str, str] = {}
    for job_id, config in connection.execute(sa.select(job.c.id, job.c.config)):
        name = config["dataset"]
        if name not in hashes:
            hashes[name] = _identify_dataset(name)
        yield job_id, _compute_identity({**config, "dataset": hashes[name]})


def _identify_dataset(name: str) -> str:
    """The hash of an uploaded data set; its name if it is built in, or if its file has gone."""
    folder: Path | None = context.config.attributes.get("datasets_dir")
    if name in _BUILT_IN_DATASETS or folder is None:
        return name
    try:
        with (folder / f"{name}.npz").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return name


def _compute_identity(config: dict[str, Any]) -> str:
    settings = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
