"""`hearth lineage REF`: what something was made from, and what was made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hearth.cli.output import note, print_json
from hearth.cli.workspaces import require_existing
from hearth.errors import NotFoundError

if TYPE_CHECKING:
    from hearth.workspace import LineageNode, Workspace

_MAX_CHILDREN = 40  # a dataset may have thousands of sources


@click.command()
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def lineage(ref: str, as_json: bool) -> None:
    """Print what REF was made from, and what was made from it.

    REF is a model (chat, chat@3, chat@production), a run id, a dataset fingerprint, or kind:id; the
    beginning of a run id or fingerprint is enough.
    """
    with require_existing(f"lineage of {ref}") as workspace:
        node = find_node(workspace, ref)
        up, down = workspace.lineage.up(node), workspace.lineage.down(node)
    if as_json:
        print_json({"ref": node, "made_from": up.to_dict(), "made_into": down.to_dict()})
        return
    click.echo(f"{node}\n\nmade from")
    click.echo("\n".join(draw(up)) or "  (nothing recorded)")
    click.echo("\nmade into")
    click.echo("\n".join(draw(down)) or "  (nothing recorded)")
    if not up.children and not down.children:
        note(f"no lineage is recorded for {node}")


def find_node(workspace: Workspace, ref: str) -> str:
    """The lineage node that a user's reference means. Raises NotFoundError, with candidates if several."""
    if ":" in ref:
        found = [ref] if workspace.lineage.exists(ref) else workspace.lineage.find(ref)
    else:
        found = _named(workspace, ref)
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFoundError(f"{ref!r} may mean {', '.join(found)}", fix="give more of it, or kind:id")
    raise NotFoundError(
        f"nothing here is called {ref!r}",
        fix="`hearth models list` and `hearth runs list` show names and ids",
    )


def _named(workspace: Workspace, ref: str) -> list[str]:
    """Candidates, exact before prefix: a model, a run, a dataset, any other node."""
    from hearth.errors import InputError

    try:
        return [f"model:{workspace.registry.find(ref).ref}"]
    except InputError:
        pass
    try:
        run = [f"run:{workspace.runs.get(ref).id}"]
    except NotFoundError:
        run = []
    datasets = workspace.lineage.find(f"dataset:{ref}")
    exact = [node for node in (*run, *datasets) if node.partition(":")[2] == ref]
    return exact or [*run, *datasets]


def draw(root: LineageNode, indent: str = "  ") -> list[str]:
    """The tree below ``root`` as lines with branches."""
    lines = []
    shown, hidden = root.children[:_MAX_CHILDREN], len(root.children) - _MAX_CHILDREN
    for index, child in enumerate(shown):
        last = index == len(shown) - 1 and hidden <= 0
        more = " …" if child.repeated else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {child.relation}: {child.ref}{more}")
        lines += draw(child, indent + ("   " if last else "│  "))
    if hidden > 0:
        lines.append(f"{indent}└─ and {hidden} more; --json lists them all")
    return lines
