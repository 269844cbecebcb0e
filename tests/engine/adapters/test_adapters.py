"""LoRA adapters against PEFT's own forward, alone and mixed in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hearth.engine import AsyncEngine, Engine, SamplingParams
from hearth.engine.runner import distance
from hearth.errors import ConfigError, ModelError, RequestError

# PEFT reads a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS: dict[str, list[str]] = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "some": ["q_proj", "down_proj"],
}


def save_adapter(model: Any, path: Path, *, seed: int, **settings: Any) -> Path:
    """A random adapter for ``model``, large enough to change what it says."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(3.0)
    adapted.save_pretrained(path)
    adapted.unload()
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, family_model: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    settings: dict[str, dict[str, Any]] = {
        "wide": {"target_modules": TARGETS["all"], "seed": 1},
        "thin": {"target_modules": TARGETS["some"], "r": 2, "lora_alpha": 3, "seed": 2},
        "scaled": {"use_rslora": True, "alpha_pattern": {"q_proj": 2}, "seed": 3},
    }
    return {name: save_adapter(family_model("llama"), folder / name, **s) for name, s in settings.items()}


@pytest.fixture(scope="module")
def expected(
    adapters: dict[str, Path], family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> dict[str | None, list[list[int]]]:
    """What PEFT generates with each adapter, and the model without one."""
    result = {None: transformers_tokens(family_model("llama"), prompts, 24)}
    for name, path in adapters.items():
        result[name] = transformers_tokens(
            PeftModel.from_pretrained(family_model("llama"), path).eval(), prompts, 24
        )
    assert len({str(tokens) for tokens in result.values()}) == 4, "an adapter that changes nothing"
    return result


def greedy(adapter: str | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=24, temperature=0, adapter=adapter)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"prepack": False}], ids=str)
def test_a_mixed_batch_equals_peft_one_by_one(
    settings: dict[str, Any], adapters: dict[str, Path], expected: Any, family_model: Any, prompts: Any
) -> None:
    with Engine.from_model(family_model("llama"), **settings) as engine:
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        wanted = [(name, i) for i in range(len(prompts)) for name in (None, *adapters)]
        completions = engine.generate([prompts[i] for _, i in wanted], [greedy(name) for name, _ in wanted])
        engine.scheduler.check()
    for completion, (name, i) in zip(completions, wanted, strict=True):
        assert completion.token_ids == expected[name][i], (name, i)


def test_gpt2_whose_layers_are_conv1d(
    tmp_path: Path, family_model: Any, prompts: Any, transformers_tokens: Any
) -> None:
    path = save_adapter(
        family_model("gpt2"), tmp_path / "a", seed=1, target_modules=["c_attn"], fan_in_fan_out=True
    )
    tokens = transformers_tokens(PeftModel.from_pretrained(family_model("gpt2"), path).eval(), prompts, 16)
    with Engine.from_model(family_model("gpt2")) as engine:
        engine.load_adapter("a", path)
        params = SamplingParams(max_tokens=16, temperature=0, adapter="a")
        assert [c.token_ids for c in engine.generate(prompts, params)] == tokens


def test_cached_prefixes_belong_to_an_adapter(adapters: dict[str, Path], family_model: Any) -> None:
    prompt = list(range(10, 50))
    with Engine.from_model(family_model("llama"), block_size=8) as engine:
        engine.load_adapter("wide", adapters["wide"])
        engine.load_adapter("thin", adapters["thin"])
        first = [engine.generate([prompt], greedy(name))[0] for name in (None, "wide", "thin")]
        again = [engine.generate([prompt], greedy(name))[0] for name in (None, "wide", "thin")]
        assert [c.num_cached_tokens for c in first] == [0, 0, 0]
        assert [c.num_cached_tokens for c in again] == [32, 32, 32]
        assert [c.token_ids for c in first] == [c.token_ids for c in again]
        # Another content under the same name must not meet the blocks of the old one.
        engine.load_adapter("wide", adapters["scaled"])
        replaced = engine.generate([prompt], greedy("wide"))[0]
        assert replaced.num_cached_tokens == 0
        assert replaced.token_ids != first[1].token_ids


def test_requests_keep_the_adapter_that_they_began_with(
    adapters: dict[str, Path], expected: Any, family_model: Any, prompts: Any
) -> None:
    with Engine.from_model(family_model("llama")) as engine:
        engine.load_adapter("a", adapters["wide"])
        engine.add_request("old", prompts[2], greedy("a"))
        tokens = {"old": [t for o in engine.step() for t in o.token_ids], "new": []}
        engine.load_adapter("a", adapters["thin"])
        engine.add_request("new", prompts[2], greedy("a"))
        engine.unload_adapter("a")
        with pytest.raises(RequestError, match="'a' is not loaded; loaded: none"):
            engine.add_request("late", prompts[2], greedy("a"))
        assert engine.adapters.num_bytes > 0
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
        assert engine.adapters.num_bytes == 0
        assert tokens == {"old": expected["wide"][2], "new": expected["thin"][2]}
        assert engine.generate([prompts[2]], greedy())[0].token_ids == expected[None][2]


