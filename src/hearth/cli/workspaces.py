"""Opening the workspace for a verb, without creating one where a verb only reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hearth.errors import NotFoundError

if TYPE_CHECKING:
    from hearth.workspace import Workspace

_START = "`hearth demo` or `hearth train RECIPE` makes the first one; $HEARTH_HOME chooses another folder"


@contextmanager
def open_existing() -> Iterator[Workspace | None]:
    """The workspace, or None where there is none yet; a note on standard error says so."""
    from hearth.cli.output import note
    from hearth.workspace import Workspace
    from hearth.workspace.workspace import workspace_root

    if not Workspace.exists():
        note(f"nothing here yet: there is no workspace at {workspace_root()}\n  {_START}")
        yield None
        return
    with Workspace.open() as workspace:
        yield workspace


@contextmanager
def require_existing(what: str) -> Iterator[Workspace]:
    """The workspace that holds ``what``. Raises NotFoundError where there is none yet."""
    from hearth.workspace import Workspace
    from hearth.workspace.workspace import workspace_root

    if not Workspace.exists():
        raise NotFoundError(f"no {what}: there is no workspace at {workspace_root()} yet", fix=_START)
    with Workspace.open() as workspace:
        yield workspace


def human_size(num_bytes: int) -> str:
    """A number of bytes for people: 1.5 GiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def key_values(texts: tuple[str, ...]) -> dict[str, str]:
    """``("a=1", "b=x")`` as a dictionary. Raises InputError for anything else."""
    from hearth.errors import InputError

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{text!r} is not key=value", fix="write tags as language=en")
        found[key.strip()] = value.strip()
    return found
