"""Fine-tuning, of all weights and by every kind of adapter, lowers the loss on held-out answers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.models import import_llama2c, load_tokenizer
from hearth.training import Trainer
from hearth.training.peak_memory import peak_bytes
from hearth.workspace import Workspace

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{%- generation -%}"
    "{{ message.content }}{{ eos_token }}{%- endgeneration -%}{%- else -%}{{ message.content }}\n\n"
    "{%- endif -%}{%- endfor -%}"
)


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, and a template for it."""
    folder, out = shared_data / "stories260K", tmp_path_factory.mktemp("stories") / "model"
    import_llama2c(folder / "stories260K.bin", folder / "tok512.bin", out)
    tokenizer = load_tokenizer(out)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return out


def make_trainer(
    stories: Path, shared_data: Path, workspace: Workspace, adapter: dict[str, Any] | None
) -> Trainer:
    source = shared_data / "rasbt_instruct" / "instruction-data.json"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    rows = workspace.root / "instructions.jsonl"
    if not rows.is_file():
        found = json.loads(source.read_text())
        rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    recipe = Recipe.model_validate(
        {
            "model": {
                "base": str(stories),
                "adapter": {"rank": 8, "alpha": 16, **adapter} if adapter is not None else None,
            },
            "data": {
                "sources": [
                    {
                        "path": str(rows),
                        "format": "chat",
                        "prompt_field": "{instruction}\n{input}",
                        "response_field": "output",
                    }
                ],
                "validation_fraction": 0.1,
                "sequence_length": 256,
                "num_workers": 1,
            },
            "train": {
                "objective": "sft",
                "steps": 40,
                "batch_size": 8,
                "micro_batch_size": 8,
                "learning_rate": 1e-2 if adapter is not None else 1e-3,
                "weight_decay": 0.0,
                "warmup_steps": 4,
                "precision": "fp32",
            },
        }
    )
    return Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


KINDS = [{}, {"dora": True}, {"quantize": "nf4"}, {"quantize": "int8"}, {"quantize": "nf4", "dora": True}]


@pytest.mark.parametrize("adapter", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "lora")
def test_held_out_loss_falls(
    stories: Path, shared_data: Path, workspace_dir: Path, one_thread: None, adapter: dict[str, Any]
) -> None:
    with Workspace.open() as workspace:
        trainer = make_trainer(stories, shared_data, workspace, adapter)
        before = trainer.evaluate()["eval_loss"]
        frozen = trainer.model.get_base_model().get_input_embeddings().weight.clone()
        after = trainer.fit().summary["eval_loss"]
    logger.info("held-out loss of %s: %.3f to %.3f", adapter or "lora", before, after)
    assert after < before - 0.4
    assert torch.equal(trainer.model.get_base_model().get_input_embeddings().weight, frozen)


def test_held_out_loss_falls_when_all_weights_learn(
    stories: Path, shared_data: Path, workspace_dir: Path, one_thread: None
) -> None:
    with Workspace.open() as workspace:
        trainer = make_trainer(stories, shared_data, workspace, None)
        before = trainer.evaluate()["eval_loss"]
        after = trainer.fit().summary["eval_loss"]
    logger.info("held-out loss of all weights: %.3f to %.3f", before, after)
    assert after < before - 0.4


def test_quantised_bases_take_less_memory(one_thread: None) -> None:
    """Weights and peak of a step on a base of 20 M parameters, by the bytes of the tensors themselves."""
    from hearth.config.recipe import AdapterSection
    from hearth.models.building import model_from_config
    from hearth.models.sizes import config_for_size
    from hearth.training.adapter import add_adapter

    weights, peaks = {}, {}
    ids = torch.arange(128)[None]
    for quantize in ("none", "int8", "nf4"):
        base = model_from_config(config_for_size("20M", "qwen3", 1024, 256), seed=0)
        section = AdapterSection.model_validate({"rank": 8, "quantize": quantize})
        model = add_adapter(base, section, seed=0)
        held = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        weights[quantize] = sum(held.values())

        def step(model: Any = model) -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        peaks[quantize] = weights[quantize] + peak_bytes(step, torch.device("cpu"))
    for name, found in (("weights", weights), ("weights and step", peaks)):
        logger.info("%s in MiB: %s", name, {kind: value / 2**20 for kind, value in found.items()})
    assert weights["int8"] < 0.4 * weights["none"]
    assert weights["nf4"] < 0.25 * weights["none"]
    assert peaks["nf4"] < peaks["int8"] < peaks["none"]
