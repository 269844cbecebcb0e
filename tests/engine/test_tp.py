"""Tensor parallelism: the same tokens from two processes as from one, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from hearth.engine import AsyncEngine, Engine, SamplingParams
from hearth.engine.config import EngineConfig
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.engine.tp import collectives, wire
from hearth.engine.tp.loading import load_part
from hearth.engine.tp.sharding import find_cuts, own_part
from hearth.errors import ConfigError, EngineDeadError, EngineError, ModelError, UnsupportedModelError

GREEDY = SamplingParams(max_tokens=24, temperature=0)
FAMILIES = ["llama", "qwen3", "mistral", "qwen2", "gemma2", "phi3", "olmo2", "starcoder2"]
SETTINGS: dict[str, Any] = {"attention": "torch", "max_num_seqs": 8, "num_threads": 1}


@pytest.fixture
def saved(family_model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    def save(family: str, **fields: Any) -> Path:
        path = tmp_path / family
        family_model(family, **fields).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 20
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks()


def ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "hearth.engine.tp.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


# -- reading the plan ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_read_as_data(family: str, family_model: Any) -> None:
    model = family_model(family)
    cuts = {cut.name: cut for cut in find_cuts(model, 2)}
    assert any(cut.adds for cut in cuts.values())
    for name, cut in cuts.items():
        assert model.get_submodule(name).weight.shape[cut.dim] % 2 == 0
    assert len(cuts) >= 3 * 4


@pytest.mark.parametrize(
    ("family", "num_ranks", "kind", "words"),
    [
        ("llama", 4, ConfigError, "4 attention heads and 2 key-value heads"),
        ("llama", 3, ConfigError, "4 attention heads"),
        ("gpt2", 2, UnsupportedModelError, "no tensor-parallel plan"),
        ("mixtral", 2, UnsupportedModelError, "moe_tp_experts|packed_colwise"),
        ("opt", 2, UnsupportedModelError, "no tensor-parallel plan"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    family: str, num_ranks: int, kind: type[Exception], words: str, family_model: Any
) -> None:
    with pytest.raises(kind, match=words):
        find_cuts(family_model(family), num_ranks)


def test_features_that_cannot_be_divided_are_refused(family_model: Any) -> None:
    with pytest.raises(ConfigError, match="97 features"):
        find_cuts(family_model("llama", intermediate_size=97), 2)


def test_parts_cover_everything_once() -> None:
    whole = list(range(12))
    assert [i for rank in range(3) for i in whole[own_part(12, rank, 3)]] == whole


def test_a_plan_survives_the_wire() -> None:
    request = Request("r", 0, [1, 2, 3], SamplingParams(), 4)
    rows = (
        PlanRow(request, 2, 3, (3, 7, 8), (4, 1), 3, True, 2),
        PlanRow(request, 0, 2, (1, 2), (0,), 0, False),
    )
    plan = Plan(rows, (), ((1, 2),), ((3, 4),))
    got = wire.decode_step(msgspec.msgpack.encode(wire.Step.of(plan))).plan()
    assert (got.swap_out, got.swap_in) == (plan.swap_out, plan.swap_in)
    for one, other in zip(plan.rows, got.rows, strict=True):
        for name in ("start", "num_tokens", "token_ids", "block_ids", "num_logits", "end"):
            assert getattr(one, name) == getattr(other, name)


def test_a_model_in_memory_is_refused(family_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"Engine\.load|in memory"):
        Engine.from_model(family_model("llama"), tensor_parallel=2)


# -- the same tokens -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "qwen2", "gemma2", "phi3", "olmo2", "starcoder2"]
)
def test_two_ranks_give_the_tokens_of_one(
    family: str, saved: Any, family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    """With chunks, preemption and prefix hits in one engine, as starting one takes seconds."""
    expected = transformers_tokens(family_model(family), prompts, 24)
    layers = {"block_size": 4, "max_model_len": 72, "max_num_batched_tokens": 20}
    with Engine.load(saved(family), tensor_parallel=2, **SETTINGS, **layers) as engine:
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
        stats = engine.stats()
        assert stats.prefix_hit_tokens > 0
        engine.scheduler.check()
        assert len(ranks()) == 1


@pytest.mark.slow
def test_two_ranks_survive_preemption_and_swapping(
    saved: Any, family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    expected = transformers_tokens(family_model("qwen3"), prompts, 48)
    token_bytes = 3 * 2 * 2 * 24 * 4  # over both ranks
    with Engine.load(
        saved("qwen3"),
        tensor_parallel=2,
        block_size=4,
        max_model_len=100,
        kv_cache_memory=token_bytes * 104,
        swap_memory=token_bytes * 200,
        **SETTINGS,
    ) as engine:
        assert engine.pool.num_blocks == 26
        engine.scheduler.costs.bytes_per_second = 1e15  # copying is always cheaper
        got = engine.generate(prompts, SamplingParams(max_tokens=48, temperature=0))
        stats = engine.stats()
    assert [c.token_ids for c in got] == expected
    assert stats.num_preemptions > 0
    assert stats.num_blocks_swapped_in > 0


@pytest.mark.slow
def test_two_ranks_speculate(
    saved: Any, family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    expected = transformers_tokens(family_model("llama"), prompts, 24)
    path = saved("llama")
    for speculation in ("ngram", str(path)):
        with Engine.load(path, tensor_parallel=2, speculation=speculation, **SETTINGS) as engine:
            assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
            assert engine.stats().num_accepted_tokens > 0


def step_forever(engine: Engine) -> None:
    while True:
        engine.step()


async def generate_forever(engine: AsyncEngine) -> None:
    while True:
        async for _ in engine.generate([5, 6, 7], GREEDY):
            pass


# -- faults ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_engine(
    how: signal.Signals, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "STUCK_SECONDS", 15.0)
    with Engine.load(saved("llama"), tensor_parallel=2, **SETTINGS) as engine:
        engine.add_request("r", [5, 6, 7], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        for _ in range(3):
            engine.step()
        os.kill(ranks()[0].pid, how)
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match="tensor parallelism"):
            step_forever(engine)
        assert time.monotonic() - started < 120
        assert not ranks()
        with pytest.raises(EngineDeadError):
            engine.generate([[5]], GREEDY)


@pytest.mark.slow
async def test_it_runs_in_a_process_of_its_own_and_dies_with_a_rank(
    saved: Any, family_model: Any, transformers_tokens: Any
) -> None:
    expected = transformers_tokens(family_model("llama"), [[5, 6, 7]], 24)[0]
    engine = await AsyncEngine.start(saved("llama"), tensor_parallel=2, **SETTINGS)
    try:
        got = [t async for o in engine.generate([5, 6, 7], GREEDY) for t in o.token_ids]
        assert got == expected
        os.kill(ranks()[0].pid, signal.SIGKILL)  # while it is idle
        with pytest.raises(EngineError):
            await generate_forever(engine)
    finally:
        await engine.close()
    assert not engine.is_alive


@pytest.mark.slow
def test_ranks_die_with_an_engine_that_is_killed(saved: Any) -> None:
    code = (
        "import sys, time\nfrom hearth.engine import Engine\n"
        "if __name__ == '__main__':\n"
        "    e = Engine.load(sys.argv[1], tensor_parallel=2, attention='torch', num_threads=1)\n"
        "    print(e.leader.processes[0].pid, flush=True)\n    time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(saved("llama"))], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        rank = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    rank.wait(timeout=30)
    assert not rank.is_running()


@pytest.mark.slow
def test_damaged_weights_are_told_and_leave_nobody(saved: Any) -> None:
    path = saved("llama")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        Engine.load(path, tensor_parallel=2, **SETTINGS)
    assert not ranks()


def test_a_rank_reads_its_part_only(saved: Any) -> None:
    path = saved("llama")
    config = EngineConfig(tensor_parallel=2)
    parts = [load_part(path, config, rank, torch.device("cpu"))[0] for rank in range(2)]
    one, other = (part.get_submodule("model.layers.1.self_attn.q_proj").weight for part in parts)
    whole = Engine.load(path, prepack=False, **SETTINGS)
    weight = whole.runner.model.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert torch.equal(torch.cat([one, other]), weight)
    assert one.untyped_storage().nbytes() == weight.nbytes // 2
    down = [part.get_submodule("model.layers.1.mlp.down_proj").weight for part in parts]
    assert torch.equal(
        torch.cat(down, dim=1), whole.runner.model.get_submodule("model.layers.1.mlp.down_proj").weight
    )
    assert torch.equal(parts[0].model.norm.weight, whole.runner.model.model.norm.weight)
    whole.close()
