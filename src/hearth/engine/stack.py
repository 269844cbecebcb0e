"""The decoder layers of a model as one call into the compiled kernels, where they are of a known form.

`DecoderStack` reads the modules of a transformers model by their names and by what they compute: every norm
and activation is compared with the kernels' idea of it, and what is not recognised is refused with its
reason, so that the modules run one by one as before. `install` then compares what both ways compute.

Legend: T tokens of the step, D hidden size.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hearth.engine.attention import layer as layers
from hearth.engine.attention.layer import LayerKV
from hearth.engine.native.decoder import (
    NORM_LAYER,
    NORM_RMS,
    NORM_RMS_WIDE,
    DecoderLayer,
    DecoderStep,
    Linear,
    Norm,
    functions,
)
from hearth.engine.native.gemm import aligned_memory
from hearth.engine.rotary import Positions, RotaryTables, Unsuited

if TYPE_CHECKING:
    from hearth.engine.runner import Runner

_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.gelu,
    F.relu,
    lambda x: F.relu(x).square(),
)  # in the order of decoder.h
_LAYER_CHILDREN = {"self_attn", "mlp"}
# Two ways of rounding bfloat16 are some percent apart after many layers; another arithmetic is far away.
_TOLERANCE = 0.08

logger = logging.getLogger(__name__)


class DecoderStack:
    """Takes the place of the base model's ``forward`` while the engine's own attention is in use."""

    def __init__(
        self, base: nn.Module, kv: Sequence[LayerKV], max_model_len: int, positions: Positions
    ) -> None:
        """Read ``base``; raises `Unsuited`."""
        self.base, self.step, self.kv = base, kv[0].step, list(kv)
        config: Any = base.config
        self.config = config
        self.hidden_size: int = self.config.hidden_size
        self.max_model_len = max_model_len
        self._tables, self._positions = RotaryTables(base, max_model_len), positions
        self.read_weights()
        self.embed: nn.Module = _child(base, "embed_tokens")
        self._workspace = torch.zeros(0, dtype=torch.uint8)
        self._modules_forward = base.forward
        base.forward = self.forward

    def read_weights(self) -> None:
        """Point at what the modules of the base model hold now; raises `Unsuited`."""
        self._alive: list[torch.Tensor] = []  # what the pointers point to
        modules, kv = _decoder_layers(self.base), self.kv
        if len(modules) != len(kv):
            raise Unsuited(f"{len(modules)} layers call attention {len(kv)} times")
        self.layers = (DecoderLayer * len(kv))(
            *(
                self._read_layer(module, each, self._tables, self._positions)
                for module, each in zip(modules, kv, strict=True)
            )
        )
        self.final_norm = self._norm(_child(self.base, "norm"), self.hidden_size)

    def remove(self) -> None:
        """Give the base model its own ``forward`` back."""
        self.base.forward = self._modules_forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward over the tokens of the step; last_hidden_state [1, T, D]."""
        if self.config._attn_implementation != layers.NAME or self.step.needs_modules:
            return self._modules_forward(
                input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
            )
        hidden_1TD = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        hidden_1TD = hidden_1TD.contiguous()
        self._run(hidden_1TD)
        return BaseModelOutputWithPast(last_hidden_state=hidden_1TD)

    def _run(self, hidden_1TD: torch.Tensor) -> None:
        """Replace the rows of the step by what the layers make of them."""
        lib = functions()
        attention, positions_T = self.kv[0].native, self.step.positions_np
        assert attention is not None
        # What the kernels index without looking.
        assert hidden_1TD.dtype is torch.bfloat16
        assert hidden_1TD.shape == (1, len(positions_T), self.hidden_size)
        assert positions_T.max() < self.max_model_len
        attention.fill_step(self.step)
        step = DecoderStep(
            num_tokens=hidden_1TD.shape[1],
            hidden_size=self.hidden_size,
            positions=positions_T.ctypes.data,
            hidden=hidden_1TD.data_ptr(),
            attention=attention.args,
        )
        num_layers, step_ref = len(self.layers), ctypes.byref(step)
        needed = int(lib.hearth_decoder_workspace_bytes(self.layers, num_layers, step_ref))
        if self._workspace.numel() < needed:
            self._workspace = aligned_memory(needed + needed // 4)
        lib.hearth_decode(
            self.layers,
            num_layers,
            ctypes.byref(self.final_norm),
            step_ref,
            self._workspace.data_ptr(),
            torch.get_num_threads(),
        )

    # -- reading -----------------------------------------------------------------------------------------
    def _read_layer(
        self, module: nn.Module, kv: LayerKV, tables: RotaryTables, positions: Positions
    ) -> DecoderLayer:
        norms = _layer_norms(module)
        attention, mlp = _child(module, "self_attn"), _child(module, "mlp")
        if kv.native is None or kv.spec.sinks:
            raise Unsuited("its attention does not run in the compiled kernels")
        spec, result = kv.spec, DecoderLayer()
        for name, norm in norms.items():
            setattr(result, name, self._norm(norm, self.hidden_size))
        self._read_projections(attention, result)
        heads = {"query_norm": ("q_norm", spec.num_heads), "key_norm": ("k_norm", spec.num_kv_heads)}
        for field, (name, num_heads) in heads.items():
            if not hasattr(attention, name):
                continue
            norm = _child(attention, name)
            size = sum(parameter.numel() for parameter in norm.parameters())
            result.norm_all_heads = int(size != spec.key_dim)
            if size not in (spec.key_dim, num_heads * spec.key_dim):
                raise Unsuited(f"{name} has {size} weights")
            setattr(result, field, self._norm(norm, size))
        turns = None
        if getattr(attention, "use_rope", True):
            cos, sin = turns = tables.of(getattr(attention, "layer_idx", None))
            self._alive += [cos, sin]
            result.rotary_dim = 2 * cos.shape[1]
            result.cos, result.sin = cos.data_ptr(), sin.data_ptr()
        positions.check(attention, turns)
        self._read_mlp(mlp, result)
        result.attention = kv.native.args
        return result

    def _read_projections(self, attention: nn.Module, result: DecoderLayer) -> None:
        known = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
        _only_known(attention, known)
        if hasattr(attention, "qkv_proj"):
            result.query = self._linear(_child(attention, "qkv_proj"))
        else:
            result.query = self._linear(_child(attention, "q_proj"))
            result.key = self._linear(_child(attention, "k_proj"))
            result.value = self._linear(_child(attention, "v_proj"))
        result.out = self._linear(_child(attention, "o_proj"))

    def _read_mlp(self, mlp: nn.Module, result: DecoderLayer) -> None:
        known = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj"}
        act = next((a for a in (getattr(mlp, n, None) for n in _ACT_NAMES) if a is not None), None)
        if act is None:
            raise Unsuited(f"its {type(mlp).__name__} has no activation")
        _only_known(mlp, known | set(_ACT_NAMES))
        result.activation, result.gated = _which_activation(act), 1
        if hasattr(mlp, "gate_up_proj"):
            result.gate = self._linear(_child(mlp, "gate_up_proj"))
        elif hasattr(mlp, "c_fc"):
            result.gate, result.gated = self._linear(_child(mlp, "c_fc")), 0
        else:
            result.gate = self._linear(_child(mlp, "gate_proj"))
            result.up = self._linear(_child(mlp, "up_proj"))
        result.down = self._linear(_child(mlp, "c_proj" if hasattr(mlp, "c_fc") else "down_proj"))

    def _linear(self, module: nn.Module) -> Linear:
        packed = getattr(module, "native", None)
        if packed is None:
            raise Unsuited(f"{type(module).__name__} is not packed for the compiled kernels")
        return Linear(
            weight=packed.weight.data_ptr(),
            scale=None if packed.scale is None else packed.scale.data_ptr(),
            bias=None if packed.bias is None else packed.bias.data_ptr(),
            N=packed.num_outputs,
            K=packed.num_inputs,
            kind=packed.kind,
            group=packed.group,
        )

    def _norm(self, module: nn.Module, size: int) -> Norm:
        weight, bias, eps, kind = _which_norm(module, size)
        self._alive.append(weight)
        if bias is not None:
            self._alive.append(bias)
        return Norm(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps, kind)


_ACT_NAMES = ("act_fn", "activation_fn", "act")


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise Unsuited(f"its {type(module).__name__} has no {name}")
    return child


def _only_known(module: nn.Module, known: set[str]) -> None:
    """Raise if ``module`` has parts of which these kernels know nothing."""
    for name, child in module.named_children():
        if name not in known and not isinstance(child, nn.Dropout | nn.Identity):
            raise Unsuited(f"its {type(module).__name__} has a part {name}")
    if any(True for _ in module.parameters(recurse=False)):
        raise Unsuited(f"its {type(module).__name__} has parameters of its own")


def _decoder_layers(base: nn.Module) -> list[nn.Module]:
    _only_known(base, {"embed_tokens", "layers", "norm", "rotary_emb", "rotary_emb_local"})
    return list(_child(base, "layers").children())


def _layer_norms(layer: nn.Module) -> dict[str, nn.Module]:
    """The norms of a layer by the place where they stand; what a name means depends on its companions."""
    if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo 2
        places = {
            "attention_norm": "input_layernorm",
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    else:  # Llama and most others; GLM-4 has two more
        places = {
            "attention_norm": "input_layernorm",
            "attention_out_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_out_norm": "post_mlp_layernorm",
        }
    _only_known(layer, _LAYER_CHILDREN | set(places.values()))
    return {place: getattr(layer, name) for place, name in places.items() if hasattr(layer, name)}


@torch.inference_mode()
def _which_norm(module: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor | None, float, int]:
    """Weight and bias in float32, epsilon and kind of a norm, by comparing it with each kind."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.numel() != size or not isinstance(eps, float):
        raise Unsuited(f"its {type(module).__name__} has no weight or no epsilon")
    x_TD = torch.randn(7, size, generator=torch.Generator().manual_seed(0)).to(weight.dtype) * 3
    expected_TD = module(x_TD).float()
    wide_D = weight.float().flatten()
    bias_D = None if bias is None else bias.float().flatten()
    x_TD = x_TD.float()
    normed_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    # The rounding before the weight cannot be told from the output with certainty; the closest one is taken.
    candidates = [
        (NORM_RMS, wide_D, normed_TD.to(weight.dtype).float() * wide_D),
        (NORM_RMS_WIDE, wide_D, normed_TD * wide_D),
        (NORM_RMS_WIDE, 1 + wide_D, normed_TD * (1 + wide_D)),
    ]
    if bias_D is not None or isinstance(module, nn.LayerNorm):
        candidates = [(NORM_LAYER, wide_D, F.layer_norm(x_TD, (size,), wide_D, bias_D, eps))]
    errors = [float((got - expected_TD).norm() / expected_TD.norm()) for _, _, got in candidates]
    best = errors.index(min(errors))
    if not errors[best] < 1e-2:
        raise Unsuited(f"its {type(module).__name__} is no norm that the kernels know")
    return candidates[best][1].contiguous(), bias_D, eps, candidates[best][0]


@torch.inference_mode()
def _which_activation(act: Callable[[torch.Tensor], torch.Tensor]) -> int:
    x = torch.linspace(-6, 6, 301)
    for number, function in enumerate(_ACTIVATIONS):
        if torch.allclose(act(x), function(x), rtol=1e-4, atol=1e-5):
            return number
    raise Unsuited(f"its activation is {type(act).__name__}")


def install(
    model: PreTrainedModel, runner: Runner, vocab_size: int, max_model_len: int
) -> DecoderStack | None:
    """Put a `DecoderStack` in the place of ``model``'s layers, if it computes what they compute.

    Uses the first blocks, so it must run before any request.
    """
    stack: DecoderStack | None = None
    try:
        if model.dtype is not torch.bfloat16 or model.device.type != "cpu":
            raise Unsuited(f"the kernels compute bfloat16 on a CPU, not {model.dtype} on {model.device.type}")
        positions = Positions(model, vocab_size, max_model_len)
        expected = _observe(runner, vocab_size, max_model_len)
        stack = DecoderStack(model.base_model, runner.layers, max_model_len, positions)
        got = _observe(runner, vocab_size, max_model_len)
        errors = (
            float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(got, expected, strict=True)
        )
        error = max(errors)
        if not error <= _TOLERANCE:
            raise Unsuited(f"its layers as the kernels read them differ from its own by {error:.1%}")
        return stack
    except Unsuited as reason:
        logger.info("%s runs module by module: %s", type(model).__name__, reason)
    except Exception:  # a model that is built unlike any other still runs by its own modules
        logger.warning("%s runs module by module: reading it failed", type(model).__name__, exc_info=True)
    if stack is not None:
        stack.remove()
    return None


def _observe(runner: Runner, vocab_size: int, max_model_len: int) -> list[torch.Tensor]:
    """What a short text leaves: logits, and keys and values of every layer.

    Logits alone would hide a wrong rotation of keys in a model that hardly looks at them.
    """
    logits = runner.probe_logits(vocab_size, max_model_len)
    seen = [logits]
    for kv in runner.layers:
        for part in kv.pool.parts:
            seen.append(part[0].float().clone())
    return seen
