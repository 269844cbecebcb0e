"""Each objective against its formula written out in a few lines: sequences alone, full logits, float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hearth.training import Trainer
from hearth.training.objectives.dpo import dpo_losses
from hearth.training.objectives.kto import mismatched
from hearth.training.objectives.orpo import log_odds
from hearth.training.samples import Sample
from hearth.training.totals import add_up

MakeTrainer = Callable[..., Trainer]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def logp(model: Any, part: tuple[Any, Any]) -> tuple[torch.Tensor, int]:
    """Summed log-probability of the masked tokens of one sequence alone, and their number."""
    tokens, mask = torch.from_numpy(part[0]), part[1]
    scores = model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
    at = [t for t in range(1, len(tokens)) if mask[t]]
    return sum(scores[t - 1, tokens[t]] for t in at), len(at)


def sigmoid_loss(margin: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-margin))


def expected_pairs(
    objective: str, policy: Any, reference: Any, rows: Sequence[Sample], s: dict[str, float]
) -> torch.Tensor:
    losses, token_loss, num_tokens = [], 0.0, 0
    for row in rows:
        (c, nc), (r, nr) = logp(policy, row.parts[0]), logp(policy, row.parts[1])
        with torch.no_grad():
            (cr, _), (rr, _) = logp(reference, row.parts[0]), logp(reference, row.parts[1])
        if objective == "dpo":
            d, e = s["beta"] * ((c - cr) - (r - rr)), s.get("label_smoothing", 0.0)
            losses.append((1 - e) * sigmoid_loss(d) + e * sigmoid_loss(-d))
        elif objective == "ipo":
            losses.append(((c - cr) / nc - (r - rr) / nr - 1 / (2 * s["beta"])) ** 2)
        elif objective == "simpo":
            losses.append(sigmoid_loss(s["beta"] * (c / nc - r / nr) - s["gamma"]))
        else:
            p, q = torch.exp(c / nc), torch.exp(r / nr)
            odds_ratio = (p / (1 - p)) / (q / (1 - q))
            losses.append(s["odds_weight"] * sigmoid_loss(torch.log(odds_ratio)))
        token_loss, num_tokens = token_loss - c, num_tokens + nc
    weight = s.get("sft_weight", 0.0) + (objective == "orpo")
    return torch.stack(losses).mean() + weight * token_loss / num_tokens


def expected_kto(policy: Any, reference: Any, rows: Sequence[Sample], s: dict[str, float]) -> torch.Tensor:
    shifts = []
    with torch.no_grad():
        for here, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
            part = mismatched(here, before, 32).parts[0]
            shifts.append(logp(policy, part)[0] - logp(reference, part)[0])
        z0 = max(torch.zeros(()).double(), torch.stack(shifts).mean())
    losses, token_loss, num_tokens = [], 0.0, 0
    for row in rows:
        value, count = logp(policy, row.parts[0])
        with torch.no_grad():
            usual, _ = logp(reference, row.parts[0])
        reward = value - usual
        if row.label:
            losses.append(s["desirable_weight"] * (1 - torch.sigmoid(s["beta"] * (reward - z0))))
            token_loss, num_tokens = token_loss - value, num_tokens + count
        else:
            losses.append(s["undesirable_weight"] * (1 - torch.sigmoid(s["beta"] * (z0 - reward))))
    return torch.stack(losses).mean() + s.get("sft_weight", 0.0) * token_loss / num_tokens


def expected_reward(model: Any, rows: Sequence[Sample], s: dict[str, float]) -> torch.Tensor:
    losses = []
    for row in rows:
        c, r = (model(torch.from_numpy(tokens)[None]).logits[0, 0] for tokens, _ in row.parts)
        losses.append(sigmoid_loss(c - r) + s.get("center_weight", 0.0) * (c + r) ** 2)
    return torch.stack(losses).mean()


CASES: list[tuple[str, dict[str, float]]] = [
    ("dpo", {"beta": 0.3}),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.6}),
    ("ipo", {"beta": 0.2, "sft_weight": 0.1}),
    ("kto", {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ("kto", {"beta": 0.4, "desirable_weight": 1.0, "undesirable_weight": 1.0, "sft_weight": 0.3}),
    ("orpo", {"odds_weight": 0.2, "sft_weight": 0.4}),
    ("simpo", {"beta": 2.0, "gamma": 0.5, "sft_weight": 0.2}),
    ("reward", {"center_weight": 0.1}),
]


def step_of(trainer: Trainer, rows: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss of a step over these rows, and all gradients."""
    trainer.model.zero_grad()
    batches = trainer.objective.batches(trainer, 0, list(rows))
    trainer.model.train()
    loss, _ = trainer._accumulate(batches, add_up(trainer.objective.counts(b) for b in batches))
    return loss, [w.grad.clone() for w in trainer.model.parameters() if w.grad is not None]


def prepared(trainer_of: MakeTrainer, golden: ModuleType, objective: str, rows: Any, **rest: Any) -> Trainer:
    """A trainer whose reference is the model of seed 1 and whose policy is that of seed 0."""
    trainer = trainer_of(objective, rows, model=golden.make_model(1, reward=objective == "reward"), **rest)
    trainer.start_objective()
    policy = golden.make_model(0, reward=objective == "reward")
    trainer.model.load_state_dict(policy.state_dict())
    return trainer


