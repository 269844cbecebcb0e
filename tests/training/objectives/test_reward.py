"""The reward model: what transformers computes from the saved directory is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from hearth.config.recipe import AdapterSection
from hearth.errors import UnsupportedModelError
from hearth.models.reward_head import has_reward_head, with_reward_head
from hearth.training import Trainer
from hearth.training.adapter import add_adapter
from hearth.training.objectives.reward import scores
from hearth.training.samples import Sample
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]
MakeSamples = Callable[..., list[Sample]]


def padded_scores(model: Any, sequences: list[Any], pad: int) -> torch.Tensor:
    """As a user of transformers would: right padding and an attention mask."""
    width = max(len(tokens) for tokens in sequences)
    ids = torch.full((len(sequences), width), pad)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = torch.from_numpy(np.asarray(tokens))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]


def test_packed_scores_are_those_of_transformers_on_a_padded_batch(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    rows = samples(7)
    # An end-of-text token that is also the padding token: transformers reads the score before it.
    tokens, mask = rows[3].parts[1]
    rows[3] = Sample((rows[3].parts[0], (np.append(tokens, golden.PAD), np.append(mask, True))))
    trainer = trainer_of("reward", rows)
    trainer.start_objective()
    batch = trainer.objective.collate(trainer.rows, range(7))
    assert len(batch.input_ids_BT) < 14, "sequences share rows"
    with torch.no_grad():
        found = scores(trainer.model, batch)
    wanted = padded_scores(trainer.model, [part[0] for row in rows for part in row.parts], golden.PAD)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_scores_are_not_rounded_to_bfloat16(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    model = golden.make_model(1, reward=True).float()
    trainer = trainer_of("reward", samples(8), model=model, train={"precision": "bf16"})
    trainer.start_objective()
    batch = trainer.objective.collate(trainer.rows, range(8))
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(trainer.model, batch)
    found.sum().backward()
    assert found.dtype == trainer.model.score.weight.grad.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    wanted = scores(model, batch)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8}])
def test_what_is_saved_is_a_plain_directory_that_scores_alike(
    adapter: dict[str, Any] | None,
    trainer_of: MakeTrainer,
    samples: MakeSamples,
    golden: ModuleType,
    workspace: Workspace,
    tmp_path: Path,
) -> None:
    base = golden.make_model(0).float()
    base.save_pretrained(tmp_path / "base")
    sections: dict[str, Any] = {}
    model = with_reward_head(base, seed=5)
    if adapter is not None:
        sections = {"model": {"base": str(tmp_path / "base"), "adapter": adapter}}
        model = add_adapter(model, AdapterSection(**adapter), seed=0)
    start = model.state_dict()
    rows = samples(16)
    trainer = trainer_of(
        "reward",
        rows,
        model=model,
        sections=sections,
        workspace=workspace,
        train={"steps": 40, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2},
    )
    run = trainer.fit()
    directory = run.dir / "model"
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert not (directory / "generation_config.json").exists()
    saved, report = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert saved.config.num_labels == 1
    sequences = [part[0] for row in rows for part in row.parts]
    found = padded_scores(saved.eval(), sequences, golden.PAD).view(-1, 2)
    assert bool((found[:, 0] > found[:, 1]).all()), "40 steps on 16 pairs learn them by heart"
    head = next(
        w for name, w in start.items() if name.endswith(("score.weight", "score.original_module.weight"))
    )
    assert not torch.equal(saved.score.weight, head), "the head trains, with an adapter, too"
    if adapter is None:
        last = trainer.objective.collate(trainer.rows, range(16))
        trainer.model.eval()
        with torch.no_grad():
            torch.testing.assert_close(scores(trainer.model, last).view(-1, 2), found, rtol=1e-4, atol=1e-5)


def test_centring_brings_the_rewards_of_a_pair_to_opposite_sides(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    rows = samples(8)
    sums = []
    for weight in (0.0, 1.0):
        trainer = trainer_of(
            "reward",
            rows,
            preference={"center_weight": weight},
            train={"steps": 20, "learning_rate": 1e-2, "schedule": "constant"},
        )
        for step in range(20):
            result = trainer.train_step(step)
        sums.append(abs(result.metrics["chosen_reward"] + result.metrics["rejected_reward"]))
        assert result.metrics["accuracy"] > 0.8
    assert sums[1] < 0.5 * sums[0]


def test_the_head_depends_on_the_seed_alone_and_the_decoder_stays(golden: ModuleType) -> None:
    models = [golden.make_model(0) for _ in range(3)]
    state = torch.get_rng_state()
    first, second, other = (with_reward_head(m, seed=s) for m, s in zip(models, (1, 1, 2), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    decoder = golden.make_model(0).model
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, decoder.state_dict()[name])
    assert with_reward_head(first) is first
    assert has_reward_head(first)
    assert not has_reward_head(golden.make_model(0))


def test_a_model_with_learned_positions_scores_sequences_as_long_as_its_context(
    trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    config = GPT2Config(
        vocab_size=48,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    rng = np.random.default_rng(1)
    long = [(rng.integers(3, 40, 32), np.ones(32, bool)) for _ in range(2)]
    rows = [*samples(3), Sample(tuple(long))]
    trainer = trainer_of("reward", rows, model=with_reward_head(GPT2LMHeadModel(config)))
    assert np.isfinite(trainer.train_step(0).loss)


def test_an_architecture_without_such_a_head() -> None:
    config = BertConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
    )
    with pytest.raises(
        UnsupportedModelError, match="'bert' has no linear score head on the decoder"
    ) as caught:
        with_reward_head(BertLMHeadModel(config))
    assert "llama" in str(caught.value.fix)


def test_a_reward_model_is_no_causal_model(golden: ModuleType, tmp_path: Path) -> None:
    """The decoder is shared, the output layer is gone: nothing may open it and write text."""
    model = with_reward_head(golden.make_model(0))
    model.save_pretrained(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"], "transformers would start an output layer at random"
    from hearth.errors import ModelError
    from hearth.models import load_model

    with pytest.raises(ModelError, match="scores texts and writes none"):
        load_model(tmp_path)
