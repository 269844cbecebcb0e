"""The database of a workspace: SQLite by default, Postgres by URL, migrated on open."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url

from hearth.errors import ConfigError, ConflictError, IntegrityError, StorageError
from hearth.workspace.locks import file_lock
from hearth.workspace.schema import HEAD, REVISIONS

BUSY_TIMEOUT_MS = 60_000  # how long a writer waits for another one before it gives up
_MIGRATION_LOCK = 0x4EA27  # any constant: the key of Postgres' advisory lock
_ALLOWED = "sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"


class Database:
    """A pool of connections with one rule: reads see a snapshot, writes are serialised from their start."""

    def __init__(self, url: str | URL) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = self._create_engine()
        _forget_connections_in_children(self.engine)

    def _create_engine(self) -> sa.Engine:
        if not self.is_sqlite:
            try:
                return sa.create_engine(self.url, pool_pre_ping=True, pool_size=5, max_overflow=20)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"the database {self.shown} needs the driver psycopg, which is not installed",
                    fix="pip install 'hearth-lm[postgres]'",
                ) from error
        engine = sa.create_engine(
            self.url, max_overflow=100, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    @property
    def shown(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    @property
    def sqlite_path(self) -> Path:
        """The file of an SQLite database."""
        assert self.is_sqlite
        assert self.url.database
        return Path(self.url.database)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection for reading; what it changes is rolled back."""
        with self._explained(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed at the end of the block, rolled back when it raises.

        On SQLite it takes the write lock at once, so that it never fails half-way for want of it.
        """
        with self._explained(), self.engine.connect() as connection:
            connection = connection.execution_options(hearth_write=True)
            with connection.begin():
                yield connection

    def insert_or_ignore(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that leaves an existing row alone."""
        if self.is_sqlite:
            return sqlite.insert(table).on_conflict_do_nothing()
        return postgresql.insert(table).on_conflict_do_nothing()

    def migrate(self) -> None:
        """Bring the schema to this version of Hearth; cheap when it is there already.

        Raises ConflictError when the database was written by a newer Hearth.
        """
        if self._revision() == HEAD:
            return
        if self.is_sqlite:
            self._create_folder()
            with file_lock(self.sqlite_path.with_name(self.sqlite_path.name + ".lock")):
                self._migrate_locked()
            return
        with self._explained(), self.engine.connect() as connection:
            connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
            try:
                self._migrate_locked()
            finally:
                connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})

    def _create_folder(self) -> None:
        try:
            self.sqlite_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot create the workspace folder {self.sqlite_path.parent}: {error.strerror}",
                fix="choose a writable folder with HEARTH_HOME",
            ) from error

    def _revision(self) -> str | None:
        """The revision of the schema; None for an empty or missing database."""
        if self.is_sqlite and not self.sqlite_path.exists():
            return None
        with self.read() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            revision: str | None = connection.execute(
                sa.text("SELECT version_num FROM alembic_version")
            ).scalar()
        if revision is not None and revision not in REVISIONS:
            raise ConflictError(
                f"the database {self.shown} has schema {revision}, which is newer than this Hearth "
                f"(it knows up to {HEAD})",
                fix="upgrade Hearth, or use another workspace with HEARTH_HOME",
            )
        return revision

    def _migrate_locked(self) -> None:
        if self._revision() == HEAD:  # another process was quicker
            return
        if self.is_sqlite:
            self._switch_to_wal()
        import alembic.command
        import alembic.config

        config = alembic.config.Config()
        config.set_main_option("script_location", "hearth.workspace:migrations")
        with self.write() as connection:
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def _switch_to_wal(self) -> None:
        """Persistent in the file: readers and the one writer no longer block each other."""
        with self._explained():
            raw = self.engine.raw_connection()
            try:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            finally:
                raw.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the driver's errors into ours; constraint violations pass, callers handle them."""
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except sa.exc.TimeoutError as error:
            raise StorageError(f"the database {self.shown} failed: too many connections at once") from error
        except sa.exc.DatabaseError as error:
            text = str(error.orig or error).strip().splitlines()[0]
            if self.is_sqlite and ("malformed" in text or "not a database" in text):
                raise IntegrityError(
                    f"the database {self.shown} is damaged: {text}",
                    fix="restore it from a backup, or move it away and start a new workspace",
                ) from error
            raise StorageError(f"the database {self.shown} failed: {text}", fix=self._fix(text)) from error

    def _fix(self, text: str) -> str | None:
        if "disk is full" in text or "No space left" in text:
            return "free some disk space"
        if "locked" in text:
            return "another process has held the write lock for a minute; is it stuck?"
        if "readonly" in text or "unable to open" in text:
            return "make the workspace writable, or choose another one with HEARTH_HOME"
        if "connect" in text or "resolve" in text:
            return "check HEARTH_DATABASE_URL and that the server is running"
        return None

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def parse_url(url: str | URL) -> URL:
    """Check a database URL; ``postgres://`` and ``postgresql://`` mean the psycopg driver."""
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError as error:
        shown = "(not shown, it may hold a password)" if "@" in str(url) else repr(str(url))
        raise ConfigError(f"database_url {shown} is not a URL", fix=f"write {_ALLOWED}") from error
    backend = parsed.get_backend_name()
    if backend in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed
    shown = parsed.render_as_string(hide_password=True)
    raise ConfigError(f"database_url {shown} is not supported", fix=f"write {_ALLOWED}")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun by _begin_sqlite; the driver's own rules begin them too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=FULL")  # what was committed survives a power cut
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("hearth_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _forget_connections_in_children(engine: sa.Engine) -> None:
    """A forked child must not use its parent's connections; it opens its own."""
    reference = weakref.ref(engine)

    def forget() -> None:
        engine = reference()
        if engine is not None:
            engine.dispose(close=False)

    os.register_at_fork(after_in_child=forget)
