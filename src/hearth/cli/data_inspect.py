"""`hearth data inspect`: documents, samples and training rows, token by token, with their loss mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import error_console, note, print_json

if TYPE_CHECKING:
    from rich.text import Text

    from hearth.config import Recipe
    from hearth.data import Dataset, DataTokenizer, PackedRows, TokenSplit

RECIPE_SUFFIXES = (".yaml", ".yml", ".toml")
# By (counts in the loss, control token); two tokens side by side differ in the shade.
_STYLES = {
    (True, False): ("black on green", "black on bright_green"),
    (True, True): ("bold black on green", "bold black on bright_green"),
    (False, False): ("dim", "bright_black"),
    (False, True): ("magenta", "magenta"),
}


@dataclass(frozen=True)
class Piece:
    """Some tokens, and which of them count in the loss."""

    name: str
    where: str
    tokens: list[int]
    counted: list[bool]


@click.command()
@click.argument("dataset", metavar="DATASET|RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--split", "split_name", default="train", show_default=True, help="train or validation.")
@click.option("--doc", "document", type=int, help="Number of the document. Default: the first.")
@click.option("--id", "document_id", help="Id of the document, instead of its number.")
@click.option("--row", type=int, help="Number of a training row, instead of a document.")
@click.option("--epoch", type=click.IntRange(min=0), default=0, help="Of a row that differs by epoch (fim).")
@click.option("--masks", is_flag=True, help="Show the tokens, coloured by whether they count in the loss.")
@click.option("--sequence-length", type=click.IntRange(min=1), help="Default: the recipe's, or 512.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON: every token with its mask.")
def inspect(
    dataset: str,
    overrides: tuple[str, ...],
    split_name: str,
    document: int | None,
    document_id: str | None,
    row: int | None,
    epoch: int,
    masks: bool,
    sequence_length: int | None,
    as_json: bool,
) -> None:
    """Print a document, a sample or a training row, with where it came from.

    DATASET is a directory or a name in the workspace; a RECIPE is prepared first, or found prepared, and its
    rows are cut as training would cut them. With --masks every token has a shade of its own: on green it is a
    target of the loss, without ground it is only read, control tokens are purple. Where there is no colour,
    brackets are around what counts.
    """
    from hearth.errors import ConfigError

    if sum(value is not None for value in (document, document_id, row)) > 1:
        raise ConfigError("give one of --doc, --id and --row")
    opened, recipe = _open(dataset, overrides, sequence_length)
    if document_id is not None:
        split_name, document = _find(opened, document_id)
    split = opened.split(split_name)
    if row is not None:
        about, pieces = _row(split, recipe, row, epoch)
    else:
        about, pieces = _document(split, document or 0)
    if as_json:
        print_json(
            {
                "dataset": str(opened.path),
                "kind": split.kind,
                **about,
                "pieces": _described(opened.tokenizer(), pieces),
            }
        )
        return
    _print(split, about, pieces, masks=masks)


def _open(dataset: str, overrides: tuple[str, ...], sequence_length: int | None) -> tuple[Dataset, Recipe]:
    """The dataset, and the recipe that says how rows are made of it."""
    from hearth.cli.data import open_dataset
    from hearth.config import Recipe
    from hearth.errors import ConfigError

    path = Path(dataset).expanduser()
    if path.suffix.lower() in RECIPE_SUFFIXES and not path.is_dir():
        if sequence_length is not None:
            overrides = (*overrides, f"data.sequence_length={sequence_length}")
        return _prepared(path, overrides)
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: settings can be overridden in recipes only, and {dataset} is a dataset",
            fix="name the recipe instead",
        )
    data = {"sequence_length": sequence_length or 512}
    model = {"context_length": data["sequence_length"]}
    return open_dataset(dataset), Recipe.model_validate({"data": data, "model": model})


def _prepared(path: Path, overrides: tuple[str, ...]) -> tuple[Dataset, Recipe]:
    from hearth.cli.data import open_dataset, tokenizer_of
    from hearth.cli.progress import RichProgress
    from hearth.config import load_recipe
    from hearth.data import prepare_in_folder
    from hearth.workspace import Workspace

    recipe = load_recipe(path, overrides).recipe
    if recipe.data.dataset is not None:
        return open_dataset(recipe.data.dataset), recipe
    with Workspace.open() as workspace, RichProgress(error_console()) as progress:
        made = prepare_in_folder(
            recipe,
            workspace.root / "datasets",
            tokenizer_dir=tokenizer_of(recipe, workspace),
            progress=progress,
        )
        workspace.lineage.add_many(made.lineage_edges)
    return made, recipe


def _find(dataset: Dataset, document_id: str) -> tuple[str, int]:
    from hearth.errors import NotFoundError

    found = dataset.find(document_id)
    if not found:
        raise NotFoundError(
            f"no document {document_id!r} in {dataset.path}",
            fix="ids are paths below the source, FILE:LINE of a row, or names of modules",
        )
    return found[0]


def _document(split: TokenSplit, index: int) -> tuple[dict[str, Any], list[Piece]]:
    from hearth.data.manifest import SAMPLE_PARTS

    info = split.document_info(index)
    about = {"split": split.name, "document": index, **info}
    for bulky in ("messages", "completions"):
        about.pop(bulky, None)
    names = SAMPLE_PARTS.get(split.kind, ("document",))
    pieces = [
        Piece(name, "", tokens.tolist(), mask.tolist())
        for name, (tokens, mask) in zip(names, split.parts(index), strict=True)
    ]
    return about, pieces


def _row(split: TokenSplit, recipe: Recipe, index: int, epoch: int) -> tuple[dict[str, Any], list[Piece]]:
    from hearth.data import PackedRows, SampleRows
    from hearth.data.manifest import SAMPLE_PARTS

    data = recipe.data
    if split.kind in SAMPLE_PARTS:
        samples = SampleRows(split, data.sequence_length, truncate=data.truncate)
        _check_row(index, len(samples), data.sequence_length)
        about, pieces = _document(split, int(samples.documents[index]))
        pieces = [
            Piece(piece.name, "", tokens.tolist(), mask.tolist())
            for piece, (tokens, mask) in zip(pieces, samples.parts(index), strict=True)
        ]
        cut = int(samples.cuts[index])
        return {"row": index, "num_rows": len(samples), "cut_tokens": cut, **about}, pieces
    rows = PackedRows(
        split,
        data.sequence_length,
        packing=data.packing,
        seed=data.seed,
        truncate=data.truncate,
        fim=data.fim if split.name == "train" else None,
    )
    _check_row(index, len(rows), data.sequence_length)
    return _packed_row(rows, index, epoch if rows.changes_by_epoch else 0)


def _check_row(index: int, num_rows: int, sequence_length: int) -> None:
    from hearth.errors import NotFoundError

    if not 0 <= index < num_rows:
        raise NotFoundError(f"no row {index}", fix=f"there are {num_rows} rows of {sequence_length} tokens")


def _packed_row(rows: PackedRows, index: int, epoch: int) -> tuple[dict[str, Any], list[Piece]]:
    number = epoch * len(rows) + index
    pieces = []
    for segment, (document, start, count) in enumerate(rows.segments(number)):
        info = rows.split.document_info(document)
        tokens, mask = rows.segment(number, document, start, count)
        counted = [True] * len(tokens) if mask is None else mask.tolist()
        where = f"{info['source']} {info['id']}, tokens {start} to {start + count} of the document"
        # The first token of a segment is an input only: nothing comes before it that could predict it.
        pieces.append(Piece(f"segment {segment}", where, tokens.tolist(), [False, *counted[1:]]))
    padding = rows.sequence_length - sum(len(piece.tokens) - 1 for piece in pieces)
    about = {"split": rows.split.name, "row": index, "num_rows": len(rows), "epoch": epoch}
    return {**about, "tokens": rows.sequence_length - padding, "padding": padding}, pieces


def _described(tokenizer: DataTokenizer, pieces: list[Piece]) -> list[dict[str, Any]]:
    return [
        {
            "name": piece.name,
            "where": piece.where,
            "num_tokens": len(piece.tokens),
            "num_counted": sum(piece.counted),
            "tokens": [
                {"id": token, "text": tokenizer.decode([token]), "counted": counted}
                for token, counted in zip(piece.tokens, piece.counted, strict=True)
            ],
        }
        for piece in pieces
    ]


def _print(split: TokenSplit, about: dict[str, Any], pieces: list[Piece], *, masks: bool) -> None:
    from rich.console import Console

    tokenizer = split.dataset.tokenizer()
    known = {key: value for key, value in about.items() if value not in (None, {})}
    note(", ".join(f"{key} {value}" for key, value in known.items()))
    console = Console(soft_wrap=True, highlight=False)
    coloured = console.is_terminal and not console.no_color
    if masks and coloured:
        console.print(_legend())
    for piece in pieces:
        if len(pieces) > 1 or piece.where:
            counted = f", {sum(piece.counted)} of {len(piece.tokens)} tokens count" if masks else ""
            note(f"{piece.name}: {piece.where or split.kind}{counted}")
        if masks:
            console.print(_shaded(tokenizer, piece) if coloured else _bracketed(tokenizer, piece))
        else:
            text = (
                tokenizer.decode(piece.tokens)
                if "row" in about or len(pieces) > 1
                else split.text(int(about["document"]))
            )
            click.echo(text, nl=not text.endswith("\n"))


def _legend() -> Text:
    from rich.text import Text

    text = Text("legend: ")
    text.append(" counts in the loss ", style=_STYLES[True, False][0])
    text.append(" only read ", style=_STYLES[False, False][1])
    text.append(" control token ", style=_STYLES[False, True][0])
    return text


def _characters(tokenizer: DataTokenizer, piece: Piece) -> Iterator[tuple[str, bool, bool]]:
    """(text, counts, control token) of every token; tokens that share a character stay together."""
    control = set(tokenizer.special_ids.values())
    waiting: list[int] = []
    for at, (token, counts) in enumerate(zip(piece.tokens, piece.counted, strict=True)):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        goes_on = at + 1 < len(piece.tokens) and piece.counted[at + 1] == counts
        if text.endswith("\N{REPLACEMENT CHARACTER}") and goes_on and len(waiting) < 8:
            continue
        yield text, counts, token in control
        waiting = []


def _shaded(tokenizer: DataTokenizer, piece: Piece) -> Text:
    from rich.text import Text

    text = Text()
    for shade, (characters, counts, control) in zip(
        itertools.cycle((0, 1)), _characters(tokenizer, piece), strict=False
    ):
        # A line end would paint the rest of the line.
        text.append(characters.replace("\n", "↵\n"), style=_STYLES[counts, control][shade])
    return text


def _bracketed(tokenizer: DataTokenizer, piece: Piece) -> Text:
    """Runs of tokens that count in brackets, decoded together so that characters stay whole."""
    from rich.text import Text

    text = Text()
    pairs = zip(piece.tokens, piece.counted, strict=True)
    for counts, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        characters = tokenizer.decode([token for token, _ in group])
        text.append(f"[{characters}]" if counts else characters)
    return text
