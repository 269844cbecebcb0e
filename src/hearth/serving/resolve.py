"""From what the user asks to serve to directories that may be served: found, whole, and through the gate.

The promise of a version is that it answers as it did in training, so a version of the registry is served only
if its bytes match their hashes and its newest parity report, made here, has passed. A plain directory makes
no such promise; it is served with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hearth.config import ServedModel
from hearth.errors import ConfigError, GateError, ModelError, NotFoundError
from hearth.workspace import Workspace

Note = Callable[[str], None]


@dataclass(frozen=True)
class Resolved:
    """A model that may be served. ``version`` goes into every answer; ``aliases`` are further names."""

    name: str
    version: str
    aliases: tuple[str, ...]
    path: Path
    entry: ServedModel


def resolve_models(
    entries: Sequence[ServedModel], *, allow_ungated: bool, note: Note, workspace: Workspace | None = None
) -> list[Resolved]:
    """Resolve every entry; raises NotFoundError, ModelError, IntegrityError, GateError or ConfigError.

    Without ``workspace`` the default one is opened, if it exists and a reference needs it.
    """
    resolved = [_resolve(entry, allow_ungated, note, workspace) for entry in entries]
    taken: dict[str, str] = {}
    for model in resolved:
        for name in {model.name, model.version, *model.aliases}:
            if name in taken:
                raise ConfigError(
                    f"both {taken[name]} and {model.entry.model} would answer to {name!r}",
                    fix="give one of them a name of its own: NAME=MODEL, or `name` in the file",
                )
            taken[name] = model.entry.model
    return resolved


def _resolve(entry: ServedModel, allow_ungated: bool, note: Note, workspace: Workspace | None) -> Resolved:
    path = Path(entry.model).expanduser()
    if entry.model.startswith("hf:"):
        from hearth.models import resolve_reference  # loads torch, which this process can do without

        return _plain(entry, resolve_reference(entry.model), note)
    is_plain = "/" in entry.model or (path / "config.json").is_file()
    if is_plain:
        _check_directory(path)
        return _plain(entry, path, note)
    try:
        if workspace is not None:
            return _version(entry, workspace, allow_ungated, note)
        if not Workspace.exists():
            raise NotFoundError(
                f"no model {entry.model!r}: there is no workspace here, and no such directory",
                fix="give a model directory, or set HEARTH_HOME to your workspace",
            )
        with Workspace.open() as opened:
            return _version(entry, opened, allow_ungated, note)
    except NotFoundError:
        if path.exists():
            _check_directory(path)  # says what is wrong with what lies here under that name
        raise


def _plain(entry: ServedModel, path: Path, note: Note) -> Resolved:
    name = entry.name or (entry.model[3:] if entry.model.startswith("hf:") else path.resolve().name)
    note(f"note: {entry.model} is not a version of the registry: no parity gate vouches for its answers")
    return Resolved(name, f"{name}@unregistered", (), path, entry)


def _check_directory(path: Path) -> None:
    """A first look, without torch; the worker looks at every file when it loads them."""
    if not path.is_dir():
        raise ModelError(
            f"there is no directory {path}", fix="give a model directory, or a name of the registry"
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds no model: it has no config.json", fix="give a Hugging Face model directory"
        )


def _version(entry: ServedModel, workspace: Workspace, allow_ungated: bool, note: Note) -> Resolved:
    registry = workspace.registry
    version = registry.verify(entry.model)
    problem, gated_dtype = _gate(workspace, version.ref)
    if problem is not None:
        if not allow_ungated:
            raise GateError(
                f"{version.ref} is not served: {problem}",
                fix=f"run `hearth parity {version.ref}`, or serve it anyway with --allow-ungated",
            )
        note(f"WARNING: serving {version.ref} although {problem}: its answers may differ from training")
    asked = entry.dtype
    if problem is None and asked not in (None, "auto", gated_dtype):
        note(f"WARNING: {version.ref} passed the gate in {gated_dtype}, and you serve it in {asked}")
    name = entry.name or version.name
    names = [version.name, version.ref, *(f"{version.name}@{alias}" for alias in version.aliases)]
    if version.version == max(known.version for known in registry.list(version.name)):
        names.append(f"{version.name}@latest")
    if entry.name is not None:
        names = [each for each in names if each != version.name]  # leaves the plain name to another version
    aliases = tuple(each for each in dict.fromkeys(names) if each not in (name, version.ref))
    return Resolved(name, version.ref, aliases, version.path, entry)


def _gate(workspace: Workspace, ref: str) -> tuple[str | None, str | None]:
    """Why the gate is shut (None: it is open), and the dtype of the report that opened it."""
    reports = [report for report in workspace.registry.reports(ref, "parity") if not report.imported]
    if not reports:
        return "it has no parity report made in this workspace", None
    if not reports[-1].passed:
        return f"it failed its last parity gate ({reports[-1].created_at:%F %T})", None
    return None, reports[-1].report.get("dtype")
