"""Decode steps in fixed buffers: how they are padded, and that they give transformers' tokens.

The capture itself needs a GPU; without one the same buffers are read step by step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams
from hearth.engine.attention.graphs import DecodeGraphs, StaticInputs, bucket_for, buckets
from hearth.engine.attention.step import StepContext
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.errors import ConfigError


def test_buckets_waste_little() -> None:
    assert buckets(1) == [1]
    assert buckets(6) == [1, 2, 4, 6]
    sizes = buckets(512)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 512
    assert len(sizes) < 40
    for num in range(1, 513):
        bucket = bucket_for(num, sizes)
        assert bucket is not None
        assert num <= bucket <= max(2 * num, num + 8)
        assert num < 32 or bucket <= 1.3 * num
    assert bucket_for(513, sizes) is None


def row(request_id: int, start: int, blocks: tuple[int, ...], num_tokens: int = 1, **params: Any) -> PlanRow:
    request = Request(str(request_id), 0, [0] * (start + num_tokens), SamplingParams(**params), 1)
    return PlanRow(request, start, num_tokens, (7 + request_id,) * num_tokens, blocks, 1, True)


def test_a_padding_row_stores_nothing_and_sees_nothing() -> None:
    step = StepContext(8, torch.device("cpu"))
    inputs = StaticInputs(max_batch=8, max_blocks=4, device=step.device)
    many = Plan(tuple(row(i, 20, (i, 9, 3)) for i in range(6)))
    step.fill(many)
    inputs.fill(step, many, 8)
    few = Plan((row(0, 9, (5, 2)), row(1, 0, (4,))))
    step.fill(few)
    inputs.fill(step, few, 4)
    device_step = inputs.step(4)
    assert inputs.device[:4, :2].tolist() == [[7, 9], [8, 0], [0, 0], [0, 0]]
    assert device_step.slots.tolist() == [2 * 8 + 1, 4 * 8, -1, -1]
    assert device_step.tables[:2].tolist()[0][:2] == [5, 2]
    assert device_step.decode_table is not None
    assert device_step.decode_table.tolist() == [[0, 0, 1, 9], [1, 1, 1, 0], [0, 2, 1, -1], [0, 3, 1, -1]]
    assert device_step.slots.data_ptr() == inputs.step(8).slots.data_ptr()  # the same addresses for all


def test_only_plain_decodes_are_taken() -> None:
    step = StepContext(8, torch.device("cpu"))
    graphs = DecodeGraphs(None, step, max_batch=4, max_blocks=4)
    decode = row(0, 9, (5, 2))
    assert graphs.bucket(Plan((decode, row(1, 3, (4,)), row(2, 3, (6,))))) == 4
    assert graphs.bucket(Plan((decode, row(1, 0, (4,), num_tokens=3)))) is None
    assert graphs.bucket(Plan(tuple(row(i, 3, (i,)) for i in range(5)))) is None
    assert graphs.bucket(Plan((row(0, 3, (1,), adapter="other"),))) is None
    assert graphs.capture_all() == "there is no GPU"


def test_fp8_keys_and_values_need_the_triton_kernels(family_model: Any) -> None:
    with pytest.raises(ConfigError, match="fp8"):
        Engine.from_model(family_model("llama"), kv_dtype="fp8", attention="torch")
    pytest.importorskip("triton", reason="triton is not installed")
    with Engine.from_model(
        family_model("llama"), kv_dtype="fp8", attention="triton", max_model_len=64, block_size=8
    ) as engine:
        assert {part.dtype for part in engine.runner.layers[0].pool.parts} == {
            torch.float8_e4m3fn,
            torch.float32,
        }
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        assert len(engine.generate([[5, 6, 7, 8]], params)[0].token_ids) == 3


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_fixed_buffers_give_the_same_tokens(
    family: str, family_model: Any, transformers_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the interpreted kernels; three sequences in a bucket of four, that end one by one."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = family_model(family, vocab_size=320)
    prompts = [[5, 6, 7], list(range(10, 31)), [9]]
    lengths = [6, 3, 5]
    expected = [
        tokens[:length]
        for tokens, length in zip(transformers_tokens(model, prompts, 6), lengths, strict=True)
    ]
    with Engine.from_model(
        model, attention="triton", max_model_len=64, max_num_seqs=4, block_size=8
    ) as engine:
        runner = engine.runner
        assert runner.graphs is None or torch.cuda.is_available()
        runner.graphs = DecodeGraphs(runner.model, runner.step, max_batch=4, max_blocks=8, capture=False)
        used: list[int] = []
        run = runner.graphs.run
        monkeypatch.setattr(runner.graphs, "run", lambda plan, size: used.append(size) or run(plan, size))
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
        completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == expected
    assert used == [4, 4, 2, 2, 1]
