"""Adapters of every kind: merged as unmerged, frozen bases, gradients through quantised weights, refusals."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hearth.config.recipe import AdapterSection
from hearth.engine import Engine, SamplingParams
from hearth.errors import ConfigError, HearthError, ModelError
from hearth.models import load_model, num_parameters
from hearth.models.quantised import QuantisedLinear
from hearth.training import Trainer
from hearth.training.adapter import adapter_weights, add_adapter, merge_adapter, save_adapter
from hearth.training.checkpoint import CheckpointStore
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]
logger = logging.getLogger(__name__)

KINDS = [
    {"dora": dora, "quantize": quantize}
    for dora, quantize in itertools.product([False, True], ["none", "int8", "nf4"])
]
VOCAB = 96


def kind_id(kind: dict[str, Any]) -> str:
    return ("dora" if kind["dora"] else "lora") + "-" + kind["quantize"]


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, **section: Any) -> Any:
    """With an adapter that changes something."""
    section = {"rank": 4, "alpha": 8.0, **section}
    model = add_adapter(model, AdapterSection.model_validate(section), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter_weights(model).items():
            if "magnitude" in name:
                weight *= 1 + 0.3 * torch.rand(weight.shape, generator=generator)
            else:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(2 * 20).view(2, 20) * 7 % VOCAB
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def spread(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_a_merged_adapter_is_the_same_model(kind: dict[str, Any]) -> None:
    base = make_model()
    model = adapted(copy.deepcopy(base), **kind)
    unmerged, plain = logits_of(model), logits_of(base)
    # What merging gives: the adapter on the base as it was, not as it was quantised.
    on_original = adapted(copy.deepcopy(base), dora=kind["dora"])
    with torch.no_grad():
        for name, weight in adapter_weights(on_original).items():
            weight.copy_(adapter_weights(model)[name])
    wanted = logits_of(on_original)
    merged = merge_adapter(model, lambda: copy.deepcopy(base))
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert not [m for m in merged.modules() if isinstance(m, QuantisedLinear)]
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    if kind["quantize"] == "none":
        torch.testing.assert_close(logits_of(merged), unmerged, rtol=1e-4, atol=1e-4)
    else:  # what differs is the base alone: merging makes up for quantising it, and adds no error of its own
        with model.disable_adapter():
            rounding = spread(logits_of(model), plain)
        assert 0 < spread(logits_of(merged), unmerged) < 1.5 * rounding


def test_merging_into_four_bits_would_lose_the_update() -> None:
    """transformers #31293, peft #2321: the reason why an adapter is merged into the original weights."""
    base = make_model()
    model = adapted(copy.deepcopy(base), quantize="nf4")
    with torch.no_grad():  # the size of an update after a short fine-tuning
        for name, weight in adapter_weights(model).items():
            weight *= 0.2 if "lora_B" in name else 1.0
    wanted = logits_of(model)
    into_four_bits = copy.deepcopy(model.get_base_model())
    for name, module in list(into_four_bits.named_modules()):
        if hasattr(module, "lora_A"):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            delta = module.get_delta_weight("default")
            linear.weight.data = module.base_layer.weight + delta
            parent, _, attribute = name.rpartition(".")
            setattr(into_four_bits.get_submodule(parent), attribute, QuantisedLinear(linear, "nf4"))
    merged = merge_adapter(model, lambda: copy.deepcopy(base))
    update = logits_of(merged) - logits_of(base)
    lost = spread(logits_of(into_four_bits), wanted) / float(update.square().mean().sqrt())
    logger.info("merging into 4 bits is off by %.0f %% of what the update changes", 100 * lost)
    assert lost > 0.5
    # Merging into the original is exactly the adapter's update on the original.
    again = adapted(copy.deepcopy(base))
    with torch.no_grad():
        for name, weight in adapter_weights(again).items():
            weight.copy_(adapter_weights(model)[name])
    torch.testing.assert_close(logits_of(merged), logits_of(again), rtol=1e-4, atol=1e-4)


def test_peft_cannot_merge_into_quantised_weights_in_silence() -> None:
    with pytest.raises(ConfigError, match="not merged into quantised weights"):
        adapted(make_model(), quantize="nf4").merge_and_unload()


