"""Lineage: what was made from what. Edges run downstream: source → dataset → run → model → deployment."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from hearth.errors import InputError
from hearth.workspace.database import Database
from hearth.workspace.schema import edges, utcnow

_NODE = re.compile(r"[a-z][a-z0-9-]*:\S(?:[^\r\n\t]*\S)?")  # paths may hold spaces
_MAX_LENGTH = 512  # of the column; Postgres indexes no very long text


@dataclass
class LineageNode:
    """A node of a lineage tree; ``relation`` labels its edge to the node above it.

    A node that is reached twice (or a cycle) is expanded once; its other places are ``repeated``.
    """

    ref: str
    relation: str | None = None
    children: list[LineageNode] = field(default_factory=list)
    repeated: bool = False

    def refs(self) -> list[str]:
        """Every node of the tree once, in depth-first order."""
        seen: dict[str, None] = {}
        stack = [self]
        while stack:
            node = stack.pop()
            seen.setdefault(node.ref)
            stack.extend(reversed(node.children))
        return list(seen)

    def to_dict(self) -> dict[str, object]:
        """The tree as JSON-able dictionaries."""
        return {
            "ref": self.ref,
            "relation": self.relation,
            "repeated": self.repeated,
            "children": [child.to_dict() for child in self.children],
        }


class Lineage:
    """The edges of a workspace."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, src: str, dst: str, relation: str) -> None:
        """Record that ``dst`` was made from ``src``. Recording the same edge again changes nothing."""
        self.add_many([(src, dst, relation)])

    def add_many(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Record several (src, dst, relation) edges in one transaction."""
        now = utcnow()
        values = []
        for src, dst, relation in rows:
            src, dst = _node(src), _node(dst)
            if src == dst:
                raise InputError(f"{src} cannot be made from itself")
            values.append({"src": src, "dst": dst, "relation": relation, "created_at": now})
        if values:
            with self._database.write() as connection:
                connection.execute(self._database.insert_or_ignore(edges), values)

    def up(self, ref: str, *, max_depth: int = 100) -> LineageNode:
        """The tree of everything that ``ref`` was made from."""
        return self._tree(ref, edges.c.dst, edges.c.src, max_depth)

    def down(self, ref: str, *, max_depth: int = 100) -> LineageNode:
        """The tree of everything that was made from ``ref``."""
        return self._tree(ref, edges.c.src, edges.c.dst, max_depth)

    def exists(self, ref: str) -> bool:
        """Whether any edge touches the node."""
        return bool(self.find(ref, exact=True))

    def find(self, prefix: str, *, exact: bool = False, limit: int = 20) -> list[str]:
        """The nodes whose ``kind:id`` begins with ``prefix``."""
        prefix = _fitted(prefix) if exact else prefix
        found: set[str] = set()
        with self._database.read() as connection:
            for column in (edges.c.src, edges.c.dst):
                match = column == prefix if exact else column.startswith(prefix, autoescape=True)
                found.update(connection.scalars(sa.select(column).where(match).distinct().limit(limit)))
        return sorted(found)[:limit]

    def _tree(self, ref: str, here: sa.Column[str], there: sa.Column[str], max_depth: int) -> LineageNode:
        """Breadth first, one query a level; each node is expanded where it is first met."""
        ref = _fitted(ref)
        root = LineageNode(ref)
        expanded: set[str] = {ref}
        level = [root]
        with self._database.read() as connection:
            for _ in range(max_depth):
                if not level:
                    break
                neighbours = _neighbours(connection, [node.ref for node in level], here, there)
                following = []
                for node in level:
                    for target, relation in neighbours.get(node.ref, ()):
                        child = LineageNode(target, relation, repeated=target in expanded)
                        node.children.append(child)
                        if not child.repeated:
                            expanded.add(target)
                            following.append(child)
                level = following
        return root


def _node(ref: str) -> str:
    """Check a node before it is recorded."""
    if not _NODE.fullmatch(ref):
        raise InputError(f"{ref!r} is not a lineage node", fix="a node is kind:id, such as model:chat@3")
    return _fitted(ref)


def _fitted(ref: str) -> str:
    """A very long node (a path, most likely) by its beginning and the hash of the whole."""
    if len(ref) <= _MAX_LENGTH:
        return ref
    return f"{ref[: _MAX_LENGTH - 20]}…{hashlib.sha256(ref.encode()).hexdigest()[:16]}"


def _neighbours(
    connection: sa.Connection, refs: list[str], here: sa.Column[str], there: sa.Column[str]
) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for start in range(0, len(refs), 500):  # databases limit the number of bound values
        chosen = refs[start : start + 500]
        query = (
            sa.select(here, there, edges.c.relation).where(here.in_(chosen)).order_by(there, edges.c.relation)
        )
        for at, target, relation in connection.execute(query):
            found.setdefault(at, []).append((target, relation))
    return found
