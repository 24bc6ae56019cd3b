"""Options and kinds of files can be added without a migration: their columns have no CHECK."""

import logging
import re

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_logger = logging.getLogger("server.database.migrations")

#: Table and column of each CHECK, and its name.
_CHECKS = [("job", "option", "option"), ("artifact", "kind", "artifactkind")]


def upgrade() -> None:
    for table, column, name in _CHECKS:
        if op.get_bind().dialect.name == "sqlite":
            _drop_sqlite_check(table, column=column, name=name)
        else:
            op.drop_constraint(name, table, type_="check")


def _drop_sqlite_check(table: str, *, column: str, name: str) -> None:
    """Change the table's own text, as SQLite's documentation of ALTER TABLE says for a CHECK.

    A copy of the table would do too, but dropping the old one would delete all rows that belong to
    a job through their foreign keys. Some builds of SQLite (Apple's) protect that text; there the
    CHECK stays, and only new options and kinds of files are refused.
    """
    connection = op.get_bind()
    of_table = sa.text("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :table")
    before: str = connection.execute(of_table, {"table": table}).scalar_one()
    check = rf",\s*CONSTRAINT {name} CHECK \({column} IN \([^()]*\)\)"
    after, num_dropped = re.subn(check, "", before)
    assert num_dropped == 1, f"{table} has {num_dropped} checks of {column}"
    version: int = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    try:
        connection.execute(
            sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = :table"),
            {"sql": after, "table": table},
        )
        connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    except sa.exc.DBAPIError as error:
        _logger.warning("%s.%s keeps its CHECK: %s", table, column, error.orig)
    finally:
        connection.exec_driver_sql("PRAGMA writable_schema = OFF")
