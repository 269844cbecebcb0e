"""`hearth parity MODEL`: check that serving answers the same as training, and record the verdict."""

from __future__ import annotations

import sys

import click

from hearth.cli.output import print_json, progress_bar


@click.command()
@click.argument("model")
@click.option("--dtype", default="auto", show_default=True, help="Precision that is tested: that of serving.")
@click.option(
    "--weights", type=click.Choice(["auto", "int8", "int4"]), default="auto", show_default=True,
    help="Compression of the weights that is tested.",
)  # fmt: skip
@click.option(
    "--kv-dtype", type=click.Choice(["auto", "int8", "fp8"]), default="auto", show_default=True,
    help="Compression of the KV cache that is tested.",
)  # fmt: skip
@click.option(
    "--prompts", "num_prompts", type=click.IntRange(min=1), default=16, show_default=True,
    help="Number of prompts; the built-in ones are always asked, held-out ones fill up.",
)  # fmt: skip
@click.option(
    "--tokens", "max_tokens", type=click.IntRange(min=1), default=32, show_default=True,
    help="Greedy tokens of each prompt; at least 8.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def parity(
    model: str, dtype: str, weights: str, kv_dtype: str, num_prompts: int, max_tokens: int, as_json: bool
) -> None:
    """Check that MODEL answers the same through the serving engine as it did in training.

    The report of a registered version is kept with it; `hearth models promote` asks for a passed one.
    Exits with 1 when the gate fails.
    """
    from hearth.evaluation import run_gate
    from hearth.workspace import Workspace

    with Workspace.open() as workspace, progress_bar("parity gate", unit="prompts") as advance:
        report = run_gate(
            model,
            workspace=workspace,
            dtype=dtype,
            weights=weights,
            kv_dtype=kv_dtype,
            num_prompts=num_prompts,
            max_tokens=max_tokens,
            advance=advance,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.render())
    if not report.passed:
        sys.exit(1)