def reference_layer(x: Tensor, layer: Any, *, dora: bool) -> Tensor:
    """LoRA or DoRA written out over an explicit, dequantised weight."""
    weight = layer.base_layer.weight.to(x.dtype)
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if not dora:
        return x @ (weight + delta).T
    norm = (weight + delta).detach().norm(dim=1)  # a constant, section 4.3 of DoRA
    return x @ ((weight + delta) * (layer.lora_magnitude_vector["default"].weight / norm)[:, None]).T


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_values_and_gradients_are_those_of_the_formula(kind: dict[str, Any]) -> None:
    model = adapted(make_model().double(), **kind).double()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, 112, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(3, 5, 64, dtype=torch.float64)
    found: list[list[Tensor]] = []
    for out in (layer(x), reference_layer(x, layer, dora=kind["dora"])):
        leaves = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        found.append([out.detach(), *torch.autograd.grad((out * factors).sum(), leaves)])
    assert len(found[0]) == (5 if kind["dora"] else 4)
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture
def base_dir(train_parts: MakeTrainer) -> Path:
    return train_parts().fit().dir / "model"


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_training_leaves_the_base_alone_and_keeps_the_adapter_only(
    train_parts: MakeTrainer, base_dir: Path, workspace: Workspace, kind: dict[str, Any]
) -> None:
    section = {"size": None, "base": str(base_dir), "adapter": {"rank": 2, "alpha": 8, **kind}}
    trainer = train_parts(model=section, train={"steps": 6, "learning_rate": 3e-2})
    frozen = {n: t.clone() for n, t in trainer.model.state_dict().items() if "lora" not in n}
    assert trainer.plan().num_parameters == num_parameters(trainer.model)
    run = trainer.fit()
    # Merging takes the layers of a plain adapter apart; a quantised base is still there, bit for bit.
    if kind["quantize"] != "none":
        after = trainer.model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    saved = CheckpointStore(run.dir).load_newest().tensors["model"]
    assert saved
    assert all("lora_" in name for name in saved)
    base, merged = load_model(base_dir), load_model(run.dir / "model")
    assert torch.equal(base.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    again = add_adapter(load_model(base_dir), AdapterSection.model_validate(section["adapter"]), seed=0)
    with torch.no_grad():
        for name, weight in adapter_weights(again).items():
            weight.copy_(saved[name])
    wanted = merge_adapter(again, lambda: load_model(base_dir))
    torch.testing.assert_close(merged.state_dict(), wanted.state_dict(), rtol=0, atol=1e-6)


def test_serving_loads_what_lora_and_qlora_save_and_refuses_dora(tmp_path: Path) -> None:
    base = make_model()
    engine = Engine.from_model(copy.deepcopy(base), device="cpu")
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, adapter="mine")
    prompt = list(range(3, 20))
    for quantize in ("none", "nf4"):
        model = adapted(copy.deepcopy(base), quantize=quantize)
        save_adapter(model, tmp_path / quantize)
        merged = merge_adapter(model, lambda: copy.deepcopy(base))
        engine.load_adapter("mine", tmp_path / quantize)
        (output,) = engine.generate([prompt], greedy)
        wanted = merged.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(output.token_ids) == wanted[0, len(prompt) :].tolist()
    save_adapter(adapted(copy.deepcopy(base), dora=True), tmp_path / "dora")
    with pytest.raises(ModelError, match="use_dora True, which cannot be applied") as caught:
        engine.load_adapter("mine", tmp_path / "dora")
    assert "merge the adapter" in str(caught.value.fix)


class _Shared(LlamaForCausalLM):
    """Its second layer uses a matrix of the first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp.up_proj.weight = self.model.layers[0].mlp.up_proj.weight


def test_what_cannot_be_adapted_is_refused() -> None:
    def refusal(model: Any, **section: Any) -> HearthError:
        with pytest.raises(ConfigError) as caught:
            adapted(model, **section)
        return caught.value

    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    assert "GPT2LMHeadModel has no linear layers" in str(refusal(GPT2LMHeadModel(gpt2), quantize="nf4"))
    shared = _Shared(make_model().config)
    message = str(refusal(shared, quantize="int8"))
    assert "layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in message
    message = str(refusal(make_model(), target_modules=["q_proj", "qkv"]))
    assert "[qkv] matches no layer of the llama model" in message
    tied = make_model(tie_word_embeddings=True)
    assert "lm_head, whose weight is that of the input" in str(refusal(tied, target_modules=["lm_head"]))


def test_experts_that_are_no_linear_layers_are_refused() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    with pytest.raises(ConfigError, match=r"weights of its decoder layers outside .*experts"):
        adapted(Qwen3MoeForCausalLM(config), quantize="nf4")


def test_gpt2_takes_an_adapter_without_a_warning() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = adapted(GPT2LMHeadModel(config).eval(), target_modules=["c_attn"])
    unmerged = logits_of(model)
    merged = merge_adapter(model, lambda: GPT2LMHeadModel(config))
    torch.testing.assert_close(logits_of(merged), unmerged, rtol=1e-4, atol=1e-4)
