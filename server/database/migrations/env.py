"""Runs the migrations on the connection from `server.database.engine`."""

from alembic import context
from sqlmodel import SQLModel

import server.models.studies  # noqa: F401 - fills the metadata, with that of the other tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
