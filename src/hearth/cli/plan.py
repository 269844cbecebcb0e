"""`hearth plan RECIPE`: which layout a recipe needs on so many devices, how much memory and how long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hearth.cli.output import note, print_json, print_table
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.parallel.planner import Cluster, Planning
    from hearth.parallel.planner.job import Precision

_GIB = 1 << 30


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--gpus", default=1, show_default=True, help="Number of devices, or of processes with --gpu cpu."
)
@click.option(
    "--gpu",
    default="h100",
    show_default=True,
    help="Kind of device: b200, h200, h100, h100-pcie, a100, a100-40gb, a100-pcie, l40s, or cpu, which is "
    "measured here.",
)
@click.option("--gpu-memory", metavar="80GB", help="Memory of a device, where it is not the usual.")
@click.option("--interconnect", metavar="nvlink+ib", help="The wire in a node, and the one between nodes.")
@click.option("--gpus-per-node", type=int, help="Devices of a node. Default: 8.")
@click.option("--price", type=float, help="Price of a device for an hour, in any currency.")
@click.option("--tokens", metavar="15T", help="Tokens of the whole run, for its days and its cost.")
@click.option("--top", default=5, show_default=True, help="How many layouts to show.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int,
    gpu: str,
    gpu_memory: str | None,
    interconnect: str | None,
    gpus_per_node: int | None,
    price: float | None,
    tokens: str | None,
    top: int,
    as_json: bool,
) -> None:
    """Plan the training of RECIPE, a YAML or TOML file, without its data or weights.

    Shows the layouts that fit into memory, the fastest and why, what its memory is for, and the sections to
    put into the recipe. Exits with 2 where nothing fits, saying what would. The errors of the estimates are
    in docs/planner.md.
    """
    from hearth.config import load_recipe

    if price is not None and price < 0:
        raise ConfigError(f"--price {price} is negative")
    loaded = load_recipe(recipe, overrides).recipe
    cluster, precision = _cluster(loaded, gpus, gpu, gpu_memory, interconnect, gpus_per_node, price)
    from hearth.models.sizes import parse_size
    from hearth.parallel.planner import choose, facts_of_recipe, job_of_recipe
    from hearth.parallel.planner.job import what_is_missing

    num_tokens = None if tokens is None else parse_size(tokens)
    device = "cpu" if gpu == "cpu" else "cuda"
    job = job_of_recipe(loaded, precision=precision, device=device)
    planning = choose(facts_of_recipe(loaded), job, cluster, device=device)
    missing = what_is_missing(loaded)
    if missing is not None:
        note(f"note: {missing}")
    if as_json:
        from hearth.parallel.planner.report import as_dict

        print_json(as_dict(planning, top=top) | {"not_counted": missing})
        return
    _show(planning, num_tokens, top)


def _cluster(
    recipe: Recipe,
    gpus: int,
    gpu: str,
    gpu_memory: str | None,
    interconnect: str | None,
    per_node: int | None,
    price: float | None,
) -> tuple[Cluster, Precision]:
    """The devices, and the arithmetic that train.precision: auto means on them."""
    from hearth.parallel.planner.hardware import make_cluster, parse_bytes

    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    if gpu != "cpu":
        found = make_cluster(
            gpus, gpu=gpu, memory=memory, interconnect=interconnect, per_node=per_node, price=price
        )
        return found, "bf16"
    if interconnect is not None or per_node is not None:
        raise ConfigError("--interconnect and --gpus-per-node say nothing of --gpu cpu", fix="leave them out")
    from hearth.parallel.planner.calibration import cpu_precision, measure_cpu

    precision = cpu_precision(recipe.train.precision)
    found = measure_cpu(gpus, precision=precision, memory=memory, price=price)
    return found, precision


def _show(planning: Planning, tokens: int | None, top: int) -> None:
    from hearth.parallel.planner.report import LAYOUT_COLUMNS, cost, headline, layout_row, paste

    click.echo(headline(planning))
    click.echo()
    rows = [layout_row(choice) for choice in planning.choices[:top]]
    title = f"Layouts ({len(planning.choices)} fit; the first is the one to take)"
    print_table(LAYOUT_COLUMNS, rows, title=title)
    chosen = planning.chosen
    parts = [(name, f"{size / _GIB:.2f}") for name, size in chosen.memory.parts().items() if size]
    click.echo()
    print_table(
        ("memory of the fullest process", "GiB"), [*parts, ("total", f"{chosen.memory.total / _GIB:.2f}")]
    )
    times = [
        (name, f"{value:.3g}", f"{value / chosen.step.seconds:.1%}")
        for name, value in chosen.step.parts().items()
        if value
    ]
    click.echo()
    print_table(("time of a step", "s", "share"), times)
    click.echo("\nwhy:")
    for reason in planning.reasons:
        click.echo(f"  - {reason}")
    if tokens is not None:
        days = tokens / chosen.step.tokens_per_day
        click.echo(f"\n{tokens:.3g} tokens: {days:,.3g} days without failures")
    whole = cost(planning, chosen, tokens or 1e9)
    if whole is not None:
        click.echo(f"cost of {tokens or 1e9:.3g} tokens: {whole:,.2f}")
    click.echo(f"\nfor the recipe:\n{paste(chosen)}")
