"""Rounds of rollouts: what is drawn, what a batch knows, and that a run that stops goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError, DataError, Interrupted, TrainingError
from hearth.training import Trainer
from hearth.training.batches import IGNORE
from hearth.training.objectives.reinforce import ADVANTAGES, ENGINE, OLD, REFERENCE
from hearth.training.rollouts.batching import label_order
from hearth.training.rollouts.source import draw_seed
from hearth.training.samples import Sample
from hearth.training.totals import add_up
from hearth.workspace import Workspace

Make = Callable[..., Any]
OBJECTIVES = ["grpo", "ppo"]


def step_of(trainer: Trainer, step: int = 0) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of a step, without taking it."""
    trainer.start_objective()
    batches = trainer.objective.batches(trainer, step, trainer.step_rows(step))
    trainer.model.train()
    expected = add_up(trainer.objective.counts(batch) for batch in batches)
    loss, metrics = trainer._accumulate(batches, expected)
    gradients = {n: w.grad.clone() for n, w in trainer.model.named_parameters() if w.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    return float(loss), metrics, gradients


def texts(trainer: Trainer, step: int = 0) -> list[list[int]]:
    """The answers of a step, by prompt and generation."""
    trainer.start_objective()
    found = []
    for batch in trainer.objective.batches(trainer, step, trainer.step_rows(step)):
        labels = batch.labels_BT[batch.labels_BT != IGNORE][label_order(batch)]
        assert batch.sequences is not None
        segments = batch.segment_ids_BT[batch.labels_BT != IGNORE].sort().values
        found += [labels[segments == s].tolist() for s in range(len(batch.sequences))]
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_ratio_is_exactly_one_at_first(objective: str, trainer_of: Make, prompts: Make) -> None:
    for iterations in (1, 2):
        trainer = trainer_of(
            objective,
            prompts(4, varied=True),
            reinforce={"iterations": iterations},
            train={"micro_batch_size": 2},
        )
        _, metrics, _ = step_of(trainer)
        assert metrics["ratio"] == 1.0
        assert metrics["clip_share"] == 0.0
        assert metrics["engine_mismatch"] < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", ["tokens", "sequences"])
def test_a_step_does_not_depend_on_micro_batches_and_packing(
    objective: str, loss: str, trainer_of: Make, prompts: Make, policy: Make
) -> None:
    found = []
    for size in (1, 2, 4):
        trainer = trainer_of(
            objective,
            prompts(4, varied=True),
            model=policy().double(),
            train={"micro_batch_size": size},
            reinforce={"loss": loss, "kl_weight": 0.1},
        )
        trainer.start_objective()
        with torch.no_grad():  # away from the reference
            for weight in trainer.model.model.parameters():
                weight.mul_(1.05)
        found.append(step_of(trainer))
    for loss_value, metrics, gradients in found[1:]:
        assert loss_value == pytest.approx(found[0][0], rel=1e-12)
        assert metrics == pytest.approx(found[0][1], rel=1e-10, abs=1e-14)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, found[0][2][name], rtol=1e-9, atol=1e-15), name