@pytest.mark.parametrize(("objective", "settings"), CASES)
def test_loss_and_gradient_are_those_of_the_formula(
    objective: str,
    settings: dict[str, float],
    trainer_of: MakeTrainer,
    samples: Callable[..., list[Sample]],
    golden: ModuleType,
) -> None:
    rows = samples(6, num_parts=1 if objective == "kto" else 2)
    mode = {"reference": "model"} if objective in ("dpo", "ipo", "kto") else {}
    trainer = prepared(trainer_of, golden, objective, rows, preference={**settings, **mode})
    loss, gradients = step_of(trainer, range(6))
    policy = golden.make_model(0, reward=objective == "reward")
    reference = golden.make_model(1)
    if objective == "reward":
        wanted = expected_reward(policy, rows, settings)
    elif objective == "kto":
        wanted = expected_kto(policy, reference, rows, settings)
    else:
        wanted = expected_pairs(objective, policy, reference, rows, settings)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), **EXACT)
    found = [w.grad for w in policy.parameters() if w.grad is not None]
    assert len(found) == len(gradients)
    for got, right in zip(gradients, found, strict=True):
        torch.testing.assert_close(got, right, **EXACT)


@pytest.mark.parametrize(("objective", "settings"), CASES)
def test_no_way_of_cutting_a_step_changes_it(
    objective: str,
    settings: dict[str, float],
    trainer_of: MakeTrainer,
    samples: Callable[..., list[Sample]],
    golden: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches of 1, 2, 3 and 6 rows, packed or each sequence in a row of its own."""
    rows = samples(6, num_parts=1 if objective == "kto" else 2, seed=4)
    has_reference = objective in ("dpo", "ipo", "kto")
    results = []
    ways = [
        (6, True, "model"),
        (1, True, "precompute"),
        (2, True, "precompute"),
        (3, False, "model"),
        (6, False, "precompute"),
    ]
    for size, packed, mode in ways:
        with monkeypatch.context() as patch:
            if not packed:
                alone = lambda lengths, _: [[piece] for piece in range(len(lengths))]  # noqa: E731
                patch.setattr("hearth.training.samples.first_fit", alone)
            trainer = prepared(
                trainer_of,
                golden,
                objective,
                rows,
                train={"micro_batch_size": size},
                preference={**settings, **({"reference": mode} if has_reference else {})},
            )
            results.append(step_of(trainer, trainer.step_rows(0)))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], **EXACT)
        for got, right in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(got, right, **EXACT)


def test_the_baseline_of_kto_is_positive_in_one_of_the_cases_and_matters(
    trainer_of: MakeTrainer, samples: Callable[..., list[Sample]], golden: ModuleType
) -> None:
    rows = samples(6, num_parts=1)
    found = []
    for start, end in ((1, 0), (0, 1)):
        trainer = trainer_of("kto", rows, model=golden.make_model(start), preference={"reference": "model"})
        trainer.start_objective()
        trainer.model.load_state_dict(golden.make_model(end).state_dict())
        (batch,) = trainer.objective.batches(trainer, 0, range(6))
        found.append(float(batch.extras["baseline"]))
        s = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
        wanted = expected_kto(golden.make_model(end), golden.make_model(start), rows, s)
        torch.testing.assert_close(step_of(trainer, range(6))[0], wanted.detach(), **EXACT)
    assert min(found) == 0.0
    assert max(found) > 0.1


def test_a_mismatched_sequence_has_the_prompt_of_one_and_the_answer_of_the_other() -> None:
    first = Sample(((np.array([5, 6, 7, 8, 9]), np.array([0, 0, 0, 1, 1], bool)),))
    second = Sample(((np.array([15, 16, 17]), np.array([0, 1, 0], bool)),))
    (tokens, mask), *_ = mismatched(first, second, 32).parts
    assert tokens.tolist() == [5, 6, 7, 16, 17]
    assert mask.tolist() == [False, False, False, True, False]
    (tokens, mask), *_ = mismatched(first, second, 3).parts
    assert tokens.tolist() == [5, 6, 7, 16], "cut at the end; one token of the answer always stays"
    assert mask.tolist() == [False, False, False, True]


def test_label_smoothing_has_its_minimum_where_the_odds_are_those_of_the_noise() -> None:
    margins = torch.linspace(-4, 6, 2001, dtype=torch.float64)
    best = margins[dpo_losses(margins, 0.1).argmin()]
    assert float(best) == pytest.approx(np.log(0.9 / 0.1), abs=0.01)
    assert dpo_losses(margins, 0.0)[-1] < dpo_losses(margins, 0.0)[1000]


def test_log_odds_stay_finite_with_finite_gradients_at_both_ends() -> None:
    ends = torch.tensor([0.0, -1e-9, -0.5, -30.0, -2e3], requires_grad=True)
    odds = log_odds(ends)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(ends.grad).all()
    assert odds[2].item() == pytest.approx(np.log(np.exp(-0.5) / (1 - np.exp(-0.5))), rel=1e-5)


def test_pairs_given_to_kto_are_twice_as_many_answers(
    trainer_of: MakeTrainer, samples: Callable[..., list[Sample]], golden: ModuleType
) -> None:
    pairs = samples(4)
    answers = [Sample((part,), 1.0 - side) for pair in pairs for side, part in enumerate(pair.parts)]
    found = []
    for rows in (pairs, answers):
        sizes = {"batch_size": 8, "micro_batch_size": 4}
        trainer = prepared(trainer_of, golden, "kto", rows, train=sizes, preference={"reference": "model"})
        assert len(trainer.rows) == 8
        found.append(step_of(trainer, trainer.step_rows(0)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(*both) for both in zip(found[0][1], found[1][1], strict=True))
