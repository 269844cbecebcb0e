"""The tables of a workspace, the same on SQLite and Postgres.

A change here needs a new file in ``migrations/versions`` and its revision at the end of ``REVISIONS``;
a test compares the migrated schema with these tables on both databases.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

# Oldest first. Compared with the database on open without importing alembic.
REVISIONS = ("0001",)
HEAD = REVISIONS[-1]


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite has no time zones, so it stores the naive UTC value."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "times in the workspace are aware"
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JsonText(sa.types.TypeDecorator[Any]):
    """Any JSON value as text: the same bytes on both databases. NaN and infinities become null."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else dump_json(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """``value`` as strict JSON with sorted keys; paths and dates become text, non-finite numbers null."""
    return json.dumps(_finite(value), sort_keys=True, indent=indent, default=str, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def utcnow() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the primary key is a plain INTEGER.
_BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("recipe", JsonText()),
    sa.Column("recipe_hash", sa.String(64)),
    sa.Column("parent_id", sa.String(32), sa.ForeignKey("runs.id")),
    sa.Column("tags", JsonText(), nullable=False),
    sa.Column("summary", JsonText(), nullable=False),
    sa.Column("error", sa.Text()),
    sa.Column("created_at", UtcDateTime(), nullable=False, index=True),
    sa.Column("finished_at", UtcDateTime()),
    # Who executes it: enough to tell, later, whether that process still lives.
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("system_id", sa.String(128), nullable=False),
    sa.Column("pid", sa.BigInteger(), nullable=False),
    sa.Column("process_started", sa.Double(), nullable=False),
    sa.Column("heartbeat_at", UtcDateTime(), nullable=False),
)

metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("id", _BigId, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(32), sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("step", sa.BigInteger(), nullable=False),
    sa.Column("value", sa.Double()),  # null is NaN, which SQLite cannot store
    sa.Column("time", sa.Double(), nullable=False),  # seconds since the epoch
    sa.Index("ix_metrics_series", "run_id", "name", "step"),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    # The highest number ever given; numbers of deleted versions are never given again.
    sa.Column("last_version", sa.Integer(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
)

versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("name", sa.String(128), sa.ForeignKey("models.name"), primary_key=True),
    sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("size", sa.BigInteger(), nullable=False),
    sa.Column("run_id", sa.String(32)),
    sa.Column("recipe", JsonText()),
    sa.Column("recipe_hash", sa.String(64)),
    sa.Column("dataset_fingerprint", sa.String(128)),
    sa.Column("parent", sa.String(255)),
    sa.Column("licence", sa.String(255)),
    sa.Column("facts", JsonText(), nullable=False),
    sa.Column("tags", JsonText(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("created_by", sa.String(255), nullable=False),
)
# One live version a content: creating the same content again finds the existing version.
sa.Index(
    "uq_model_versions_live_content",
    versions.c.name,
    versions.c.digest,
    unique=True,
    sqlite_where=versions.c.status == "active",
    postgresql_where=versions.c.status == "active",
)

aliases = sa.Table(
    "model_aliases",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.Column("updated_by", sa.String(255), nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["model_versions.name", "model_versions.version"]),
)

history = sa.Table(
    "model_history",
    metadata,
    sa.Column("id", _BigId, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(128), sa.ForeignKey("models.name"), nullable=False, index=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("version", sa.Integer()),
    sa.Column("alias", sa.String(128)),
    sa.Column("from_version", sa.Integer()),
    sa.Column("to_version", sa.Integer()),
    sa.Column("forced", sa.Boolean(), nullable=False),
    sa.Column("reason", sa.Text()),
    sa.Column("detail", JsonText()),
)

reports = sa.Table(
    "model_reports",
    metadata,
    sa.Column("id", _BigId, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("passed", sa.Boolean()),
    sa.Column("imported", sa.Boolean(), nullable=False),
    sa.Column("report", JsonText(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("created_by", sa.String(255), nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["model_versions.name", "model_versions.version"]),
    sa.Index("ix_model_reports_version", "name", "version", "kind"),
)

edges = sa.Table(
    "lineage_edges",
    metadata,
    sa.Column("src", sa.String(512), primary_key=True),
    sa.Column("dst", sa.String(512), primary_key=True, index=True),
    sa.Column("relation", sa.String(64), primary_key=True),
    sa.Column("created_at", UtcDateTime(), nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("hint", sa.String(16), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("last_used_at", UtcDateTime()),
    sa.Column("revoked_at", UtcDateTime()),
)

# Artifacts that somebody stored directly; deleting a model version leaves these alone.
pins = sa.Table(
    "artifact_pins",
    metadata,
    sa.Column("digest", sa.String(80), primary_key=True),
    sa.Column("created_at", UtcDateTime(), nullable=False),
)