def test_a_batch_knows_the_tokens_of_its_answers(trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of(
        "grpo",
        prompts(4, varied=True),
        reinforce={"iterations": 2, "kl_weight": 0.1, "temperature": 1.0},
        train={"micro_batch_size": 2},
    )
    trainer.start_objective()
    rows = trainer.step_rows(0)
    batches = trainer.objective.batches(trainer, 0, rows)
    assert [batch.rows for batch in batches] == [tuple(rows[:2]), tuple(rows[2:])]
    for batch in batches:
        assert len(batch.sequences) == 8
        assert batch.num_valid == len(batch.extras[OLD]) == len(batch.extras[ADVANTAGES])
        # The reference is the policy still, and the engine agrees with the trainer token by token.
        assert torch.equal(batch.extras[OLD], batch.extras[REFERENCE])
        assert torch.allclose(batch.extras[OLD], batch.extras[ENGINE], atol=1e-4)
        # An answer has one advantage, and those of a group cancel.
        segments = batch.segment_ids_BT[batch.labels_BT != IGNORE]
        by_answer = [batch.extras[ADVANTAGES][segments == s].unique() for s in range(8)]
        assert all(len(each) == 1 for each in by_answer)
        assert torch.cat(by_answer).view(2, 4).sum(1).abs().max() < 1e-9


def test_the_stop_token_counts_and_what_is_cut_off_has_none(
    trainer_of: Make, prompts: Make, tokenizer: Any
) -> None:
    trainer = trainer_of("grpo", prompts(8), reinforce={"num_generations": 16})
    found = texts(trainer)
    stop = tokenizer.eos_token_id
    ended = [each for each in found if stop in each]
    cut = [each for each in found if stop not in each]
    assert ended
    assert cut
    assert all(each.index(stop) == len(each) - 1 for each in ended)
    assert all(len(each) == 6 for each in cut)
    _, metrics, _ = step_of(trainer)
    assert metrics["truncated"] == pytest.approx(len(cut) / len(found))
    assert metrics["completion_length"] == pytest.approx(sum(map(len, found)) / len(found))


def test_what_is_drawn_follows_from_seed_step_prompt_and_generation(trainer_of: Make, prompts: Make) -> None:
    rows = [prompts(1)[0]] * 4  # one prompt four times
    first = texts(trainer_of("grpo", rows))
    assert texts(trainer_of("grpo", rows, train={"micro_batch_size": 2})) == first
    assert len({tuple(each) for each in first}) > 8, "every generation throws its own dice"
    assert texts(trainer_of("grpo", rows, train={"seed": 1})) != first
    assert texts(trainer_of("grpo", rows), step=1) != first
    assert len({draw_seed(s, t, p) for s in range(9) for t in range(-1, 9) for p in range(9)}) == 9 * 10 * 9


def test_groups_without_variance_give_no_gradient_and_are_counted(
    trainer_of: Make, prompts: Make, module_of: Make
) -> None:
    name = module_of(
        judge=lambda found: [float(a.fields["number"] == 0 and "a" in a.completion) for a in found]
    )
    trainer = trainer_of("grpo", prompts(4), reinforce={"rewards": [{"name": f"{name}:judge"}]})
    _, metrics, _ = step_of(trainer)
    assert metrics["groups_without_variance"] == 0.75
    assert 0 < metrics["reward"] < 0.25
    nothing = module_of(judge=lambda found: [0.3] * len(found))
    trainer = trainer_of("grpo", prompts(4), reinforce={"rewards": [{"name": f"{nothing}:judge"}]})
    _, metrics, gradients = step_of(trainer)
    assert metrics["groups_without_variance"] == 1.0
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_rewards_see_texts_and_columns(trainer_of: Make, prompts: Make, module_of: Make) -> None:
    seen: list[Any] = []

    def judge(found: Any, *, bonus: float) -> list[float]:
        seen.extend(found)
        return [bonus] * len(found)

    rewards = [
        {"name": f"{module_of(judge=judge)}:judge", "options": {"bonus": 2.0}, "weight": 3.0},
        {"name": "length", "options": {"target": 3}},
    ]
    trainer = trainer_of("grpo", prompts(2), reinforce={"rewards": rewards})
    _, metrics, _ = step_of(trainer)
    first, second = trainer.step_rows(0)
    assert [each.prompt for each in seen] == [f"{'ab'[first]}="] * 4 + [f"{'ab'[second]}="] * 4
    assert seen[0].fields == {"answer": "ab"[first], "number": first}
    assert all("<eos>" not in each.completion for each in seen)
    assert metrics["reward_rewards_of_a_test_0.judge"] == 2.0
    assert metrics["reward_rewards_of_a_test_0.judge_std"] == 0.0
    assert metrics["reward"] == pytest.approx(6.0 + metrics["reward_length"])
    assert metrics["reward_length_std"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_reach_the_engine_after_every_step(objective: str, trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of(objective, prompts(4), train={"learning_rate": 0.05})
    for step in range(3):
        result = trainer.train_step(step)
        assert result.metrics["engine_mismatch"] < 1e-4
        engine = trainer.objective._source._engine
    assert engine is trainer.objective._source._engine
    assert engine.stats().generation_tokens > 0


def test_a_second_iteration_learns_from_the_same_answers(trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of(
        "grpo", prompts(8), train={"batch_size": 4, "micro_batch_size": 4}, reinforce={"iterations": 2}
    )
    first = texts(trainer, 0)
    results = [trainer.train_step(0), trainer.train_step(1)]
    assert texts(trainer, 1) == first
    assert results[0].metrics["ratio"] == 1.0
    assert results[1].metrics["ratio"] != 1.0
    assert results[0].metrics["reward"] == results[1].metrics["reward"]
    rows = [
        batch.rows
        for step in (2, 3)
        for batch in trainer.objective.batches(trainer, step, trainer.step_rows(step))
    ]
    assert rows == [tuple(trainer.step_rows(1))] * 2, "no prompt is left out"


def test_a_trial_on_a_copy_leaves_the_round_alone(trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of("grpo", prompts(4), reinforce={"iterations": 2})
    trainer.train_step(0)
    before = texts(trainer, 1)
    trainer.measure_step_seconds(2)
    assert texts(trainer, 1) == before


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stop_after", [2, 3])  # at the end of a round, and inside one
def test_a_run_that_stopped_goes_on_bit_for_bit(
    objective: str, stop_after: int, trainer_of: Make, prompts: Make, workspace: Workspace
) -> None:
    settings: dict[str, Any] = {
        "train": {"steps": 6, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.02},
        "reinforce": {"iterations": 2, "kl_weight": 0.05},
        "workspace": workspace,
    }
    rows = prompts(8, varied=True)
    whole = trainer_of(objective, rows, **settings)
    whole.fit()

    stopped = trainer_of(objective, rows, **settings)
    take = stopped.train_step

    def train_step(step: int) -> Any:
        result = take(step)
        if step + 1 == stop_after:
            stopped.request_stop()
        return result

    stopped.train_step = train_step
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = trainer_of(objective, rows, resume=stopped.run.id, **settings)
    resumed.fit()
    for (name, weight), (_, other) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert whole.state.last_loss == resumed.state.last_loss


def test_a_reward_that_fails_ends_the_run_before_any_weight_changes(
    trainer_of: Make, prompts: Make, module_of: Make, workspace: Workspace
) -> None:
    name = module_of(judge=lambda found: [float("nan")] * len(found))
    trainer = trainer_of(
        "grpo", prompts(4), reinforce={"rewards": [{"name": f"{name}:judge"}]}, workspace=workspace
    )
    before = {n: w.clone() for n, w in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match=r"gave nan, which is no finite number; prompt '[a-d]='"):
        trainer.fit()
    assert all(torch.equal(w, before[n]) for n, w in trainer.model.named_parameters())
    assert trainer.run.status == "failed"


def test_an_evaluation_answers_held_out_prompts(trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of("grpo", prompts(4), eval_dataset=prompts(3))
    first = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_completion_length"} <= first.keys()
    assert trainer.evaluate() == first
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"num_generations": 1}, r"num_generations is 1, but grpo compares"),
    ("grpo", {"num_generations": 200}, r"num_generations is 200\n  fix: use at most 128"),
    ("grpo", {"value_clip": 0.3}, r"value_clip is 0\.3, but the objective grpo does not read it"),
    ("ppo", {"scale_advantages": False}, r"scale_advantages is False, but the objective ppo"),
    ("grpo", {"rewards": []}, r"rewards is empty"),
    ("ppo", {"rewards": [{"name": "nonsense"}]}, r"'nonsense' is unknown"),
    (
        "grpo",
        {"max_new_tokens": 16},
        r"max_new_tokens 16 leaves no room for a prompt in data\.sequence_length",
    ),
]


@pytest.mark.parametrize(("objective", "reinforce", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused_before_anything_is_built(
    objective: str, reinforce: dict[str, Any], message: str, trainer_of: Make, prompts: Make
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(objective, prompts(2), reinforce=reinforce)


def test_a_step_that_cannot_be_cut_is_refused(trainer_of: Make, prompts: Make) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of micro_batch_size 3"):
        trainer_of("grpo", prompts(4), train={"micro_batch_size": 3})


def test_no_tokenizer(trainer_of: Make, prompts: Make) -> None:
    trainer = trainer_of("grpo", prompts(2), tokenizer=None)
    with pytest.raises(ConfigError, match="grpo needs a tokenizer"):
        trainer.train_step(0)


def test_no_value_head(trainer_of: Make, prompts: Make, policy: Make) -> None:
    trainer = trainer_of("ppo", prompts(2))
    trainer.model = policy()
    with pytest.raises(ConfigError, match=r"needs a model with a value head\n  fix: .*with_value_head"):
        trainer.train_step(0)


def test_a_prompt_that_leaves_no_room_for_an_answer(trainer_of: Make, prompts: Make) -> None:
    import numpy as np

    long = Sample(((np.full(11, 5, np.int64), np.zeros(11, np.bool_)),), fields={"answer": "a"})
    trainer = trainer_of("grpo", [*prompts(1), long])
    with pytest.raises(DataError, match=r"row 1 has 11 tokens; .* 16 less .*max_new_tokens 6 leaves 10"):
        trainer.train_step(0)
    with pytest.raises(ConfigError, match=r"sequence_length 65 exceeds the model's context of 64"):
        trainer_of("grpo", prompts(1), sections={"data": {"sequence_length": 65}}).train_step(0)


def test_a_value_head_is_in_checkpoints_and_not_in_the_result(
    trainer_of: Make, prompts: Make, workspace: Workspace, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from hearth.models import load_model
    from hearth.training.checkpoint.export import export_checkpoint

    trainer = trainer_of("ppo", prompts(4), train={"steps": 2, "learning_rate": 0.01}, workspace=workspace)
    run = trainer.fit()
    head = trainer.model.value_head
    assert head.weight.abs().sum() > 0
    saved = load_file(run.dir / "model" / "model.safetensors")
    assert not [name for name in saved if "value_head" in name]
    exported = export_checkpoint(run, tmp_path / "exported", workspace=workspace)
    for directory in (run.dir / "model", exported.directory):
        for name, weight in load_model(directory).named_parameters():
            assert torch.equal(weight, trainer.model.get_parameter(name)), name
