"""`hearth models`: the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.cli.served_models import load, reload, unload
from hearth.cli.workspaces import human_size, key_values, open_existing, require_existing
from hearth.errors import HearthError, InputError

if TYPE_CHECKING:
    from hearth.workspace import ModelVersion, Workspace

_JSON = click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
_ACTOR = click.option("--actor", help="Who does this; default: $HEARTH_ACTOR or the user's name.")


@click.group()
def models() -> None:
    """List, show, promote, verify, import and export model versions; load them into a running server.

    REF is name (its newest version), name@3 or name@alias.
    """


for _command in (load, reload, unload):
    models.add_command(_command)


@models.command(name="list")
@click.argument("name", required=False)
@_JSON
def list_models(name: str | None, as_json: bool) -> None:
    """List the versions of all models, or of NAME."""
    with open_existing() as workspace:
        found = [] if workspace is None else workspace.registry.list(name)
        gates = [] if workspace is None else [_gate(workspace, version) for version in found]
    if as_json:
        rows = zip(found, gates, strict=True)
        print_json([{**_without_recipe(version), "parity": gate} for version, gate in rows])
        return
    if workspace is not None and not found:
        note(
            f"no model {name!r}"
            if name
            else "no models yet; `hearth train` or `hearth models import` adds one"
        )
    if found:
        print_table(
            ("version", "aliases", "parity", "architecture", "size", "run", "created"),
            (
                (
                    version.ref,
                    ", ".join(version.aliases),
                    gate,
                    version.facts.get("architecture"),
                    human_size(version.size),
                    version.run_id,
                    f"{version.created_at:%F %T}",
                )
                for version, gate in zip(found, gates, strict=True)
            ),
        )


@models.command()
@click.argument("ref")
@_JSON
def show(ref: str, as_json: bool) -> None:
    """Show the version REF: its content, origin, aliases and reports."""
    with require_existing(f"model {ref!r}") as workspace:
        version = workspace.registry.find(ref)
        reports = workspace.registry.reports(version.ref)
        files = workspace.registry.files(version.ref)
        gate = _gate(workspace, version)
    if as_json:
        listed = [vars(file) for file in files]
        print_json(
            {
                **version.to_dict(),
                "parity": gate,
                "files": listed,
                "reports": [report.to_dict() for report in reports],
            }
        )
        return
    for label, value in _facts(version, gate):
        click.echo(f"{label:<15}{value}")
    click.echo()
    print_table(("file", "size", "sha256"), ((f.path, human_size(f.size), f.sha256) for f in files))
    if reports:
        click.echo()
        print_table(
            ("report", "passed", "made", "by"),
            (
                (
                    r.kind + (" (imported)" if r.imported else ""),
                    r.passed,
                    f"{r.created_at:%F %T}",
                    r.created_by,
                )
                for r in reports
            ),
        )


@models.command()
@click.argument("ref")
@click.argument("alias")
@click.option(
    "--force", is_flag=True, help="Promote although the parity gate has not passed; needs --reason."
)
@click.option("--reason", help="Why; kept in the history.")
@_ACTOR
@_JSON
def promote(ref: str, alias: str, force: bool, reason: str | None, actor: str | None, as_json: bool) -> None:
    """Let ALIAS mean the version REF; refused until `hearth parity` has passed."""
    with require_existing(f"model {ref!r}") as workspace:
        version = workspace.registry.promote(ref, alias, actor=actor, force=force, reason=reason)
    _done(version, f"{version.name}@{alias} now means version {version.version}", as_json)


@models.command()
@click.argument("name")
@click.argument("alias")
@click.option("--reason", help="Why; kept in the history.")
@_ACTOR
def unalias(name: str, alias: str, reason: str | None, actor: str | None) -> None:
    """Take ALIAS of the model NAME away; the version stays."""
    with require_existing(f"model {name!r}") as workspace:
        workspace.registry.remove_alias(name, alias, actor=actor, reason=reason)
    click.echo(f"removed {name}@{alias}")


@models.command()
@click.argument("ref", required=False)
@click.option("--all", "everything", is_flag=True, help="Verify every version.")
@_JSON
def verify(ref: str | None, everything: bool, as_json: bool) -> None:
    """Hash every byte of REF again and compare; exits with 1 when anything differs."""
    if (ref is None) != everything:
        raise click.UsageError("give one of REF and --all")
    rows: list[dict[str, Any]] = []
    first: HearthError | None = None
    with require_existing("model to verify") as workspace:
        registry = workspace.registry
        for version in registry.list() if ref is None else [registry.find(ref)]:
            try:
                registry.verify(version.ref)
                rows.append({"ref": version.ref, "ok": True, "problem": None})
            except HearthError as error:
                first = first or error
                rows.append({"ref": version.ref, "ok": False, "problem": error.message})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['ref']}: {'every file matches' if row['ok'] else 'DAMAGED'}")
    if first is not None:
        raise first


@models.command()
@click.argument("ref")
@click.option("--force", is_flag=True, help="Delete although an alias points to it; the alias goes too.")
@click.option("--reason", help="Why; kept in the history.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_ACTOR
def delete(ref: str, force: bool, reason: str | None, yes: bool, actor: str | None) -> None:
    """Delete the version REF and its files. Its number is never used again."""
    with require_existing(f"model {ref!r}") as workspace:
        version = workspace.registry.find(ref)
        if not yes:
            click.confirm(f"delete {version.ref} ({human_size(version.size)})?", abort=True, err=True)
        workspace.registry.delete(version.ref, actor, force=force, reason=reason)
    click.echo(f"deleted {version.ref}")


@models.command()
@click.argument("ref")
@click.argument("tags", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--remove", multiple=True, metavar="KEY", help="Remove this tag; may be repeated.")
@_ACTOR
@_JSON
def tag(ref: str, tags: tuple[str, ...], remove: tuple[str, ...], actor: str | None, as_json: bool) -> None:
    """Set or remove tags of the version REF."""
    if not tags and not remove:
        raise click.UsageError("give KEY=VALUE or --remove KEY")
    changes: dict[str, str | None] = {**key_values(tags), **dict.fromkeys(remove)}
    with require_existing(f"model {ref!r}") as workspace:
        version = workspace.registry.tag(ref, changes, actor=actor)
    shown = ", ".join(f"{key}={value}" for key, value in version.tags.items())
    _done(version, f"{version.ref}: {shown or 'no tags'}", as_json)


@models.command()
@click.argument("name")
@_JSON
def history(name: str, as_json: bool) -> None:
    """Show everything that happened to the model NAME, who did it and why."""
    with require_existing(f"model {name!r}") as workspace:
        entries = workspace.registry.history(name)
    if as_json:
        print_json([entry.to_dict() for entry in entries])
        return
    print_table(
        ("when", "who", "event", "version", "alias", "from", "forced", "reason"),
        (
            (
                f"{e.at:%F %T}",
                e.actor,
                e.event,
                e.version,
                e.alias,
                e.from_version,
                "forced" if e.forced else "",
                e.reason,
            )
            for e in entries
        ),
    )


@models.command(name="import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Name in the registry; an exported version knows its own.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="For llama2.c files: the tokenizer file.")
@click.option(
    "--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Tag of the version; may be repeated."
)
@_ACTOR
@_JSON
def import_model(
    path: Path,
    name: str | None,
    tokenizer: Path | None,
    tags: tuple[str, ...],
    actor: str | None,
    as_json: bool,
) -> None:
    """Add a model from PATH: a Hugging Face folder, an exported version, or a llama2.c .bin file."""
    from hearth.workspace import Workspace

    if not path.exists():
        raise InputError(f"no file or folder {path}")
    if path.is_file() and (name is None or tokenizer is None):
        raise InputError(
            f"{path} is a file; a llama2.c model needs its tokenizer and a name",
            fix="add --tokenizer FILE --name NAME, or give the folder of a Hugging Face model",
        )
    labels = key_values(tags)
    with Workspace.open() as workspace:
        if path.is_dir():
            version = workspace.registry.import_(path, name, actor=actor, tags=labels)
        else:
            assert name is not None
            assert tokenizer is not None
            version = _import_llama2c(workspace, path, tokenizer, name, labels, actor)
    _done(version, f"imported {version.ref} ({human_size(version.size)})", as_json)


def _import_llama2c(
    workspace: Workspace, path: Path, tokenizer: Path, name: str, tags: dict[str, str], actor: str | None
) -> ModelVersion:
    from hearth.models.llama2c import import_llama2c

    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=".import-") as folder:
        target = Path(folder) / "model"
        import_llama2c(path, tokenizer, target)
        labels = {"format": "llama2.c", **tags}
        return workspace.registry.import_(target, name, actor=actor, tags=labels, origin=path.name)


@models.command()
@click.argument("ref")
@click.argument("directory", type=click.Path(path_type=Path))
@_JSON
def export(ref: str, directory: Path, as_json: bool) -> None:
    """Write the version REF to DIRECTORY as a plain Hugging Face folder with its hearth.json."""
    with require_existing(f"model {ref!r}") as workspace:
        version = workspace.registry.find(ref)
        workspace.registry.export(version.ref, directory)
    if as_json:
        print_json({"ref": version.ref, "directory": str(directory)})
    else:
        click.echo(f"wrote {version.ref} to {directory}")


def _gate(workspace: Workspace, version: ModelVersion) -> str:
    """The state of the parity gate in a word."""
    own = [report for report in workspace.registry.reports(version.ref, "parity") if not report.imported]
    return "not run" if not own else "passed" if own[-1].passed else "failed"


def _facts(version: ModelVersion, gate: str) -> list[tuple[str, object]]:
    facts = [
        ("version", version.ref),
        ("aliases", ", ".join(version.aliases)),
        ("parity", gate),
        ("architecture", version.facts.get("architecture")),
        ("dtype", version.facts.get("dtype")),
        ("size", human_size(version.size)),
        ("digest", version.digest),
        ("tokenizer", version.facts.get("tokenizer_sha256")),
        ("chat template", version.facts.get("chat_template_sha256")),
        ("run", version.run_id),
        ("recipe", version.recipe_hash),
        ("dataset", version.dataset_fingerprint),
        ("parent", version.parent),
        ("licence", version.licence),
        ("tags", ", ".join(f"{key}={value}" for key, value in version.tags.items())),
        ("created", f"{version.created_at:%F %T} UTC by {version.created_by}"),
        ("folder", version.path),
    ]
    return [(label, value) for label, value in facts if value]


def _without_recipe(version: ModelVersion) -> dict[str, Any]:
    return {key: value for key, value in version.to_dict().items() if key != "recipe"}


def _done(version: ModelVersion, message: str, as_json: bool) -> None:
    if as_json:
        print_json(version.to_dict())
    else:
        click.echo(message)
