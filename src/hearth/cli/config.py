"""`hearth config`: what a recipe says once all its layers are laid, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hearth.cli.output import print_json, print_table


@click.group()
def config() -> None:
    """Show a recipe with the source of each value, or its schema."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--sources", is_flag=True, help="Print each value with where it came from.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def show(file: Path, overrides: tuple[str, ...], sources: bool, as_json: bool) -> None:
    """Print the resolved recipe FILE: defaults < preset < file < HEARTH_SECTION__KEY < KEY=VALUE.

    The YAML that it prints loads back to the same recipe.
    """
    from hearth.config import load_recipe, recipe_hash, to_dict, to_yaml

    loaded = load_recipe(file, overrides)
    if not sources:
        if as_json:
            print_json({"recipe": to_dict(loaded.recipe), "hash": recipe_hash(loaded.recipe)})
        else:
            click.echo(f"# recipe hash: {recipe_hash(loaded.recipe)}\n{to_yaml(loaded.recipe)}", nl=False)
        return
    values = to_dict(loaded.recipe)
    rows = [(key, _value(values, key), source) for key, source in loaded.sources.items()]
    if as_json:
        print_json({key: {"value": value, "source": str(source)} for key, value, source in rows})
    else:
        print_table(
            ("key", "value", "source"),
            ((key, _shown(value), source) for key, value, source in rows),
        )


@config.command()
@click.option("--for", "subject", type=click.Choice(["recipe", "serve"]), default="recipe", show_default=True)
def schema(subject: str) -> None:
    """Print the JSON schema of recipes (or of server settings), for editors and other tools."""
    from hearth.config import Recipe, ServeConfig, json_schema

    print_json(json_schema(Recipe if subject == "recipe" else ServeConfig))


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def presets(as_json: bool) -> None:
    """List the presets that a recipe may start from with `preset: NAME`."""
    from hearth.config.loading import PRESETS, list_presets

    rows = []
    for name in list_presets():
        first = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        rows.append((name, first.removeprefix("# ")))
    if as_json:
        print_json([{"name": name, "description": text} for name, text in rows])
    else:
        print_table(("preset", "what for"), rows)


def _value(values: object, key: str) -> object:
    for part in key.split("."):
        assert isinstance(values, dict)
        values = values[part]
    return values


def _shown(value: object) -> str:
    """The value as one would write it in the file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
