"""What the registry keeps about models, and the queries that read and write it inside a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hearth.errors import NotFoundError
from hearth.workspace.names import LATEST
from hearth.workspace.schema import aliases, history, reports, utcnow, versions


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version. ``path`` is a Hugging Face directory with a hearth.json."""

    name: str
    version: int
    digest: str
    path: Path
    status: str
    size: int
    created_at: datetime
    created_by: str
    run_id: str | None = None
    recipe: dict[str, Any] | None = None
    recipe_hash: str | None = None
    dataset_fingerprint: str | None = None
    parent: str | None = None
    licence: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        values = {**vars(self), "ref": self.ref, "path": str(self.path), "aliases": list(self.aliases)}
        return {**values, "created_at": self.created_at.isoformat()}


@dataclass(frozen=True)
class Report:
    """Evidence about a version: of its parity gate (``passed`` says how it ended) or an evaluation.

    ``imported`` marks evidence that came with an imported directory; it does not open the gate.
    """

    kind: str
    passed: bool | None
    imported: bool
    report: dict[str, Any]
    created_at: datetime
    created_by: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in hearth.json."""
        return {
            "kind": self.kind,
            "passed": self.passed,
            "imported": self.imported,
            "created_at": self.created_at.isoformat(),
            "created_by": self.created_by,
            "report": self.report,
        }


@dataclass(frozen=True)
class HistoryEntry:
    """One change: ``event`` is created, imported, alias, alias-removed, tagged, report or deleted."""

    name: str
    at: datetime
    actor: str
    event: str
    version: int | None
    alias: str | None
    from_version: int | None
    to_version: int | None
    forced: bool
    reason: str | None
    detail: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return {**vars(self), "at": self.at.isoformat()}


def select_version(connection: sa.Connection, name: str, selector: str | None) -> int:
    """The number of the version that ``name@selector`` means."""
    live = list(
        connection.scalars(
            sa.select(versions.c.version)
            .where(versions.c.name == name, versions.c.status == "active")
            .order_by(versions.c.version)
        )
    )
    if not live:
        raise NotFoundError(f"no model {name!r} in the registry", fix="`hearth models list` shows them")
    if selector is None or selector == LATEST:
        return int(live[-1])
    if selector.isdigit():
        if int(selector) in live:
            return int(selector)
        numbers = ", ".join(str(number) for number in live)
        raise NotFoundError(f"model {name} has no version {selector}", fix=f"it has {numbers}")
    known = aliases_of(connection, name).get(name, {})
    if selector in known:
        return known[selector]
    shown = ", ".join(sorted(known)) or "none yet; `hearth models promote` sets one"
    raise NotFoundError(f"model {name} has no alias {selector!r}", fix=f"aliases: {shown}")


def aliases_of(connection: sa.Connection, name: str | None) -> dict[str, dict[str, int]]:
    """name -> alias -> version."""
    query = sa.select(aliases.c.name, aliases.c.alias, aliases.c.version)
    if name is not None:
        query = query.where(aliases.c.name == name)
    found: dict[str, dict[str, int]] = {}
    for owner, alias, number in connection.execute(query):
        found.setdefault(owner, {})[alias] = number
    return found


def set_alias(connection: sa.Connection, version: ModelVersion, alias: str, actor: str) -> None:
    connection.execute(aliases.delete().where(aliases.c.name == version.name, aliases.c.alias == alias))
    connection.execute(
        aliases.insert().values(
            name=version.name, alias=alias, version=version.version, updated_at=utcnow(), updated_by=actor
        )
    )


def drop_alias(
    connection: sa.Connection,
    name: str,
    alias: str,
    number: int,
    actor: str,
    reason: str | None,
    *,
    forced: bool,
) -> None:
    connection.execute(aliases.delete().where(aliases.c.name == name, aliases.c.alias == alias))
    remember(
        connection,
        name,
        actor,
        "alias-removed",
        version=number,
        alias=alias,
        from_version=number,
        forced=forced,
        reason=reason,
    )


def reports_of(connection: sa.Connection, name: str, number: int, kind: str | None) -> list[Report]:
    query = sa.select(reports).where(reports.c.name == name, reports.c.version == number)
    if kind is not None:
        query = query.where(reports.c.kind == kind)
    return [
        Report(row.kind, row.passed, row.imported, row.report, row.created_at, row.created_by)
        for row in connection.execute(query.order_by(reports.c.id))
    ]


def shut_gate(parity: list[Report], ref: str) -> str | None:
    """Why the parity gate is shut; None when it is open.

    The newest report made here counts; reports on a compressed form only if there are no others, because how
    well a version can be compressed says nothing about the version.
    """
    own = [report for report in parity if not report.imported]
    own = [report for report in own if not is_compressed(report.report)] or own
    if own:
        return None if own[-1].passed else f"{ref} failed its last parity gate ({own[-1].created_at:%F %T})"
    if parity:
        return f"{ref} has only an imported parity report, made on another machine"
    return f"{ref} has no passed parity report"


def is_compressed(parity: Mapping[str, Any]) -> bool:
    """Whether a parity report speaks of compressed weights or a compressed KV cache."""
    return any(parity.get(name, "auto") != "auto" for name in ("weights", "kv_dtype"))


def is_version(version: ModelVersion) -> sa.ColumnElement[bool]:
    return sa.and_(versions.c.name == version.name, versions.c.version == version.version)


def remember(connection: sa.Connection, name: str, actor: str, event: str, **values: Any) -> None:
    row = {"name": name, "at": utcnow(), "actor": actor, "event": event, "forced": False, **values}
    connection.execute(history.insert().values(row))
