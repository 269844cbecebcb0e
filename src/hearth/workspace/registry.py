"""The model registry: immutable versions, movable aliases, reports, and who changed what when.

The database and the artifact store are the truth. The directory ``models/NAME/VERSION`` is made from them
(by hard links where the file system allows) and is made again when it is missing.
"""

from __future__ import annotations

import builtins
import shutil
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hearth.errors import ConflictError, GateError, InputError, IntegrityError, NotFoundError
from hearth.workspace.artifacts import (
    ArtifactStore,
    TreeFile,
    building_directory,
    hash_file,
    walk_files,
    write_atomically,
)
from hearth.workspace.database import Database
from hearth.workspace.lineage import Lineage
from hearth.workspace.locks import file_lock
from hearth.workspace.modelcard import CARD, card, declared_licence, model_facts, read_card
from hearth.workspace.names import check_alias, check_model_name, default_actor, split_reference
from hearth.workspace.records import (
    HistoryEntry,
    ModelVersion,
    Report,
    aliases_of,
    drop_alias,
    is_version,
    remember,
    reports_of,
    select_version,
    set_alias,
    shut_gate,
)
from hearth.workspace.schema import dump_json, history, models, pins, reports, utcnow, versions

REPORT_KINDS = ("parity", "evaluation")


class Registry:
    """The models of a workspace."""

    def __init__(self, database: Database, artifacts: ArtifactStore, lineage: Lineage, root: Path) -> None:
        self._database = database
        self._artifacts = artifacts
        self._lineage = lineage
        self._root = root  # models/
        self._lock = root / ".lock"

    # ── creating ─────────────────────────────────────────────────────────────────────────────────────────

    def create_version(
        self,
        name: str,
        source_dir: Path | str,
        *,
        run_id: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        recipe_hash: str | None = None,
        dataset_fingerprint: str | None = None,
        parent: str | None = None,
        licence: str | None = None,
        tags: Mapping[str, str] | None = None,
        actor: str | None = None,
    ) -> ModelVersion:
        """Store a model directory as the next version of ``name``, with its lineage.

        Content that ``name`` has already is found, not stored again: the existing version is returned.
        A number is never given twice, also after a deletion. Raises InputError for a bad name, ModelError
        for a directory that is no model, StorageError when the disk is full (nothing is kept then).
        """
        row = {
            "run_id": run_id,
            "recipe": None if recipe is None else dict(recipe),
            "recipe_hash": recipe_hash,
            "dataset_fingerprint": dataset_fingerprint,
            "parent": parent,
            "licence": licence,
            "tags": {key: str(value) for key, value in (tags or {}).items()},
        }
        return self._create(name, Path(source_dir), row, actor or default_actor(), event="created")

    def _create(
        self, name: str, source: Path, row: dict[str, Any], actor: str, *, event: str
    ) -> ModelVersion:
        check_model_name(name)
        if not source.is_dir():
            raise NotFoundError(f"no folder {source}", fix="give the folder of a model")
        facts = model_facts(source)
        row = {**row, "facts": facts, "licence": row["licence"] or declared_licence(source)}
        # Deletion takes this lock alone, so that no object vanishes between storing and recording it.
        with file_lock(self._lock, shared=True):
            digest = self._artifacts.add_tree(source, exclude={CARD})
            size = sum(file.size for file in self._artifacts.tree(digest))
            number = self._insert(name, {**row, "digest": digest, "size": size}, actor, event)
        version = self.get(f"{name}@{number}")
        self._record_lineage(version, row["run_id"], row["dataset_fingerprint"])
        return version

    def _insert(self, name: str, row: dict[str, Any], actor: str, event: str) -> int:
        """Give the content a number, or find the one that it has."""
        now = utcnow()
        with self._database.write() as connection:
            new_model = {"name": name, "last_version": 0, "created_at": now}
            connection.execute(self._database.insert_or_ignore(models), new_model)
            # Creators of one name queue here: SQLite locks the file, Postgres this row.
            last = connection.scalar(
                sa.select(models.c.last_version).where(models.c.name == name).with_for_update()
            )
            assert last is not None
            existing: int | None = connection.scalar(
                sa.select(versions.c.version).where(
                    versions.c.name == name,
                    versions.c.digest == row["digest"],
                    versions.c.status == "active",
                )
            )
            if existing is not None:
                return existing
            number = int(last) + 1
            connection.execute(models.update().where(models.c.name == name).values(last_version=number))
            values = {"name": name, "version": number, "status": "active", "created_at": now}
            connection.execute(versions.insert().values(**row, **values, created_by=actor))
            remember(connection, name, actor, event, version=number, to_version=number)
            return number

    def _record_lineage(
        self, version: ModelVersion, run_id: str | None, dataset_fingerprint: str | None
    ) -> None:
        model = f"model:{version.ref}"
        found = []
        if run_id is not None:
            found.append((f"run:{run_id}", model, "produced"))
        if dataset_fingerprint is not None:
            user = model if run_id is None else f"run:{run_id}"
            found.append((f"dataset:{dataset_fingerprint}", user, "trained"))
        if version.parent is not None and version.parent != version.ref:
            found.append((f"model:{version.parent}", model, "derived"))
        self._lineage.add_many(found)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def get(self, ref: str) -> ModelVersion:
        """The version that ``name``, ``name@3``, ``name@alias`` or ``name@latest`` means; its path exists.

        Raises NotFoundError, which says what there is instead.
        """
        version = self.find(ref)
        if not (version.path / CARD).is_file():
            self._materialize(version)
        return version

    def find(self, ref: str) -> ModelVersion:
        """As ``get``, from the database alone: the directory may be missing."""
        name, selector = split_reference(ref)
        with self._database.read() as connection:
            number = select_version(connection, name, selector)
            return self._version(connection, name, number)

    def list(self, name: str | None = None) -> list[ModelVersion]:
        """All live versions (of one model), by name and number."""
        query = sa.select(versions).where(versions.c.status == "active")
        query = query.order_by(versions.c.name, versions.c.version)
        if name is not None:
            query = query.where(versions.c.name == check_model_name(name))
        with self._database.read() as connection:
            named = aliases_of(connection, name)
            return [self._from_row(row, named) for row in connection.execute(query)]

    def resolve(self, ref: str | Path) -> Path:
        """The directory that ``ref`` means: a folder with a config.json itself, else a version's path."""
        path = Path(ref)
        if (path / "config.json").is_file():
            return path
        return self.get(str(ref)).path

    def history(self, name: str) -> builtins.list[HistoryEntry]:
        """Everything that happened to a model, oldest first. Raises NotFoundError for an unknown name."""
        name, _ = split_reference(name)
        query = sa.select(history).where(history.c.name == name).order_by(history.c.id)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise NotFoundError(f"no model {name!r}", fix="`hearth models list` shows them")
        return [
            HistoryEntry(**{key: value for key, value in row._asdict().items() if key != "id"})
            for row in rows
        ]

    def files(self, ref: str) -> builtins.list[TreeFile]:
        """The files of a version with their hashes (hearth.json is not one of them)."""
        return self._artifacts.tree(self.find(ref).digest)

    # ── reports ──────────────────────────────────────────────────────────────────────────────────────────

    def attach_report(
        self, ref: str, kind: str, report: Mapping[str, Any], *, actor: str | None = None
    ) -> Report:
        """Keep evidence with a version. A parity report needs ``passed``, true or false."""
        return self._attach(self.get(ref), kind, report, actor or default_actor(), imported=False)

    def _attach(
        self, version: ModelVersion, kind: str, report: Mapping[str, Any], actor: str, *, imported: bool
    ) -> Report:
        if kind not in REPORT_KINDS:
            raise InputError(f"no report kind {kind!r}", fix=f"use one of {', '.join(REPORT_KINDS)}")
        passed = report.get("passed")
        if not isinstance(passed, bool) and (kind == "parity" or passed is not None):
            raise InputError(f"a {kind} report has passed = {passed!r}", fix="set it to true or false")
        entry = Report(kind, passed, imported, dict(report), utcnow(), actor)
        with self._database.write() as connection:
            connection.execute(
                reports.insert().values(name=version.name, version=version.version, **vars(entry))
            )
            detail = {"kind": kind, "passed": passed, "imported": imported}
            remember(connection, version.name, actor, "report", version=version.version, detail=detail)
        self._write_card(version.name, version.version)
        return entry

    def reports(self, ref: str, kind: str | None = None) -> builtins.list[Report]:
        """The evidence about a version, oldest first."""
        version = self.find(ref)
        with self._database.read() as connection:
            return reports_of(connection, version.name, version.version, kind)

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────

    def promote(
        self,
        ref: str,
        alias: str,
        *,
        actor: str | None = None,
        force: bool = False,
        reason: str | None = None,
    ) -> ModelVersion:
        """Point ``alias`` at a version. Its newest parity report must have passed, or GateError.

        ``force`` overrides the gate; it needs a reason, and both are kept in the history.
        """
        check_alias(alias)
        if force and not (reason or "").strip():
            raise InputError("--force needs a reason", fix="say why with --reason; it is kept in the history")
        version = self.get(ref)
        actor = actor or default_actor()
        with self._database.write() as connection:
            self._locked(connection, version)
            problem = shut_gate(reports_of(connection, version.name, version.version, "parity"), version.ref)
            if problem is not None and not force:
                raise GateError(
                    problem,
                    fix=f"run `hearth parity {version.ref}`, or promote with --force --reason WHY",
                )
            before = aliases_of(connection, version.name).get(version.name, {}).get(alias)
            set_alias(connection, version, alias, actor)
            remember(
                connection,
                version.name,
                actor,
                "alias",
                version=version.version,
                alias=alias,
                from_version=before,
                to_version=version.version,
                forced=problem is not None,
                reason=reason,
            )
        for number in {version.version, before} - {None}:
            self._write_card(version.name, int(number or 0))
        return self.get(version.ref)

    set_alias = promote

    def remove_alias(
        self, name: str, alias: str, *, actor: str | None = None, reason: str | None = None
    ) -> None:
        """Take an alias away; the version stays. Raises NotFoundError when there is no such alias."""
        with self._database.write() as connection:
            before = aliases_of(connection, name).get(check_model_name(name), {}).get(alias)
            if before is None:
                raise NotFoundError(f"model {name} has no alias {alias!r}")
            drop_alias(connection, name, alias, before, actor or default_actor(), reason, forced=False)
        self._write_card(name, before)

    def tag(
        self,
        ref: str,
        tags: Mapping[str, str | None],
        *,
        actor: str | None = None,
    ) -> ModelVersion:
        """Set tags of a version; a value of None removes the tag."""
        version = self.get(ref)
        with self._database.write() as connection:
            current = self._locked(connection, version).tags
            merged = {k: str(v) for k, v in {**current, **tags}.items() if v is not None}
            connection.execute(versions.update().where(is_version(version)).values(tags=merged))
            detail = {"tags": dict(tags)}
            remember(
                connection,
                version.name,
                actor or default_actor(),
                "tagged",
                version=version.version,
                detail=detail,
            )
        self._write_card(version.name, version.version)
        return self.get(version.ref)

    def delete(
        self, ref: str, actor: str | None = None, *, force: bool = False, reason: str | None = None
    ) -> None:
        """Delete a version: its directory and every stored byte that nothing else needs. The record stays.

        Raises ConflictError while an alias points to it, unless ``force``, which takes the aliases away.
        """
        version = self.find(ref)
        actor = actor or default_actor()
        with file_lock(self._lock):
            with self._database.write() as connection:
                version = self._locked(connection, version)
                if version.aliases and not force:
                    raise ConflictError(
                        f"{version.ref} is {' and '.join(version.aliases)}",
                        fix="move the alias to another version first, or delete with --force",
                    )
                for alias in version.aliases:
                    drop_alias(connection, version.name, alias, version.version, actor, reason, forced=True)
                connection.execute(versions.update().where(is_version(version)).values(status="deleted"))
                remember(
                    connection,
                    version.name,
                    actor,
                    "deleted",
                    version=version.version,
                    from_version=version.version,
                    forced=force,
                    reason=reason,
                )
            shutil.rmtree(version.path, ignore_errors=True)
            self._collect(version.digest)

    def _collect(self, tree: str) -> None:
        """Remove the objects of a deleted tree that no live version and no pin needs."""
        with self._database.read() as connection:
            live = set(
                connection.scalars(
                    sa.select(versions.c.digest).where(versions.c.status == "active").distinct()
                )
            )
            pinned = set(connection.scalars(sa.select(pins.c.digest)))
        if tree in live | pinned:
            return
        needed = set(live | pinned)
        for digest in live | pinned:
            try:
                needed.update(f"sha256:{file.sha256}" for file in self._artifacts.tree(digest))
            except InputError:
                continue  # a pinned file, or an object that is gone
        try:
            files = self._artifacts.tree(tree)
        except (IntegrityError, NotFoundError):
            return  # the list of its files is lost: leave the objects alone
        for digest in {tree, *(f"sha256:{file.sha256}" for file in files)} - needed:
            self._artifacts.remove(digest)

    # ── checking and moving ──────────────────────────────────────────────────────────────────────────────

    def verify(self, ref: str) -> ModelVersion:
        """Hash every byte of a version, in its directory and in the store. Raises IntegrityError."""
        version = self.get(ref)
        files = {file.path: file for file in self._artifacts.tree(version.digest)}
        present = {name: path for name, path in walk_files(version.path) if name != CARD}
        for name in sorted(files.keys() | present.keys()):
            if name not in present:
                self._broken(version, f"{version.path / name} is missing")
            if name not in files:
                self._broken(version, f"{version.path / name} does not belong to it")
            found, _ = hash_file(present[name])
            if found != files[name].sha256:
                self._broken(
                    version, f"{present[name]} has the hash {found}, recorded is {files[name].sha256}"
                )
            if not self._artifacts.holds(files[name].sha256, present[name]):
                self._artifacts.open(f"sha256:{files[name].sha256}").close()
        return version

    @staticmethod
    def _broken(version: ModelVersion, what: str) -> None:
        raise IntegrityError(
            f"{version.ref} is damaged: {what}",
            fix=f"if the store is sound, delete the folder {version.path} and Hearth makes it again",
        )

    def export(self, ref: str, directory: Path | str) -> Path:
        """Write a version with its hearth.json as an ordinary directory of copies, verified."""
        version = self.get(ref)
        directory = Path(directory)
        with building_directory(directory) as building:
            for file in self._artifacts.tree(version.digest):
                target = building / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._artifacts.open(f"sha256:{file.sha256}") as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 4 << 20)
            write_atomically(building / CARD, self._card_text(version.name, version.version))
        return directory

    def import_(
        self,
        directory: Path | str,
        name: str | None = None,
        *,
        actor: str | None = None,
        tags: Mapping[str, str] | None = None,
        origin: str | None = None,
    ) -> ModelVersion:
        """Create a version from any Hugging Face directory.

        With a hearth.json (an exported version) its files are verified, and recipe, lineage, tags and
        reports come along; ``name`` defaults to the exported one. Imported parity reports are kept, but
        do not open the gate here: they speak of another machine. ``origin`` says in the lineage where it
        came from; default: the folder's name.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise NotFoundError(f"no folder {directory}", fix="give the folder of a model")
        found = read_card(directory) or {}
        name = name or found.get("name")
        if name is None:
            raise InputError(f"{directory} has no {CARD} that names it", fix="name the model with --name")
        _check_imported_files(directory, found)
        row = {key: found.get(key) for key in ("recipe", "recipe_hash", "dataset_fingerprint", "licence")}
        row.update(run_id=found.get("run"), parent=found.get("parent"))
        row["tags"] = {**found.get("tags", {}), **{k: str(v) for k, v in (tags or {}).items()}}
        actor = actor or default_actor()
        version = self._create(name, directory, row, actor, event="imported")
        source = urllib.parse.quote(origin or directory.absolute().name, safe="/:@.+")
        self._lineage.add(f"source:{source}", f"model:{version.ref}", "imported")
        known = [dump_json(report.report) for report in self.reports(version.ref)]
        for report in found.get("reports", ()):
            if dump_json(report["report"]) not in known:
                self._attach(version, report["kind"], report["report"], actor, imported=True)
        return version

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, name: str, number: int) -> Path:
        return self._root / name / str(number)

    def _materialize(self, version: ModelVersion) -> None:
        """Make the version's directory; several processes may find it missing at once."""
        with file_lock(version.path.with_name(f".{version.version}.lock")):
            if not (version.path / CARD).is_file():
                if version.path.exists():
                    shutil.rmtree(version.path)
                text = self._card_text(version.name, version.version)
                staged = version.path.with_name(f".{version.version}.staged")
                shutil.rmtree(staged, ignore_errors=True)
                self._artifacts.materialize(version.digest, staged)
                write_atomically(staged / CARD, text)
                staged.rename(version.path)

    def _write_card(self, name: str, number: int) -> None:
        """Bring hearth.json up to date; the lock keeps an older state from overwriting a newer one."""
        path = self._path(name, number)
        with file_lock(path.with_name(f".{number}.lock")):
            if path.is_dir():
                write_atomically(path / CARD, self._card_text(name, number))

    def _card_text(self, name: str, number: int) -> str:
        with self._database.read() as connection:
            version = self._version(connection, name, number)
            evidence = reports_of(connection, name, number, None)
        files = self._artifacts.tree(version.digest)
        return dump_json(card(version, files, evidence), indent=2) + "\n"

    def _version(self, connection: sa.Connection, name: str, number: int) -> ModelVersion:
        row = connection.execute(
            sa.select(versions).where(
                versions.c.name == name, versions.c.version == number, versions.c.status == "active"
            )
        ).first()
        if row is None:
            raise NotFoundError(
                f"{name}@{number} was deleted", fix="`hearth models list` shows what there is"
            )
        return self._from_row(row, aliases_of(connection, name))

    def _locked(self, connection: sa.Connection, version: ModelVersion) -> ModelVersion:
        """The version as it is now; nobody else changes its model until the transaction ends."""
        connection.execute(sa.select(models.c.name).where(models.c.name == version.name).with_for_update())
        return self._version(connection, version.name, version.version)

    def _from_row(self, row: sa.Row[Any], named: Mapping[str, Mapping[str, int]]) -> ModelVersion:
        own = sorted(alias for alias, number in named.get(row.name, {}).items() if number == row.version)
        values = row._asdict()
        return ModelVersion(**values, aliases=tuple(own), path=self._path(row.name, row.version))


def _check_imported_files(directory: Path, origin: Mapping[str, Any]) -> None:
    """The files must be those that hearth.json lists, byte for byte."""
    if not origin:
        return
    present = dict(walk_files(directory, exclude={CARD}))
    for name in sorted(present.keys() | origin["files"].keys()):
        if name not in present:
            raise IntegrityError(f"{directory / CARD} lists {name}, which is missing")
        recorded = origin["files"].get(name)
        if recorded is None:
            raise IntegrityError(
                f"{directory / name} is not listed in {CARD}",
                fix=f"remove {CARD} to import the directory as a new model",
            )
        found, _ = hash_file(present[name])
        if found != recorded.get("sha256"):
            raise IntegrityError(
                f"{directory / name} has the hash {found}, {CARD} records {recorded.get('sha256')}",
                fix=f"copy it again, or remove {CARD} to import the directory as a new model",
            )


__all__ = ["HistoryEntry", "ModelVersion", "Registry", "Report"]
