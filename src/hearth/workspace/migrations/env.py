"""Alembic's entry point: runs on the connection that ``hearth.workspace.database`` hands over."""

from alembic import context

from hearth.workspace.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
