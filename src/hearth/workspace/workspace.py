"""A workspace: where Hearth keeps what it made. One folder (or a Postgres and a bucket), one object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hearth.errors import StorageError
from hearth.workspace.artifacts import ArtifactStore
from hearth.workspace.database import Database
from hearth.workspace.keys import KeyStore
from hearth.workspace.lineage import Lineage
from hearth.workspace.registry import Registry
from hearth.workspace.runs import RunStore
from hearth.workspace.schema import pins, utcnow

DEFAULT_ROOT = ".hearth"
DATABASE_FILE = "hearth.db"


class Workspace:
    """State of one project; safe to open in several processes at once.

    ROOT/hearth.db        runs, metrics, registry, lineage, keys   ($HEARTH_DATABASE_URL: Postgres)
    ROOT/artifacts/       content-addressed objects                ($HEARTH_ARTIFACTS_URL: any fsspec URL)
    ROOT/runs/ID/         what a run writes
    ROOT/models/NAME/N/   a version's directory, made from the artifacts
    """

    def __init__(self, root: Path, database: Database, artifacts_url: str) -> None:
        self.root = root
        self.database = database
        self.artifacts = ArtifactStore(artifacts_url, on_put=self._pin)
        self.runs = RunStore(database, root / "runs")
        self.lineage = Lineage(database)
        self.registry = Registry(database, self.artifacts, self.lineage, root / "models")
        self.keys = KeyStore(database)

    @classmethod
    def open(
        cls,
        root: Path | str | None = None,
        *,
        database_url: str | None = None,
        artifacts_url: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Workspace:
        """Open a workspace; create it, or bring its schema up to date, where needed.

        Defaults: ``$HEARTH_HOME`` or ``./.hearth``; ``$HEARTH_DATABASE_URL`` or SQLite inside;
        ``$HEARTH_ARTIFACTS_URL`` or a folder inside. Raises StorageError when it cannot be reached or
        written, ConflictError when a newer Hearth wrote it.
        """
        environ = os.environ if environ is None else environ
        root = workspace_root(root, environ)
        database_url = database_url or environ.get("HEARTH_DATABASE_URL") or None
        artifacts_url = artifacts_url or environ.get("HEARTH_ARTIFACTS_URL") or str(root / "artifacts")
        _create_root(root)
        database = Database(database_url or f"sqlite:///{root / DATABASE_FILE}")
        try:
            database.migrate()
        except BaseException:
            database.close()
            raise
        return cls(root, database, artifacts_url)

    @staticmethod
    def exists(root: Path | str | None = None, *, environ: Mapping[str, str] | None = None) -> bool:
        """Whether there is anything to open: a command that only reads need not create a workspace."""
        environ = os.environ if environ is None else environ
        if environ.get("HEARTH_DATABASE_URL"):
            return True
        return (workspace_root(root, environ) / DATABASE_FILE).exists()

    def _pin(self, digest: str) -> None:
        with self.database.write() as connection:
            row = {"digest": digest, "created_at": utcnow()}
            connection.execute(self.database.insert_or_ignore(pins), row)

    def close(self) -> None:
        """Write what waits in memory and close the database."""
        self.runs.close()
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r}, {self.database.shown})"


def workspace_root(root: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The folder of the workspace, absolute: ``root``, else ``$HEARTH_HOME``, else ``./.hearth``."""
    environ = os.environ if environ is None else environ
    chosen = root or environ.get("HEARTH_HOME") or DEFAULT_ROOT
    return Path(chosen).expanduser().absolute()


def _create_root(root: Path) -> None:
    if root.is_dir():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Weights and databases do not belong in the repository that the workspace may lie in.
        (root / ".gitignore").write_text("*\n")
    except OSError as error:
        raise StorageError(
            f"cannot create the workspace {root}: {error.strerror}",
            fix="choose a writable folder with HEARTH_HOME",
        ) from error
