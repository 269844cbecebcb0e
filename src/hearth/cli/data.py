"""`hearth data`: make datasets from recipes, and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.data_inspect import inspect
from hearth.cli.output import error_console, note, print_json, print_table

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.data import Dataset, TokenSplit
    from hearth.workspace import Workspace


@click.group()
def data() -> None:
    """Prepare datasets from recipes, and look into them."""


data.add_command(inspect)


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
        options: dict[str, Any] = {"progress": progress, "tokenizer_dir": tokenizer_of(loaded, workspace)}
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


def tokenizer_of(recipe: Recipe, workspace: Workspace) -> Path | None:
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
    copy = dataset.manifest.inputs.get("tokenizer", {}).get("training_copy")
    if copy is not None:
        note(f"the chat template marks no answers: masks were made by the training copy {copy}")
    num_empty = (dataset.manifest.audit or {}).get("num_empty_thoughts", 0)
    if num_empty:
        note(
            f"{num_empty} answers are supervised from an empty thought on "
            "that the chat template adds: the model learns not to think; move {% generation %} behind it"
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
    click.echo(f"kind         {manifest.kind}")
    trained = "trained here" if manifest.tokenizer.trained else "given"
    click.echo(f"tokenizer    {manifest.tokenizer.vocab_size:,} tokens, {trained}")
    click.echo()
    columns = ["split", "documents", "tokens", "bytes", "bytes/token"]
    chat = manifest.kind not in ("text", "prompts")
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
    opened = open_dataset(dataset)
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
    from hearth.data.manifest import SAMPLE_PARTS

    # Of a sample, what counts is its longest part: samples are read one by one.
    lengths = split.part_lengths.max(axis=1, initial=0) if len(split) else np.zeros(1, dtype=np.int64)
    stated = {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "p95": int(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "sequence_length": sequence_length,
    }
    if split.kind in SAMPLE_PARTS:
        num_long = int((lengths > sequence_length + 1).sum())
        return {**stated, "rows": len(split) - num_long, "padding": 0.0, "dropped": num_long}
    plan = PackedRows(split, sequence_length).plan
    return {**stated, "rows": plan.num_rows, "padding": plan.padding, "dropped": plan.num_dropped}


def open_dataset(dataset: str) -> Dataset:
    """A directory, or the name (or the beginning of the fingerprint) of a dataset in the workspace."""
    from hearth.data import Dataset, find_dataset
    from hearth.workspace.workspace import workspace_root

    return Dataset.open(find_dataset(dataset, workspace_root() / "datasets"))
