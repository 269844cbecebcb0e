"""The example recipes as a user runs them, on a tiny base and a few prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.cli.main import main
from hearth.config import Recipe
from hearth.training import Trainer
from hearth.workspace import Workspace

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"


@pytest.fixture
def base(workspace: Workspace, make_recipe: Callable[..., Recipe], chats: Path) -> str:
    """A model that has seen conversations, under the name that the recipes start from."""
    recipe = make_recipe(
        data={"sources": [{"path": str(chats), "format": "chat"}], "sequence_length": 64},
        train={"objective": "sft", "steps": 4},
        register={"name": "stdlib-assistant"},
    )
    Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu").fit()
    return "stdlib-assistant"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}", "level": n % 3} for n in range(40)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_recipe_runs_from_prompts_to_a_version(
    name: str, base: str, questions: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"path": str(questions), "format": "prompts", "prompt_field": "question"}
    rewards: list[dict[str, Any]] = [{"name": "length", "options": {"target": 4}}]
    overrides = [
        f"data.sources={json.dumps([source])}",
        "data.validation_fraction=0.2",
        "data.sequence_length=64",
        "data.num_workers=1",
        "train.reinforce.max_new_tokens=8",
        "train.reinforce.num_generations=4",
        "train.steps=4",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "train.warmup_steps=0",
        "train.evaluate_every=2",
        "train.evaluate_rows=4",
        "evaluate.parity_prompts=2",
        *([f"train.reinforce.rewards={json.dumps(rewards)}"] if name == "ppo" else []),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(RECIPES / f"{name}.yaml"), *overrides, "--quiet", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    assert workspace.registry.get(f"{base}-{name}").ref == found["version"]
    assert "best_eval_reward" in json.dumps(found)
