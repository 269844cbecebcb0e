"""What cannot work is refused with the key or row, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hearth.errors import ConfigError, DataError
from hearth.training import Trainer
from hearth.training.samples import Sample

MakeTrainer = Callable[..., Trainer]
MakeSamples = Callable[..., list[Sample]]
PAIRED = ["dpo", "ipo", "orpo", "simpo", "reward"]


def first_step(trainer: Trainer) -> Any:
    return trainer.train_step(0)


@pytest.mark.parametrize(
    ("objective", "preference", "message"),
    [
        ("dpo", {"gamma": 0.7}, "train.preference.gamma is 0.7, but the objective dpo does not read it"),
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing is 0.1, but the objective ipo"),
        ("simpo", {"reference": "model"}, "reference is model, but the objective simpo"),
        ("orpo", {"beta": 0.2}, "beta is 0.2, but the objective orpo"),
        ("kto", {"odds_weight": 0.2}, "odds_weight is 0.2, but the objective kto"),
        ("reward", {"beta": 0.2}, "beta is 0.2, but the objective reward"),
        ("reward", {"sft_weight": 0.2}, "sft_weight is 0.2, but this model has no tokens"),
        ("dpo", {"center_weight": 0.1}, "center_weight is 0.1, but the objective dpo"),
        ("dpo", {"reference": "adapter"}, "reference is adapter, but the recipe has no model.adapter"),
    ],
)
def test_settings_without_effect_are_refused(
    objective: str, preference: dict[str, Any], message: str, trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    rows = samples(4, num_parts=1 if objective == "kto" else 2)
    with pytest.raises(ConfigError, match=message) as caught:
        trainer_of(objective, rows, preference=preference)
    assert caught.value.fix


def test_an_adapter_that_is_in_the_recipe_but_not_on_the_model(
    trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    trainer = trainer_of(
        "dpo",
        samples(4),
        sections={"model": {"base": "x", "adapter": {"rank": 2}}},
        preference={"reference": "adapter"},
    )
    with pytest.raises(ConfigError, match="reference is adapter, but the model has no adapter") as caught:
        trainer.start_objective()
    assert "precompute or model" in str(caught.value.fix)


def test_an_unknown_objective_and_its_nearest_name(trainer_of: MakeTrainer, samples: MakeSamples) -> None:
    with pytest.raises(ConfigError, match=r"train\.objective 'dpoo' is unknown") as caught:
        trainer_of("dpoo", samples(2))
    assert caught.value.fix == "did you mean dpo?"


def test_kto_needs_others_in_its_step(trainer_of: MakeTrainer, samples: MakeSamples) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1, but kto"):
        trainer_of("kto", samples(4, num_parts=1), train={"batch_size": 1, "micro_batch_size": 1})


@pytest.mark.parametrize("objective", [*PAIRED, "kto"])
def test_no_samples(objective: str, trainer_of: MakeTrainer) -> None:
    with pytest.raises(DataError, match="no rows"):
        trainer_of(objective, [], train={"batch_size": 2, "micro_batch_size": 2})


@pytest.mark.parametrize("objective", [*PAIRED, "kto"])
def test_rows_that_are_no_samples(objective: str, trainer_of: MakeTrainer) -> None:
    with pytest.raises(DataError, match="a row is a dict, the objective needs"):
        trainer_of(objective, [{"input_ids": [1, 2]}, {"input_ids": [1, 2]}])


@pytest.mark.parametrize("objective", PAIRED)
def test_a_pair_with_one_answer(objective: str, trainer_of: MakeTrainer, samples: MakeSamples) -> None:
    rows = [*samples(3), samples(1, num_parts=1)[0]]
    trainer = trainer_of(objective, rows)
    with pytest.raises(DataError, match=f"row 3 has 1 sequences, {objective} needs 2"):
        first_step(trainer)


@pytest.mark.parametrize(("objective", "longest"), [*((name, 33) for name in PAIRED[:4]), ("reward", 32)])
def test_a_sample_longer_than_a_row(
    objective: str, longest: int, trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    def of_length(count: int) -> Sample:
        rng = np.random.default_rng(1)
        parts = [(rng.integers(3, 40, length), np.arange(length) > 2) for length in (5, count)]
        return Sample(tuple(parts))

    fits = trainer_of(objective, [*samples(3), of_length(longest)])
    assert np.isfinite(first_step(fits).loss)
    trainer = trainer_of(objective, [*samples(3), of_length(longest + 1)])
    with pytest.raises(
        DataError,
        match=f"the rejected answer of row 3 has {longest + 1} tokens with its prompt; {longest} fit",
    ) as caught:
        first_step(trainer)
    assert "data.sequence_length" in str(caught.value.fix)


@pytest.mark.parametrize("objective", [*PAIRED[:4], "kto"])
def test_labels_all_masked(objective: str, trainer_of: MakeTrainer, samples: MakeSamples) -> None:
    rows = samples(4, num_parts=1 if objective == "kto" else 2)
    tokens, mask = rows[2].parts[0]
    rows[2] = dataclasses.replace(rows[2], parts=((tokens, np.zeros_like(mask)), *rows[2].parts[1:]))
    trainer = trainer_of(objective, rows)
    who = "the answer" if objective == "kto" else "the chosen answer"
    with pytest.raises(DataError, match=f"{who} of row 2 has no token that counts") as caught:
        first_step(trainer)
    assert "hearth data inspect --masks" in str(caught.value.fix)


@pytest.mark.parametrize("objective", PAIRED)
def test_answers_that_are_all_the_same(objective: str, trainer_of: MakeTrainer, samples: MakeSamples) -> None:
    rows = [dataclasses.replace(row, parts=(row.parts[0], row.parts[0])) for row in samples(4)]
    with pytest.raises(DataError, match="the chosen and the rejected answer are the same") as caught:
        trainer_of(objective, rows)
    assert "chosen_field" in str(caught.value.fix)


@pytest.mark.parametrize("objective", ["dpo", "simpo", "reward"])
def test_one_tie_among_others_pulls_nowhere(
    objective: str, trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    """A tie adds a constant to the loss: the gradient of the others is only averaged over one more."""
    rows = samples(3)
    tie = dataclasses.replace(rows[0], parts=(rows[1].parts[0], rows[1].parts[0]))
    gradients = []
    for chosen in (rows, [*rows, tie]):
        trainer = trainer_of(objective, chosen)
        trainer.start_objective()
        batches = trainer.objective.batches(trainer, 0, range(len(chosen)))
        trainer._accumulate(batches, {"pairs": float(len(chosen))})
        gradients.append([w.grad.clone() for w in trainer.model.parameters() if w.grad is not None])
    for alone, beside in zip(*gradients, strict=True):
        # Llama's norms compute in float32 whatever the model's type is.
        torch.testing.assert_close(beside, alone * 3 / 4, rtol=1e-4, atol=1e-6)


def test_a_reward_model_needs_a_scalar_head(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    trainer = trainer_of("reward", samples(4), model=golden.make_model(0))
    with pytest.raises(ConfigError, match="needs one linear score head, LlamaForCausalLM has none"):
        trainer.start_objective()
