"""`hearth plan RECIPE`: which layout a recipe needs on so many devices, how much memory and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.parallel.planner import Cluster, ModelFacts, Planning
    from hearth.parallel.planner.job import Precision

_GIB = 1 << 30
_ROUNDS = 5  # of a simulated run


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
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Devices of a node. Default: 8.")
@click.option("--price", type=float, help="Price of a device for an hour, in any currency.")
@click.option("--tokens", metavar="15T", help="Tokens of the whole run, for its days and its cost.")
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many layouts to show."
)
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

    loaded = load_recipe(recipe, overrides).recipe
    hardware = _Hardware(gpus, gpu, gpu_memory, interconnect, gpus_per_node, price)
    hardware.check()
    num_tokens = None if tokens is None else _tokens(tokens)
    from hearth.parallel.planner import choose, facts_of_recipe, job_of_recipe
    from hearth.parallel.planner.job import what_is_missing

    device = "cpu" if gpu == "cpu" else "cuda"
    facts = facts_of_recipe(loaded)
    cluster, precision = hardware.cluster(loaded, facts)
    job = job_of_recipe(loaded, precision=precision, device=device)
    planning = choose(facts, job, cluster, device=device)
    missing = what_is_missing(loaded)
    if missing is not None:
        note(f"note: {missing}")
    if as_json:
        from hearth.parallel.planner.report import as_dict

        own = _as_it_stands(planning, loaded, device)
        print_json(as_dict(planning, top=top) | {"as_it_stands": own, "not_counted": missing})
        return
    _show(planning, num_tokens, top)
    click.echo(f"\nas the recipe stands: {_as_it_stands(planning, loaded, device)['summary']}")


def _tokens(text: str) -> int:
    from hearth.models.sizes import parse_size

    try:
        return parse_size(text)
    except ConfigError as error:
        message = f"--tokens {text!r} is no number of tokens"
        raise ConfigError(message, fix="write a number with M, B or T behind it: 15T") from error


@dataclass(frozen=True)
class _Hardware:
    """What the command line says of the devices."""

    number: int
    kind: str
    memory: str | None
    interconnect: str | None
    per_node: int | None
    price: float | None

    def check(self) -> None:
        """Refuse, before anything is built, what cannot be."""
        if self.price is not None and self.price < 0:
            raise ConfigError(f"--price {self.price} is negative")
        if self.kind != "cpu":
            self._table()
        elif self.interconnect is not None or self.per_node is not None:
            text = "--interconnect and --gpus-per-node say nothing of --gpu cpu"
            raise ConfigError(text, fix="leave them out")

    def cluster(self, recipe: Recipe, facts: ModelFacts) -> tuple[Cluster, Precision]:
        """The devices, and the arithmetic that train.precision: auto means on them."""
        if self.kind != "cpu":
            return self._table(), "bf16"
        from hearth.parallel.planner.calibration import cpu_precision, measure_cpu

        rows, length = recipe.train.micro_batch_size, recipe.data.sequence_length
        precision = cpu_precision(recipe.train.precision)
        found = measure_cpu(
            self.number,
            facts,
            tokens=length * (1 if rows == "auto" else rows),
            length=length,
            precision=precision,
            memory=self._bytes(),
            price=self.price,
        )
        return found, precision

    def _bytes(self) -> int | None:
        from hearth.parallel.planner.hardware import parse_bytes

        return None if self.memory is None else parse_bytes(self.memory)

    def _table(self) -> Cluster:
        from hearth.parallel.planner.hardware import make_cluster

        return make_cluster(
            self.number,
            gpu=self.kind,
            memory=self._bytes(),
            interconnect=self.interconnect,
            per_node=self.per_node,
            price=self.price,
        )


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
        click.echo(f"\n{_how_long(planning, tokens)}")
    whole = cost(planning, chosen, tokens or 1e9)
    if whole is not None:
        click.echo(f"cost of {tokens or 1e9:.3g} tokens: {whole:,.2f}")
    click.echo(f"\nfor the recipe:\n{paste(chosen)}")


def _as_it_stands(planning: Planning, recipe: Recipe, device: str) -> dict[str, Any]:
    """Whether the recipe's own layout fits, and how it does; else what is wrong with it."""
    from hearth.parallel.planner.choose import as_it_stands

    try:
        own = as_it_stands(planning, recipe.parallel, device=device)
    except ConfigError as error:
        return {"fits": False, "summary": str(error)}
    slower = own.step.seconds / planning.chosen.step.seconds
    text = f"it fits with {own.memory.total / _GIB:.1f} GiB and takes {own.step.seconds:.3g} s a step"
    return {
        "fits": True,
        "memory": round(own.memory.total),
        "step_seconds": own.step.seconds,
        "summary": f"{text}, {slower:.2f} times that of the plan",
    }


def _how_long(planning: Planning, tokens: int) -> str:
    """Days of so many tokens, without failures and with them."""
    chosen, cluster = planning.chosen, planning.cluster
    days = tokens / chosen.step.tokens_per_day
    text = f"{tokens:.3g} tokens: {days:,.3g} days without failures"
    if cluster.num_devices == 1:
        return text
    from hearth.parallel.simulation.run import Faults, simulate_many
    from hearth.parallel.simulation.study import saves_of

    outcome = simulate_many(
        rounds=_ROUNDS,
        step_seconds=chosen.step.seconds,
        num_steps=max(1, round(tokens / chosen.step.tokens)),
        num_devices=cluster.num_devices,
        faults=Faults(),
        saves=saves_of(planning.facts, cluster),
    )
    number = outcome.failures / _ROUNDS
    return (
        f"{text}; {days / outcome.goodput:,.3g} days with {number:,.0f} of them, at the rate of Llama 3's "
        f"report (goodput {outcome.goodput:.1%})"
    )
