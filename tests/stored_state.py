"""Everything that a request could change: rows and files."""

import hashlib
from typing import Any

from sqlalchemy import Engine, select
from sqlmodel import SQLModel

from server.settings import Settings

_OF_THE_DATABASE = ("losslab.db", "losslab.db-wal", "losslab.db-shm")

State = dict[str, Any]


def read_state(engine: Engine, settings: Settings) -> State:
    """Equal to another state if nothing was changed in between."""
    return _read_rows(engine) | _hash_files(settings)


def _read_rows(engine: Engine) -> State:
    with engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(select(table))))
            for table in SQLModel.metadata.sorted_tables
        }


def _hash_files(settings: Settings) -> State:
    folder = settings.data_dir.parent
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _OF_THE_DATABASE
    }
