"""`hearth keys`: the API keys of the workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.cli.workspaces import open_existing, require_existing

if TYPE_CHECKING:
    from hearth.workspace import ApiKey


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def create(name: str, as_json: bool) -> None:
    """Make a key called NAME and print its secret, this once."""
    from hearth.workspace import Workspace

    with Workspace.open() as workspace:
        key, secret = workspace.keys.create(name)
    if as_json:
        print_json({**_row(key), "secret": secret})
        return
    click.echo(secret)
    note(f"key {key.id} ({key.name}): this is the only time the secret is shown; Hearth keeps its hash")


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def list_keys(as_json: bool) -> None:
    """List the keys, without their secrets."""
    with open_existing() as workspace:
        found = [] if workspace is None else workspace.keys.list()
    if as_json:
        print_json([_row(key) for key in found])
        return
    if workspace is not None and not found:
        note("there are no API keys yet; `hearth keys create NAME` makes one")
    if found:
        rows = [
            (key.id, key.name, key.hint + "…", key.created_at, key.last_used_at, _state(key)) for key in found
        ]
        print_table(
            ("id", "name", "secret", "created", "last used", "state"),
            [tuple(f"{cell:%F %T}" if hasattr(cell, "strftime") else cell for cell in row) for row in rows],
        )


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def revoke(key_id: str, as_json: bool) -> None:
    """Close the key ID for good."""
    with require_existing(f"API key {key_id}") as workspace:
        key = workspace.keys.revoke(key_id)
    if as_json:
        print_json(_row(key))
    else:
        click.echo(f"revoked {key.id} ({key.name})")


def _state(key: ApiKey) -> str:
    return "active" if key.revoked_at is None else f"revoked {key.revoked_at:%F %T}"


def _row(key: ApiKey) -> dict[str, Any]:
    def when(name: str) -> str | None:
        value = getattr(key, name)
        return None if value is None else str(value.isoformat())

    times = {name: when(name) for name in ("created_at", "last_used_at", "revoked_at")}
    return {"id": key.id, "name": key.name, "hint": key.hint, "active": key.active, **times}
