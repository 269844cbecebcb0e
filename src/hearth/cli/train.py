"""`hearth train RECIPE`: train a model from a recipe, or go on with a run that stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.training import TrainingPlan
    from hearth.workspace import Run, Workspace


@click.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", metavar="RUN", help="Go on with this run from its newest sound checkpoint.")
@click.option(
    "--sweep",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Run many trials: of this file, or (last on the line, without one) of the recipe's sweep section.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, in numbers, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    resume: str | None,
    sweep: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a model from RECIPE, a YAML or TOML file; KEY=VALUE overrides its settings.

    With --resume RUN the recipe may be left out: the run's own is used. Ctrl-C finishes the step, saves a
    checkpoint and prints the command that goes on.

    The result is scored on the held-out documents. With register.name it becomes a version, takes the parity
    gate and gets its aliases; exits with 1 when the gate fails.

    With --sweep the recipe is tried with many values of some of its keys; the same command goes on with a
    sweep that stopped. The best recipe, all results and a plot are left in the workspace's sweeps folder.
    """
    from hearth.workspace import Workspace

    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides, recipe = (recipe, *overrides), None
    if recipe is None and resume is None:
        raise ConfigError("no recipe given", fix="hearth train RECIPE, or hearth train --resume RUN")
    with Workspace.open() as workspace:
        loaded = _load(recipe, overrides, resume, workspace)
        if sweep is not None:
            if resume is not None or dry_run or recipe is None:
                raise _no_such_sweep()
            from hearth.cli import sweeping

            sweeping.run(loaded, sweep, workspace, name=recipe, quiet=quiet, as_json=as_json)
            return
        _advise(loaded, resuming=resume is not None)
        # torch and transformers take seconds to load; a recipe that is wrong is refused before that.
        from hearth.parallel.world import joined
        from hearth.training import Trainer
        from hearth.training.precision import choose_device

        with joined(loaded.parallel, choose_device()) as world:
            trainer = Trainer.from_recipe(
                loaded, workspace=workspace, resume=resume, progress=not quiet, world=world
            )
            if dry_run:
                if world.is_main:
                    _print_plan(trainer.plan(), as_json=as_json)
                return
            run = trainer.fit()
            del trainer  # the gate opens the model twice more: let go of the weights and the optimizer first
        if not world.is_main:
            return
        from hearth.cli.after_training import after_training

        facts = after_training(run, loaded, workspace, quiet=quiet)
        _print_result(run, facts, as_json=as_json)
    if not facts.get("parity", {}).get("passed", True):
        sys.exit(1)


def _no_such_sweep() -> ConfigError:
    return ConfigError(
        "--sweep takes a recipe, and neither --resume nor --dry-run",
        fix="give the same command again to go on with a sweep",
    )


def _advise(recipe: Recipe, *, resuming: bool) -> None:
    """Notes on settings that do not do what one may think."""
    if recipe.sweep is not None and not resuming:
        note("the recipe has a sweep section, which one run leaves aside; --sweep runs its trials")
    if recipe.train.objective in ("grpo", "ppo") and recipe.checkpoint.best_metric == "eval_loss":
        note(
            "the loss of a policy says nothing of its answers: checkpoint.best_metric=eval_reward "
            "checkpoint.best_mode=max keeps the checkpoint with the best ones"
        )


def _load(recipe: str | None, overrides: tuple[str, ...], resume: str | None, workspace: Workspace) -> Recipe:
    from hearth.config import load_recipe

    if recipe is None:
        assert resume is not None
        run = workspace.runs.get(resume)
        stored = run.dir / "recipe.yaml"
        if not stored.is_file():
            raise ConfigError(f"run {run.id} has no recipe", fix=f"hearth train RECIPE --resume {run.id}")
        # The stored recipe is complete; the environment of today must not change it.
        return load_recipe(stored, overrides, environ={}).recipe
    loaded = load_recipe(recipe, overrides).recipe
    if loaded.track.name is None:
        track = loaded.track.model_copy(update={"name": Path(recipe).stem})
        loaded = loaded.model_copy(update={"track": track})
    return loaded


def _print_plan(plan: TrainingPlan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.as_dict())
        return
    rows: list[tuple[str, str]] = [
        (
            "model",
            f"{plan.architecture}, {plan.num_parameters:,} parameters, "
            f"{plan.num_trainable_parameters:,} of them train",
        ),
        ("dataset", plan.dataset),
        ("rows", f"{plan.num_rows:,} of {plan.sequence_length} tokens; {plan.num_eval_rows:,} held out"),
        ("too long for a row", f"{plan.num_dropped:,} documents left out, {plan.num_truncated:,} cut off"),
        ("steps", f"{plan.steps:,} of {plan.batch_size} rows (micro-batches of {plan.micro_batch_size})"),
        ("tokens", f"{plan.total_tokens:,} with padding: {plan.epochs:.2f} epochs"),
        ("arithmetic", f"{plan.precision} on {plan.device}, {plan.flops_per_token:.3g} FLOP per token"),
        (
            "memory",
            f"about {plan.memory_bytes / 2**30:.2f} GiB"
            + (f" for each of {plan.num_processes} processes" if plan.num_processes > 1 else ""),
        ),
    ]
    print_table(("what", "how much"), rows, title="Plan")


def _print_result(run: Run, facts: dict[str, Any], *, as_json: bool) -> None:
    summary: dict[str, Any] = {"run": run.id, "status": run.status, **run.summary, **facts}
    if as_json:
        print_json(summary)
        return
    shown = [("run", run.id), ("steps", f"{summary['steps']:,}"), ("tokens", f"{summary['num_tokens']:,}")]
    for key, label in (("loss", "loss"), ("eval_loss", "held-out loss"), ("best_eval_loss", "best held-out")):
        if summary.get(key) is not None:
            shown.append((label, f"{summary[key]:.4f}"))
    for key in summary:
        if key.startswith("best_eval_") and key != "best_eval_loss" and summary[key] is not None:
            shown.append((key.replace("_eval_", " held-out "), f"{summary[key]:.4f}"))
    if summary.get("tokens_per_second") is not None:
        shown.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.1%}"))
    scores = summary.get("evaluation", {})
    if "bits_per_byte" in scores:
        beside = f"{scores['bits_per_byte']:.4f} (xz -9: {scores['xz_bits_per_byte']:.4f})"
        shown.append(("bits per byte", beside))
    shown.append(("model", summary["model_dir"]))
    if summary.get("version"):
        shown.append(("registered as", summary["version"]))
    if "parity" in summary:
        shown.append(("parity gate", "passed" if summary["parity"]["passed"] else "FAILED"))
    if summary.get("aliases"):
        shown.append(("aliases", ", ".join(summary["aliases"])))
    print_table(("result", ""), shown)
    from hearth.cli.after_training import how_to_use

    assert run.recipe is not None
    directory = summary["model_dir"]
    note(how_to_use(summary.get("version") or directory, Path(directory), run.recipe))
