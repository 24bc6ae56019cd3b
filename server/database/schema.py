"""The schema: its revisions, migrations to the newest one, and databases that have another one."""

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, inspect, text

from server.errors import LosslabError

#: The newest migration; finding it out would need the slow import of Alembic.
SCHEMA_REVISION: Final = "0010"
_MIGRATIONS_DIR: Final = Path(__file__).parent / "migrations"
_VERSION_TABLE: Final = "alembic_version"
#: A table that every revision has.
_OWN_TABLE: Final = "job"
# An arbitrary number, the same in every Losslab process.
_MIGRATION_LOCK: Final = 0x1055_1AB


class SchemaError(LosslabError):
    """The database has a schema that this version cannot use; nothing in it was changed."""


def migrate_schema(engine: Engine, *, datasets_dir: Path) -> None:
    """Migrate the schema to the newest revision, if it is older. Raises SchemaError."""
    if find_revision(engine) == SCHEMA_REVISION:
        return
    with engine.execution_options(sqlite_begin="IMMEDIATE").begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        upgrade(connection, revision="head", datasets_dir=datasets_dir)


def check_schema(engine: Engine) -> None:
    """Raise SchemaError if the database has another schema than this version, for example since it
    was migrated while this process ran."""
    with engine.connect() as connection:
        revision = _read_revision(connection)
    if revision != SCHEMA_REVISION:
        raise SchemaError(
            f"the database's schema is {revision} now, and this process knows {SCHEMA_REVISION}: "
            "start it again with the version that the server has"
        )


def find_revision(engine: Engine) -> str | None:
    """The schema's revision, one of those that this version can migrate; None for an empty
    database. Raises SchemaError for any other one."""
    with engine.connect() as connection:
        tables = set(inspect(connection).get_table_names())
        revision = _read_revision(connection) if _VERSION_TABLE in tables else None
    if revision is None and _OWN_TABLE in tables:
        raise SchemaError(
            f"the database has a table {_OWN_TABLE} and no schema version: it belongs to another "
            f"program, or its table {_VERSION_TABLE} was emptied; name another database "
            "(LOSSLAB_DATABASE_URL), or restore a backup"
        )
    if revision is not None and revision not in _list_revisions():
        raise SchemaError(_describe_unknown(revision))
    return revision


def upgrade(connection: Connection, *, revision: str, datasets_dir: Path | None = None) -> None:
    """Migrate the schema to a revision, as a part of the connection's transaction.

    The uploaded data sets are a part of their jobs' identity.
    """
    # Imported here: a start with an up-to-date schema is 0.2 s faster without it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    config.attributes["datasets_dir"] = datasets_dir
    command.upgrade(config, revision)


def _read_revision(connection: Connection) -> str | None:
    rows = connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}"))
    revision: str | None = rows.scalar()
    return revision


def _list_revisions() -> list[str]:
    """Those of this version, from the oldest on."""
    return [f"{number:04}" for number in range(1, int(SCHEMA_REVISION) + 1)]


def _describe_unknown(revision: str) -> str:
    if revision.isdecimal() and revision > SCHEMA_REVISION:
        return (
            f"the database is of a newer Losslab (schema {revision}; this version knows "
            f"{SCHEMA_REVISION}); upgrade Losslab, or restore a backup of this version"
        )
    return (
        f"the database is of another program (schema {revision[:40]!r}); name another one "
        "(LOSSLAB_DATABASE_URL)"
    )
