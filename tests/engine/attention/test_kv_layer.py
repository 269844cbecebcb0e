"""The pool of a layer: its size, its raw blocks, which way of attention it gets; int8 in whole models."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams
from hearth.engine.attention import choice
from hearth.engine.attention.choice import choose_path
from hearth.engine.attention.layer import LayerKV, LayerSpec
from hearth.engine.attention.step import StepContext
from hearth.engine.native import library
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.errors import ConfigError

CPU = torch.device("cpu")
SPEC = LayerSpec(4, 2, 64, 32, 0.125)


def make_layer(path: str, dtype: torch.dtype, kv_dtype: str) -> LayerKV:
    return LayerKV(SPEC, StepContext(32, CPU), 6, dtype, path=path, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["native", "numba", "torch"])
def test_blocks_can_be_read_and_written(path: str, dtype: torch.dtype, kv_dtype: str) -> None:
    if path == "native" and library() is None:
        pytest.skip("no compiled kernels")
    layer = make_layer(path, dtype, kv_dtype)
    assert layer.num_bytes == 6 * 32 * SPEC.bytes_per_token(dtype, kv_dtype)
    for part in layer.pool.parts:
        part.view(torch.uint8).random_(0, 255, generator=torch.Generator().manual_seed(3))
    before = layer.read_blocks(range(6))
    assert before.shape == (6, layer.num_bytes // 6)
    content = layer.read_blocks([3, 1])
    assert torch.equal(content, before[[3, 1]])
    layer.write_blocks([0, 4], content)
    assert torch.equal(layer.read_blocks(range(6)), before[[3, 1, 2, 3, 1, 5]])
    layer.write_blocks([], layer.read_blocks([]))
    with pytest.raises(AssertionError):
        layer.write_blocks([0], torch.cat([before[:1], before[:1]], dim=1))


def test_int8_takes_about_half() -> None:
    spec = LayerSpec(16, 8, 128, 128, 0.1)
    assert spec.bytes_per_token(torch.bfloat16) == 8 * 256 * 2
    assert spec.bytes_per_token(torch.bfloat16, "int8") == 8 * (256 + 8)


def test_the_path_fits_dtype_shapes_and_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    best = "native" if library() else "numba"
    assert choose_path(SPEC, torch.bfloat16, CPU, 32) == best
    assert choose_path(SPEC, torch.bfloat16, CPU, 32, native=False) == "numba"
    assert choose_path(SPEC, torch.bfloat16, CPU, 16) == "numba"  # no multiple of 32 tokens
    assert choose_path(LayerSpec(4, 2, 48, 64, 0.1), torch.bfloat16, CPU, 32) == "numba"
    assert choose_path(SPEC, torch.float32, CPU, 32) == "numba"
    assert choose_path(SPEC, torch.float16, CPU, 32) == "torch"
    assert choose_path(SPEC, torch.float32, CPU, 32, wanted="torch") == "torch"
    with pytest.raises(
        ConfigError, match=r"'native', which cannot run here: it computes bfloat16 on the CPU"
    ):
        choose_path(SPEC, torch.float32, CPU, 32, wanted="native")
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    assert choose_path(SPEC, torch.float32, CPU, 32) == "torch"
    with pytest.raises(ConfigError, match="numba is not installed"):
        choose_path(SPEC, torch.float32, CPU, 32, wanted="numba")
    assert "numba" in choice.why_not_numba(torch.float32, CPU)


def test_tables_follow_the_plans() -> None:
    """Rows come, grow, change places and go; what is kept from the step before must never be a stale row."""
    step = StepContext(4, CPU)
    generator = torch.Generator().manual_seed(0)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    ids: list[tuple[int, ...]] = [(1, 2), (3,), (4, 5, 6)]
    for _ in range(200):
        action = number(4)
        if action == 0 or not ids:
            ids.insert(number(len(ids) + 1), tuple(number(99) for _ in range(1 + number(40))))
        elif action == 1 and len(ids) > 1:
            ids.pop(number(len(ids)))
        elif action == 2:
            ids.reverse()
        else:
            i = number(len(ids))
            ids[i] = (*ids[i], number(99))
        rows, expected_slots, expected_positions = [], [], []
        for blocks in ids:
            count = 1 + number(3)
            start = len(blocks) * 4 - count - number(2) if len(blocks) * 4 > 4 else 0
            rows.append(
                PlanRow(
                    Request("r", 0, [0], SamplingParams(), 1), start, count, (0,) * count, blocks, 0, False
                )
            )
            expected_positions += range(start, start + count)
            expected_slots += [blocks[p // 4] * 4 + p % 4 for p in range(start, start + count)]
        step.fill(Plan(tuple(rows)))
        assert step.slots_np.tolist() == expected_slots
        assert step.positions_np.tolist() == expected_positions
        assert all(tuple(step.tables_np[i, : len(blocks)]) == blocks for i, blocks in enumerate(ids))
        assert step.firsts_np.tolist() == step.firsts
        assert [step.starts_np.tolist(), step.counts_np.tolist()] == [step.starts, step.counts]


@pytest.mark.parametrize("attention", ["numba", "torch"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_int8_keys_and_values_change_logits_little(
    family: str, attention: str, family_model: Any, prompts: list[list[int]]
) -> None:
    """Logits within 5 % of the norm of those with exact keys and values, in float32."""
    logits = []
    for kv_dtype in ("auto", "int8"):
        with Engine.from_model(family_model(family), attention=attention, kv_dtype=kv_dtype) as engine:
            blocks, ids = (0, 1), prompts[3]
            request = Request("r", 0, ids, SamplingParams(), 1)
            rows = [(0, 30), (30, 9), (39, 1)]
            logits.append([
                engine.runner.execute(Plan((PlanRow(request, a, n, tuple(ids[a : a + n]), blocks, 1, True),)))
                for a, n in rows
            ])  # fmt: skip
    for exact, quantised in zip(*logits, strict=True):
        assert not torch.equal(exact, quantised)
        assert (exact - quantised).norm() < 0.05 * exact.norm()


def test_int8_model_generates_and_says_so(family_model: Any, prompts: list[list[int]]) -> None:
    model = family_model("llama", head_dim=32).to(torch.bfloat16)
    with Engine.from_model(model, kv_dtype="int8") as engine:
        best = f"native-{native.isa}" if (native := library()) else "numba"
        assert engine.model_info["attention"] == best
        done = engine.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        assert all(len(c.token_ids) == 8 for c in done)
