"""From what the user asks to serve to directories that may be served: found, whole, and through the gate.

The promise of a version is that it answers as it did in training, so a version of the registry is served only
if its bytes match their hashes and its newest parity report, made here in the dtype that will be served, has
passed. A plain directory makes no such promise; it is served with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hearth.config import ServedModel
from hearth.errors import ConfigError, GateError, ModelError, NotFoundError
from hearth.workspace import ModelVersion, Workspace

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
    problem, fix = _gate(workspace, version, entry)
    if problem is not None:
        if not allow_ungated:
            raise GateError(
                f"{version.ref} is not served: {problem}",
                fix=f"run `{fix}`, or serve it anyway with --allow-ungated",
            )
        note(f"WARNING: serving {version.ref} although {problem}: its answers may differ from training")
    name = entry.name or version.name
    names = [version.name, version.ref, *(f"{version.name}@{alias}" for alias in version.aliases)]
    if version.version == max(known.version for known in registry.list(version.name)):
        names.append(f"{version.name}@latest")
    if entry.name is not None:
        names = [each for each in names if each != version.name]  # leaves the plain name to another version
    aliases = tuple(each for each in dict.fromkeys(names) if each not in (name, version.ref))
    return Resolved(name, version.ref, aliases, version.path, entry)


def _gate(workspace: Workspace, version: ModelVersion, entry: ServedModel) -> tuple[str | None, str]:
    """Why the gate is shut to serving as ``entry`` says (None: it is open), and the command to run.

    A verdict holds for the dtype and the compression that were tested; the newest one for those that will be
    served counts.
    """
    dtypes: set[str | None] = {entry.dtype}
    fix = f"hearth parity {version.ref}"
    if entry.dtype != "auto":
        fix += f" --dtype {entry.dtype}"
    else:
        dtypes = {version.facts.get("dtype")}
        if dtypes == {"float16"}:
            dtypes.add("float32")  # what the engine makes of stored float16 where it runs on a CPU
    compression = {"weights": entry.weights, "kv_dtype": entry.kv_dtype}
    fix += "".join(
        f" --{key.replace('_', '-')} {value}" for key, value in compression.items() if value != "auto"
    )
    reports = [report for report in workspace.registry.reports(version.ref, "parity") if not report.imported]
    if not reports:
        return "it has no parity report made in this workspace", fix
    reports = [
        report
        for report in reports
        if all(report.report.get(key, "auto") == value for key, value in compression.items())
    ]
    if not reports:
        wanted = " and ".join(f"{key} {value}" for key, value in compression.items())
        return f"it has no parity report for {wanted}", fix
    # A config.json that names no dtype leaves it to the weights: then the newest verdict has to do.
    fitting = [report for report in reports if dtypes == {None} or report.report.get("dtype") in dtypes]
    if not fitting:
        made, wanted = reports[-1].report.get("dtype"), " or ".join(sorted(map(str, dtypes)))
        return f"its parity report was made in {made}, and it would be served in {wanted}", fix
    if not fitting[-1].passed:
        return f"it failed its last parity gate ({fitting[-1].created_at:%F %T})", fix
    return None, fix
