"""Alembic migrations of the workspace database, run by ``hearth.workspace.database`` on open."""
