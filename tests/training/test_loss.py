"""The loss against plain torch, and its invariances in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hearth.config import Recipe
from hearth.training import loss as loss_module
from hearth.training.batches import Batch, collate
from hearth.training.loss import linear_cross_entropy_sum, split_head, token_loss_sum
from hearth.training.objectives.pretrain import Pretrain
from hearth.training.objectives.sft import SupervisedFineTuning

Make = Callable[..., Any]


@pytest.mark.parametrize("num", [1, 63, 64, 200])
def test_linear_cross_entropy_equals_torch(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 64 * 37)
    hidden = torch.randn(num, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (num,))
    ours = linear_cross_entropy_sum(hidden, weight, labels)
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(3.0 * loss, (hidden, weight)) for loss in (ours, theirs)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)


def test_linear_cross_entropy_under_autocast_is_near_float32() -> None:
    hidden = torch.randn(100, 32, requires_grad=True)
    weight = (torch.randn(50, 32) * 0.3).requires_grad_()
    labels = torch.randint(0, 50, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy_sum(hidden, weight, labels)
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    mine, reference = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    for a, b in zip(mine, reference, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_an_evaluation_makes_no_gradients() -> None:
    hidden, weight = torch.randn(100, 32), torch.randn(50, 32, requires_grad=True)
    labels = torch.randint(0, 50, (100,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy_sum(hidden, weight, labels)
    assert counter.get_total_flops() == 2 * 100 * 32 * 50  # the logits, nothing else
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.detach().T, labels, reduction="sum"))


def test_frozen_weight_gets_no_gradient() -> None:
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(20, 8)
    linear_cross_entropy_sum(hidden, weight, torch.randint(0, 20, (10,))).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Loss of each label by plain cross-entropy over the model's own logits; 0 where none counts."""
    logits = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), batch.labels_BT, reduction="none", ignore_index=-100)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_row_gives_the_losses_of_its_documents(
    tiny_model: Any, documents: list[list[int]], implementation: str, pack: Make
) -> None:
    # transformers takes the softmax of eager attention in float32, whatever the model is.
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if implementation == "sdpa" else {"rtol": 1e-6, "atol": 1e-6}
    model = tiny_model.double().eval()
    model.set_attn_implementation(implementation)
    together = collate([pack(documents[:4], 64)], [0])
    packed = token_losses(model, together)[0]
    alone = [token_losses(model, collate([pack([d], len(d) - 1)], [0]))[0] for d in documents[:4]]
    joined = torch.cat(alone)
    torch.testing.assert_close(packed[: len(joined)], joined, **tolerance)
    assert packed[len(joined) :].eq(0).all()
    total, count = token_loss_sum(model, together)
    torch.testing.assert_close(total, joined.sum(), **tolerance)
    assert count == sum(len(d) - 1 for d in documents[:4])


def gradient(model: Any, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    total = sum(batch.num_valid for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        loss, _ = token_loss_sum(model, batch)
        (loss / total).backward()
        loss_sum += float(loss.detach())
    return loss_sum / total, {name: weight.grad for name, weight in model.named_parameters()}


def test_loss_and_gradient_do_not_depend_on_batching_or_packing(
    tiny_model: Any, documents: list[list[int]], rows_of: Make
) -> None:
    model = tiny_model.double()
    single, packed = rows_of(documents, per_row=1), rows_of(documents, per_row=3)
    ways = {
        "one batch": [collate(single, range(24))],
        "micro-batches of 5": [collate(single, range(f, min(24, f + 5))) for f in range(0, 24, 5)],
        "row by row": [collate(single, [index]) for index in range(24)],
        "packed": [collate(packed, range(8))],
        "packed, micro-batches of 3": [collate(packed, range(f, min(8, f + 3))) for f in range(0, 8, 3)],
    }
    results = {name: gradient(model, batches) for name, batches in ways.items()}
    loss, grads = results["one batch"]
    for name, (other_loss, other_grads) in results.items():
        assert other_loss == pytest.approx(loss, rel=1e-12), name
        for weight, value in grads.items():
            torch.testing.assert_close(
                other_grads[weight], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {weight}"
            )


def test_masked_positions_do_not_count(tiny_model: Any, pack: Make) -> None:
    documents = [[5, 6, 7, 8, 9], [10, 11, 12]]
    masks = [[0, 0, 0, 1, 1], [0, 0, 0]]
    batch = collate([pack(documents, 8, masks)], [0])
    total, count = token_loss_sum(tiny_model, batch)
    assert count == 2
    torch.testing.assert_close(total, token_losses(tiny_model, batch).sum())


def test_a_fully_masked_batch_is_zero_and_not_nan(tiny_model: Any, pack: Make) -> None:
    batch = collate([pack([[5, 6, 7]], 8, [[0, 0, 0]])], [0])
    total, count = token_loss_sum(tiny_model, batch)
    assert (float(total.detach()), count) == (0.0, 0)
    total.backward()


def test_pretraining_lifts_the_mask_inside_documents(tiny_model: Any, pack: Make) -> None:
    documents = [[5, 6, 7, 8, 9], [10, 11, 12]]
    batch = collate([pack(documents, 10, [[0, 0, 0, 1, 1], [0, 1, 1]])], [0])
    lifted = Pretrain(Recipe()).prepare(batch)
    assert lifted.labels_BT[0].tolist() == [6, 7, 8, 9, 11, 12, -100, -100, -100, -100]
    assert lifted.num_valid == 6
    assert SupervisedFineTuning(Recipe()).prepare(batch).num_valid == 4


def test_models_that_change_their_logits_take_the_slow_way(documents: list[list[int]], rows_of: Make) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        final_logit_softcapping=30.0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert split_head(model) is None
    batch = collate(rows_of(documents[:4]), range(4))
    total, _ = token_loss_sum(model, batch)
    torch.testing.assert_close(total, token_losses(model, batch).sum())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_plain_models_take_the_fast_way(model_type: str) -> None:
    from hearth.models import config_for_size
    from hearth.models.building import model_from_config

    assert split_head(model_from_config(config_for_size("100K", model_type, 320, 64))) is not None


def test_sliding_window_and_packing(documents: list[list[int]], pack: Make, rows_of: Make) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    packed, _ = token_loss_sum(model, collate([pack(documents[:4], 64)], [0]))
    alone = sum(float(token_loss_sum(model, collate(rows_of([d]), [0]))[0].detach()) for d in documents[:4])
    assert float(packed.detach()) == pytest.approx(alone, rel=1e-10)
