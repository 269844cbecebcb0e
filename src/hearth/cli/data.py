"""`hearth data`: make datasets from recipes, and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import error_console, note, print_json, print_table

if TYPE_CHECKING:
    from rich.text import Text

    from hearth.config import Recipe
    from hearth.data import Dataset, PackedRows, TokenSplit
    from hearth.workspace import Workspace


@click.group()
def data() -> None:
    """Prepare datasets from recipes, and look into them."""


@data.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", help="Name of the dataset in the workspace. Default: its fingerprint.")
@click.option("--out", type=click.Path(path_type=Path), help="Write it to this directory instead.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def prepare(
    recipe: Path, overrides: tuple[str, ...], name: str | None, out: Path | None, as_json: bool
) -> None:
    """Make the dataset that RECIPE describes: read, filter, deduplicate, tokenise, split.

    It goes into the workspace, under datasets/. When the sources and settings have not changed since, what is
    there is reused.
    """
    from hearth.cli.progress import RichProgress
    from hearth.config import load_recipe
    from hearth.data import prepare_dataset, prepare_in_folder
    from hearth.errors import ConfigError
    from hearth.workspace import Workspace

    if name is not None and (out is not None or Path(name).name != name or name.startswith(".")):
        raise ConfigError(
            f"--name {name} is not a plain name", fix="use --name or --out, and no slash in names"
        )
    loaded = load_recipe(recipe, overrides).recipe
    with Workspace.open() as workspace, RichProgress(error_console()) as progress:
        options: dict[str, Any] = {"progress": progress, "tokenizer_dir": _tokenizer(loaded, workspace)}
        folder = workspace.root / "datasets"
        if out is not None or name is not None:
            dataset = prepare_dataset(loaded, out or folder / str(name), **options)
        else:
            dataset = prepare_in_folder(loaded, folder, **options)
        workspace.lineage.add_many(dataset.lineage_edges)
    if as_json:
        print_json({**_summary(dataset), "reused": dataset.reused, "stages": _stages(dataset)})
        return
    note("nothing has changed: the dataset is reused" if dataset.reused else _speeds(dataset))
    _warn(dataset)
    _print_summary(dataset)


def _tokenizer(recipe: Recipe, workspace: Workspace) -> Path | None:
    """The directory of ``tokenizer.base`` or ``model.base``; None when neither is given."""
    base = recipe.tokenizer.base or recipe.model.base
    if base is None or recipe.data.dataset is not None:
        return None
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    from hearth.models import resolve_reference

    return resolve_reference(base, workspace)


def _stages(dataset: Dataset) -> dict[str, dict[str, float]]:
    return {
        stage: {"bytes": num_bytes, "seconds": round(seconds, 3), "mb_per_s": _speed(num_bytes, seconds)}
        for stage, (num_bytes, seconds) in dataset.timings.items()
    }


def _speed(num_bytes: int, seconds: float) -> float:
    return round(num_bytes / 1e6 / max(seconds, 1e-9), 1)


def _speeds(dataset: Dataset) -> str:
    parts = [f"{stage} {_speed(*timing):g} MB/s" for stage, timing in dataset.timings.items()]
    seconds = sum(seconds for _, seconds in dataset.timings.values())
    return f"made in {seconds:.1f} s: {', '.join(parts)}"


def _warn(dataset: Dataset) -> None:
    """Say what was skipped, where a person would want to know."""
    for source in dataset.manifest.sources:
        for reason, number in source.bad.items():
            note(f"skipped {number} as {reason} in {source.path}, for example: {source.bad_examples[0]}")
    tokenizer = dataset.manifest.tokenizer
    if tokenizer.round_trips_lossy:
        note(
            f"the tokenizer does not keep the text as it is: {tokenizer.round_trips_lossy} of "
            f"{tokenizer.round_trips_checked} checked documents decode to something else"
        )
    if dataset.manifest.split_fallback:
        note("few documents: the validation split is a single group, larger than data.validation_fraction")


def _summary(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "kind": manifest.kind,
        "splits": {
            name: split.model_dump(exclude={"shards"}) | {"shards": len(split.shards)}
            for name, split in manifest.splits.items()
        },
        "sources": [source.model_dump() for source in manifest.sources],
        "removed": {reason: count.model_dump() for reason, count in manifest.removed().items()},
        "tokenizer": manifest.tokenizer.model_dump(),
        "audit": manifest.audit,
    }


def _print_summary(dataset: Dataset) -> None:
    manifest = dataset.manifest
    click.echo(f"dataset      {dataset.path}")
    click.echo(f"fingerprint  {dataset.fingerprint[:16]}")
    trained = "trained here" if manifest.tokenizer.trained else "given"
    click.echo(f"tokenizer    {manifest.tokenizer.vocab_size:,} tokens, {trained}")
    click.echo()
    columns = ["split", "documents", "tokens", "bytes", "bytes/token"]
    chat = manifest.kind == "chat"
    rows = []
    for name, split in manifest.splits.items():
        row = [name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}"]
        row.append(f"{split.bytes / split.tokens:.2f}" if split.tokens else "")
        rows.append([*row, f"{split.supervised_tokens:,}"] if chat else row)
    print_table([*columns, "counted in the loss"] if chat else columns, rows)
    click.echo()
    print_table(
        ("source", "format", "files", "read", "removed", "kept", "licence"),
        [
            (
                source.path,
                source.format,
                f"{source.files:,}",
                f"{source.read.documents:,}",
                _removed(source.removed, source.bad),
                f"{sum(count.documents for count in source.kept.values()):,}",
                source.license or "not stated",
            )
            for source in manifest.sources
        ],
    )


def _removed(removed: dict[str, Any], bad: dict[str, int]) -> str:
    parts = [f"{count.documents:,} {reason}" for reason, count in removed.items()]
    return ", ".join(parts + [f"{number:,} {reason}" for reason, number in bad.items()]) or "0"


@data.command()
@click.argument("dataset")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@click.option("--verify", is_flag=True, help="Hash every file and compare with the manifest.")
@click.option("--sequence-length", type=click.IntRange(min=1), default=512, show_default=True)
def stats(dataset: str, as_json: bool, verify: bool, sequence_length: int) -> None:
    """Counts of DATASET (a directory, or a name in the workspace): splits, sources, filters, lengths."""
    opened = _open(dataset)
    if verify:
        opened.verify()
        note("every file has the hash that the manifest records")
    lengths = {name: _lengths(opened.split(name), sequence_length) for name in opened.manifest.splits}
    if as_json:
        print_json({**_summary(opened), "lengths": lengths, "verified": verify})
        return
    _print_summary(opened)
    click.echo()
    print_table(
        (
            "split",
            "shortest",
            "median",
            "p95",
            "longest",
            f"rows of {sequence_length}",
            "padding",
            "too long",
        ),
        [
            (
                name,
                *(f"{row[key]:,}" for key in ("min", "median", "p95", "max", "rows")),
                f"{row['padding']:.2%}",
                f"{row['dropped']:,}",
            )
            for name, row in lengths.items()
        ],
        title="tokens of a document",
    )


def _lengths(split: TokenSplit, sequence_length: int) -> dict[str, Any]:
    import numpy as np

    from hearth.data import PackedRows

    rows = PackedRows(split, sequence_length)
    lengths = split.lengths if len(split.lengths) else np.zeros(1, dtype=np.int64)
    return {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "p95": int(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "sequence_length": sequence_length,
        "rows": len(rows),
        "padding": rows.plan.padding,
        "dropped": rows.plan.num_dropped,
    }


@data.command()
@click.argument("dataset")
@click.option("--split", "split_name", default="train", show_default=True, help="train or validation.")
@click.option("--doc", "document", type=int, help="Number of the document. Default: the first.")
@click.option("--id", "document_id", help="Id of the document, instead of its number.")
@click.option("--row", type=int, help="Number of a packed row, instead of a document.")
@click.option("--masks", is_flag=True, help="Show the tokens, coloured by whether they count in the loss.")
@click.option("--sequence-length", type=click.IntRange(min=1), default=512, show_default=True)
def inspect(
    dataset: str,
    split_name: str,
    document: int | None,
    document_id: str | None,
    row: int | None,
    masks: bool,
    sequence_length: int,
) -> None:
    """Print a document or a packed row of DATASET, with where it came from.

    With --masks: green tokens are targets of the loss, dim ones are only read; brackets mark them where there
    is no colour.
    """
    from hearth.data import PackedRows
    from hearth.errors import ConfigError

    if sum(value is not None for value in (document, document_id, row)) > 1:
        raise ConfigError("give one of --doc, --id and --row")
    opened = _open(dataset)
    if document_id is not None:
        split_name, document = _find(opened, document_id)
    split = opened.split(split_name)
    if row is not None:
        _inspect_row(PackedRows(split, sequence_length), row, masks)
        return
    index = document or 0
    info = split.document_info(index)
    info.pop("messages", None)
    note(f"{split_name} document {index} of {split.num_documents}: {_described(info)}")
    if masks:
        mask = split.loss_mask(index)
        tokens = split.tokens(index).tolist()
        _print_tokens(opened, tokens, [True] * len(tokens) if mask is None else mask.tolist())
    else:
        click.echo(split.text(index), nl=False)
        if not split.text(index).endswith("\n"):
            click.echo()


def _find(dataset: Dataset, document_id: str) -> tuple[str, int]:
    from hearth.errors import NotFoundError

    found = dataset.find(document_id)
    if not found:
        raise NotFoundError(
            f"no document {document_id!r} in {dataset.path}",
            fix="ids are paths below the source, FILE:LINE of a row, or names of modules",
        )
    return found[0]


def _described(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info.items() if value is not None)


def _inspect_row(rows: PackedRows, index: int, masks: bool) -> None:
    from hearth.data import IGNORE
    from hearth.errors import NotFoundError

    if not 0 <= index < len(rows):
        raise NotFoundError(
            f"no row {index}", fix=f"there are {len(rows)} rows of {rows.sequence_length} tokens"
        )
    row = rows[index]
    for number, (document, start, count) in enumerate(rows.segments(index)):
        info = rows.split.document_info(document)
        last = start + count
        note(f"segment {number}: {info['source']} {info['id']}, tokens {start} to {last} of the document")
        here = row.segment_ids == number
        # The inputs of a segment, and the last target, which is never an input.
        tokens = rows.split.token_range(document, start, last + 1).tolist()
        counted = [False, *(row.labels[here] != IGNORE).tolist()]
        if masks:
            _print_tokens(rows.split.dataset, tokens, counted)
        else:
            click.echo(rows.split.dataset.tokenizer().decode(tokens))
    padding = int((row.segment_ids < 0).sum())
    note(f"row {index} of {len(rows)}: {rows.sequence_length - padding} tokens, {padding} padding")


def _print_tokens(dataset: Dataset, tokens: list[int], counted: list[bool]) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(_coloured(dataset, tokens, counted))


def _coloured(dataset: Dataset, tokens: list[int], counted: list[bool]) -> Text:
    """Runs of tokens that count and of tokens that do not, decoded together so that characters stay whole."""
    import itertools

    from rich.text import Text

    tokenizer = dataset.tokenizer()
    text = Text()
    for counts, group in itertools.groupby(zip(tokens, counted, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in group])
        text.append(f"[{piece}]" if counts else piece, style="green" if counts else "dim")
    return text


def _open(dataset: str) -> Dataset:
    """A directory, or the name (or the beginning of the fingerprint) of a dataset in the workspace."""
    from hearth.data import Dataset, find_dataset
    from hearth.workspace.workspace import workspace_root

    return Dataset.open(find_dataset(dataset, workspace_root() / "datasets"))
