from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import alembic.autogenerate
import alembic.migration
import alembic.script
import pytest
import sqlalchemy as sa

from hearth.errors import ConfigError, ConflictError, IntegrityError, StorageError
from hearth.workspace import Workspace
from hearth.workspace import schema as tables
from hearth.workspace.database import Database, parse_url


def test_the_migrations_make_exactly_the_tables_of_the_code(workspace):
    with workspace.database.read() as connection:
        context = alembic.migration.MigrationContext.configure(connection)
        assert alembic.autogenerate.compare_metadata(context, tables.metadata) == []


def test_the_known_revisions_are_those_of_the_migration_files():
    config = alembic.config.Config()
    config.set_main_option("script_location", "hearth.workspace:migrations")
    script = alembic.script.ScriptDirectory.from_config(config)
    assert [revision.revision for revision in script.walk_revisions()][::-1] == list(tables.REVISIONS)
    assert script.get_current_head() == tables.HEAD


def test_a_current_database_opens_without_alembic(open_workspace, tmp_path, database_url):
    open_workspace()
    code = (
        "import sys; from hearth.workspace import Workspace\n"
        f"Workspace.open({str(tmp_path / 'workspace')!r}, database_url={database_url!r}).close()\n"
        "print('alembic' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_several_processes_may_open_a_new_workspace_at_once(child, outcome):
    processes = [child("open_only") for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert outcome(process)


def test_a_newer_schema_is_refused(open_workspace):
    database = open_workspace().database
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConflictError, match="schema 9999, which is newer than this Hearth") as caught:
        open_workspace()
    assert "upgrade Hearth" in (caught.value.fix or "")


def test_a_failed_block_writes_nothing(workspace):
    def fail():
        with workspace.database.write() as connection:
            connection.execute(tables.pins.insert().values(digest="x", created_at=tables.utcnow()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with workspace.database.read() as connection:
        assert connection.execute(sa.select(tables.pins)).all() == []


def test_a_read_block_keeps_nothing(workspace):
    with workspace.database.read() as connection:
        connection.execute(tables.pins.insert().values(digest="x", created_at=tables.utcnow()))
    with workspace.database.read() as connection:
        assert connection.execute(sa.select(tables.pins)).all() == []


def test_times_keep_their_instant_and_zone(workspace):
    now = tables.utcnow()
    with workspace.database.write() as connection:
        connection.execute(tables.pins.insert().values(digest="x", created_at=now))
    with workspace.database.read() as connection:
        found = connection.scalar(sa.select(tables.pins.c.created_at))
    assert found == now
    assert found.tzinfo is not None


def test_a_forked_child_uses_connections_of_its_own(workspace):
    with workspace.database.read() as connection:
        connection.execute(sa.select(tables.pins))
    pid = os.fork()
    if pid == 0:  # the child must leave without running pytest's clean-up
        try:
            with workspace.database.write() as connection:
                connection.execute(tables.pins.insert().values(digest="child", created_at=tables.utcnow()))
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must see a failure
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    with workspace.database.read() as connection:
        assert connection.scalar(sa.select(tables.pins.c.digest)) == "child"


def test_sqlite_runs_with_wal_foreign_keys_and_a_busy_timeout(tmp_path):
    with Workspace.open(tmp_path / "w", environ={}) as workspace, workspace.database.read() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }
    assert pragma == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 60_000}


def test_a_damaged_sqlite_file_is_named(tmp_path):
    Workspace.open(tmp_path / "w", environ={}).close()
    path = tmp_path / "w" / "hearth.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(IntegrityError, match=r"hearth\.db is damaged: file is not a database"):
        Workspace.open(tmp_path / "w", environ={})


def test_a_locked_database_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("hearth.workspace.database.BUSY_TIMEOUT_MS", 50)
    with Workspace.open(tmp_path / "w", environ={}) as workspace:
        blocker = sqlite3.connect(tmp_path / "w" / "hearth.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="database is locked") as caught:
            workspace.keys.create("x")
        assert "another process" in (caught.value.fix or "")
        blocker.close()


def test_an_unusable_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot create the workspace"):
        Workspace.open(tmp_path / "file" / "w", environ={})


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite://", "sqlite:///:memory:", "nonsense"])
def test_other_databases_are_refused(url):
    with pytest.raises(ConfigError, match="database_url"):
        parse_url(url)


def test_a_malformed_url_shows_no_password():
    with pytest.raises(ConfigError, match="is not a URL") as caught:
        parse_url("postgresql//me:hunter2@host/d")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgres_means_psycopg(scheme):
    assert parse_url(f"{scheme}://u:p@h/d").drivername == "postgresql+psycopg"


def test_an_unreachable_server_is_reported_without_the_password(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="connection") as caught:
        Workspace.open(tmp_path / "w", database_url=f"postgresql://me:hunter2@/d?host={tmp_path}", environ={})
    assert "hunter2" not in str(caught.value)
    assert "HEARTH_DATABASE_URL" in (caught.value.fix or "")


def test_constraint_violations_reach_the_caller(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'hearth.db'}")
    database.migrate()
    row = {"digest": "x", "created_at": tables.utcnow()}
    with database.write() as connection:
        connection.execute(tables.pins.insert().values(row))
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(tables.pins.insert().values(row))
    database.close()


def test_json_text_is_strict_json():
    assert (
        tables.dump_json({"b": float("nan"), "a": [float("inf"), Path("x")]})
        == '{"a": [null, "x"], "b": null}'
    )
