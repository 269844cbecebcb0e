"""`hearth eval MODEL`: perplexity and bits per byte, on a dataset's held-out documents or on text files."""

from __future__ import annotations

from pathlib import Path

import click

from hearth.cli.output import print_json, print_table, progress_bar


@click.command()
@click.argument("model")
@click.option(
    "--dataset", default=None, help="A prepared dataset; default: the one that MODEL was trained on."
)
@click.option("--split", default="validation", show_default=True, help="Its split.")
@click.option(
    "--text", "texts", multiple=True, type=click.Path(path_type=Path), help="A text file instead; repeatable."
)
@click.option("--max-documents", type=click.IntRange(min=1), help="Score only so many documents.")
@click.option("--dtype", default="auto", show_default=True, help="Precision of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def evaluate(
    model: str,
    dataset: str | None,
    split: str,
    texts: tuple[Path, ...],
    max_documents: int | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure how well MODEL predicts text it has not been trained on.

    Prints loss, perplexity and bits per byte, beside `xz -9` and an order-0 model on the same bytes. The
    report of a registered version is kept with it.
    """
    from hearth.evaluation import evaluate_model
    from hearth.workspace import Workspace

    with Workspace.open() as workspace, progress_bar("scoring", unit="tokens") as advance:
        report = evaluate_model(
            model,
            workspace=workspace,
            dataset=dataset,
            split=split,
            texts=texts,
            max_documents=max_documents,
            dtype=dtype,
            advance=advance,
        )
    if as_json:
        print_json(report)
        return
    print_table(("measure", "value"), [(key, _shown(value)) for key, value in report.items()])


def _shown(value: object) -> str:
    return (
        f"{value:,.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
