"""What a recipe asks for once its run has ended: evaluation, the parity gate, aliases; and what to do then.

Evaluation lies above training in the layers, so `hearth train` does this and ``Trainer.fit`` does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.cli.output import note, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hearth.config import Recipe
    from hearth.workspace import Run, Workspace

_CONVERSATIONS = {"chat", "stdlib-chat", "preference", "feedback", "prompts"}


def after_training(run: Run, recipe: Recipe, workspace: Workspace, *, quiet: bool = False) -> dict[str, Any]:
    """Do what the sections ``evaluate`` and ``register`` ask for; facts for the printed summary.

    ``evaluation`` holds the scores on the held-out documents, ``parity`` the verdict on the registered
    version, ``aliases`` those that now point to it: none unless the gate has passed.
    """
    facts: dict[str, Any] = {}
    version = run.summary.get("version")
    if not _writes_text(Path(run.summary["model_dir"])):
        note("the model scores answers and writes none: no bits per byte, no parity gate, no aliases")
        return facts
    if recipe.evaluate.bits_per_byte:
        report = _evaluate(version or run.summary["model_dir"], run, workspace, quiet=quiet)
        if report is not None:
            facts["evaluation"] = report
    if version is not None and recipe.evaluate.parity:
        facts["parity"] = _run_gate(version, recipe, workspace, quiet=quiet)
    if version is not None:
        facts["aliases"] = []
        if facts.get("parity", {}).get("passed"):
            for alias in recipe.register_.aliases:
                workspace.registry.promote(version, alias)
                facts["aliases"].append(alias)
    return facts


def _writes_text(model_dir: Path) -> bool:
    """Whether it is a causal language model, and no reward model."""
    architectures = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["architectures"]
    return not any(str(name).endswith("ForSequenceClassification") for name in architectures)


def how_to_use(model: str, directory: Path, recipe: Mapping[str, Any]) -> str:
    """The command to try next with what a run has left, by what it has learnt."""
    if not _writes_text(directory):
        return f"use it with objective grpo or ppo: train.reinforce.rewards=[{{model: {model}}}]"
    formats = {source["format"] for source in recipe["data"]["sources"]}
    if formats & _CONVERSATIONS or recipe["train"]["objective"] == "sft":
        return f"try it: hearth chat {model}"
    if (
        recipe["data"].get("fim") is not None
        and recipe["model"]["base"] is recipe["tokenizer"]["base"] is None
    ):
        return f"try it: hearth generate {model} '<|fim_prefix|>def <|fim_suffix|>    return a<|fim_middle|>'"
    return f"try it: hearth generate {model} 'Once upon a time'"


def _evaluate(model: str, run: Run, workspace: Workspace, *, quiet: bool) -> dict[str, Any] | None:
    from hearth.data import Dataset
    from hearth.data.manifest import SAMPLE_PARTS
    from hearth.evaluation import evaluate_model

    directory = Path(run.summary["dataset_dir"])
    dataset = Dataset.open(directory)
    if dataset.manifest.kind in SAMPLE_PARTS:
        return None  # a comparison is no text: the objective's own figures are in the run
    if dataset.split("validation").num_documents == 0:
        note("nothing was held out (data.validation_fraction is 0), so there is nothing to evaluate on")
        return None
    with _progress("scoring", "tokens", quiet=quiet) as advance:
        return evaluate_model(model, workspace=workspace, dataset=directory, advance=advance)


def _run_gate(version: str, recipe: Recipe, workspace: Workspace, *, quiet: bool) -> dict[str, Any]:
    from hearth.evaluation import run_gate

    section = recipe.evaluate
    with _progress("parity gate", "prompts", quiet=quiet) as advance:
        report = run_gate(
            version,
            workspace=workspace,
            num_prompts=section.parity_prompts,
            max_tokens=section.parity_tokens,
            advance=advance,
        )
    if not report.passed:
        note(report.render())
        if aliases := ", ".join(recipe.register_.aliases):
            note(f"the aliases {aliases} were not set: the parity gate has failed")
    return {"passed": report.passed, "dtype": report.dtype, "num_prompts": len(report.prompts)}


@contextmanager
def _progress(title: str, unit: str, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    if quiet:
        yield None
        return
    with progress_bar(title, unit=unit) as advance:
        yield advance