def test_bfloat16_with_the_compiled_layers(tmp_path: Path, family_model: Any, prompts: Any) -> None:
    """Steps with an adapter run module by module, the others in the compiled layers."""
    changes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    path = save_adapter(
        family_model("llama", **changes), tmp_path / "a", seed=4, target_modules=TARGETS["all"]
    )
    wide = PeftModel.from_pretrained(family_model("llama", **changes), path).eval()
    narrow = PeftModel.from_pretrained(family_model("llama", **changes).to(torch.bfloat16), path).eval()
    with torch.no_grad():
        wanted = [wide(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        peft = [narrow(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    with Engine.from_model(family_model("llama", **changes).to(torch.bfloat16)) as engine:
        engine.load_adapter("a", path)
        calls: list[int] = []
        engine.runner.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0))
        assert len(calls) == (0 if engine.runner.stack else 1)
        calls.clear()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=1, temperature=0, adapter="a"))
        logits = engine.runner.execute(engine.scheduler.schedule())
        assert len(calls) == 1
    # So livened up, these models are far from float32 in bfloat16, whoever computes.
    error = sum(distance(got, want) for got, want in zip(logits, wanted, strict=True))
    assert error < 1.3 * sum(distance(got, want) for got, want in zip(peft, wanted, strict=True))


def test_what_cannot_be_applied_is_refused(
    tmp_path: Path, adapters: dict[str, Path], family_model: Any, prompts: Any
) -> None:
    other = save_adapter(
        family_model("llama", hidden_size=128), tmp_path / "other", seed=1, target_modules=["q_proj"]
    )
    dora = save_adapter(
        family_model("llama"), tmp_path / "dora", seed=1, target_modules=["q_proj"], use_dora=True
    )
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "adapter_config.json").write_text((adapters["wide"] / "adapter_config.json").read_text())
    (cut / "adapter_model.safetensors").write_bytes(
        (adapters["wide"] / "adapter_model.safetensors").read_bytes()[:-9]
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    tensors = load_file(adapters["thin"] / "adapter_model.safetensors")
    save_file(
        {k.replace("q_proj", "query"): v for k, v in tensors.items()}, elsewhere / "adapter_model.safetensors"
    )
    with Engine.from_model(family_model("llama"), max_adapters=1) as engine:
        for path, reason in (
            (other, "takes 64 inputs to 64 outputs"),
            (dora, "use_dora"),
            (cut, "cannot be read"),
            (elsewhere, r"changes model.layers.0.self_attn.query, and the model has no"),
            (tmp_path / "nowhere", "no directory at"),
        ):
            with pytest.raises(ModelError, match=reason):
                engine.load_adapter("bad", path)
        engine.load_adapter("one", adapters["wide"])
        with pytest.raises(RequestError, match="max_adapters is 1"):
            engine.load_adapter("two", adapters["thin"])
        with pytest.raises(RequestError, match="'two' is not loaded; loaded: one"):
            engine.unload_adapter("two")
        assert engine.adapters.names == ["one"]
        assert engine.generate([prompts[1]], greedy("one"))[0].finish_reason


def test_without_memory_for_another_nothing_changes(
    adapters: dict[str, Path],
    family_model: Any,
    prompts: list[list[int]],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with Engine.from_model(family_model("llama"), max_model_len=200) as engine:
        engine.load_adapter("wide", adapters["wide"])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", no_memory)
            with pytest.raises(MemoryError):
                engine.load_adapter("thin", adapters["thin"])
        assert engine.adapters.names == ["wide"]
        got = engine.generate(prompts, greedy("wide"))
        assert [completion.token_ids for completion in got] == expected["wide"]


async def test_through_the_process(
    adapters: dict[str, Path], model_dir: Path, expected: Any, prompts: Any
) -> None:
    async with await AsyncEngine.start(model_dir) as engine:
        with pytest.raises(RequestError, match="not loaded"):
            _ = [o async for o in engine.generate(prompts[2], greedy("a"))]
        with pytest.raises(ModelError, match="no directory"):
            await engine.load_adapter("a", "nowhere")
        await engine.load_adapter("a", adapters["wide"])
        assert engine.adapters() == ["a"]
        outputs = [o async for o in engine.generate(prompts[2], greedy("a"))]
        assert [t for o in outputs for t in o.token_ids] == expected["wide"][2]
        await engine.unload_adapter("a")
        assert engine.adapters() == []


def test_tensor_parallelism_is_refused(adapters: dict[str, Path], family_model: Any) -> None:
    with Engine.from_model(family_model("llama")) as engine:
        engine.config = engine.config.with_(tensor_parallel=2)
        with pytest.raises(ConfigError, match="merge the adapter"):
            engine.load_adapter("a", adapters["wide"])
