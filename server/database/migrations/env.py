"""Runs the migrations on the connection from `server.database.engine`."""

from alembic import context
from sqlmodel import SQLModel

import server.models.epochs
import server.models.studies  # noqa: F401 - both fill the metadata, with the other tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
