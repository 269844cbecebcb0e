"""Can this engine run that model? Read its rules, watch one forward pass, and say why not.

Any causal language model of transformers runs whose layers all call the attention interface with rules that
paged attention knows: causal, sliding window, soft cap, sinks, grouped heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from hearth.engine.attention.layer import KNOWN_ARGUMENTS, LayerSpec
from hearth.engine.attention.torch_path import dot_product
from hearth.engine.linear import KEEP
from hearth.errors import ConfigError, UnsupportedModelError

_PROBE = "hearth_probe"
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NO_INTERFACE = "it does not use transformers' attention interface"
_FIX = "use a model with plain causal attention, or run this one with transformers' own generate"
_calls: list[tuple[torch.nn.Module, LayerSpec, set[str]]] = []
# Families whose config and forward pass look like those of others, and which mean something else.
_OWN_WAYS = {
    "moshi": "its forward pass ignores sliding_window and its own cache does not, so that transformers gives "
    "other tokens with a cache than without"
}


def refuse(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the engine cannot run {type(model).__name__}: {reason}", fix=_FIX)


def set_attention(model: torch.nn.Module, name: str) -> None:
    """Make every part of ``model`` call this attention function.

    The configs are set directly: `set_attn_implementation` refuses names that it does not know, and some
    models whose flags are merely missing.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


@contextmanager
def attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    """``set_attention`` for a while."""
    previous = getattr(getattr(model, "config", None), "_attn_implementation", None) or "sdpa"
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, previous)


def examine(model: PreTrainedModel) -> list[tuple[torch.nn.Module, LayerSpec]]:
    """The attention modules in the order of their calls, with their shapes and rules.

    Raises `UnsupportedModelError` with the reason if the engine would compute something else than the model
    means. What this reading cannot see, the comparison in `Runner.self_test` does.
    """
    config = model.config.get_text_config(decoder=True)
    _check_config(model, config)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refuse(
            model, "its forward takes no position_ids, so tokens of several sequences cannot share a pass"
        )
    _calls.clear()
    input_ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    positions = torch.arange(8, device=model.device)[None]
    try:
        with attention(model, _PROBE), torch.inference_mode(), _marking_idle_linears(model):
            model(input_ids=input_ids, position_ids=positions, use_cache=False)
    except UnsupportedModelError as error:
        raise refuse(model, error.message) from error
    except Exception as error:
        # Without a mask, attention of a model's own often fails before anything else is learnt of it.
        if not _calls:
            raise refuse(model, _NO_INTERFACE) from error
        raise refuse(model, f"a first forward pass failed with {type(error).__name__}: {error}") from error
    calls = list(_calls)
    _calls.clear()
    num_layers = config.num_hidden_layers
    if not calls:
        raise refuse(model, _NO_INTERFACE)
    if len({id(module) for module, _, _ in calls}) != len(calls):
        raise refuse(model, "one attention module is called several times in a pass")
    if len(calls) != num_layers:
        raise refuse(
            model,
            f"{len(calls)} of its {num_layers} layers call the attention interface; the others keep a state "
            "that the paged cache does not hold (state space, linear attention, cross attention)",
        )
    unknown = sorted(set().union(*(arguments for _, _, arguments in calls)) - KNOWN_ARGUMENTS)
    if unknown:
        raise refuse(model, f"its attention takes {', '.join(unknown)}, which paged attention does not know")
    return [(module, spec) for module, spec, _ in calls]


def _check_config(model: PreTrainedModel, config: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse(model, "it is an encoder-decoder")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        raise refuse(model, "it uses ALiBi position biases")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES)
    if unknown:
        raise refuse(model, f"it has layers of type {', '.join(unknown)}")
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # text is causal
        raise refuse(model, "its attention looks ahead (use_bidirectional_attention)")
    if config.model_type in _OWN_WAYS:
        raise refuse(model, _OWN_WAYS[config.model_type])


@contextmanager
def _marking_idle_linears(model: torch.nn.Module) -> Iterator[None]:
    """Mark the linear layers that a pass does not call: their weights may be read instead of their forward
    used, as some routers of experts do, and must stay as they are."""
    idle = {module for module in model.modules() if type(module) is torch.nn.Linear}
    hooks = [module.register_forward_pre_hook(lambda used, _: idle.discard(used)) for module in idle]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in idle:
            setattr(module, KEEP, True)


def _probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call, and answer it with plain causal attention."""
    if getattr(module, "is_causal", True) is False and kwargs.get("is_causal") is not True:
        raise UnsupportedModelError("its attention is not causal", fix=_FIX)
    scale = kwargs.get("scaling")
    sinks = kwargs.get("s_aux")
    spec = LayerSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        scale=float(scale) if scale is not None else float(key.shape[3]) ** -0.5,
        window=_window(module, kwargs),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks=sinks is not None,
    )
    if attention_mask is not None:  # transformers makes none for an attention function that it does not know
        raise UnsupportedModelError("it gives its attention a mask or a bias of its own", fix=_FIX)
    _calls.append((module, spec, {name for name, argument in kwargs.items() if argument is not None}))
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return dot_product(spec, query, key, value, visible, sinks).transpose(1, 2), None


def _window(module: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """How many tokens a query sees, itself included; 0 = all.

    The layer's type decides where it is known, because some models pass a window to every layer.
    """
    config = getattr(module, "config", None)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if layer_types and isinstance(index, int):
        if layer_types[index] == "full_attention":
            return 0
        window = window or getattr(config, "sliding_window", None)
    return int(window) if isinstance(window, int) and window > 0 else 0


ALL_ATTENTION_FUNCTIONS.register(_PROBE, _probe_attention)


def context_limit(config: Any) -> int | None:
    """The longest sequence that the model was made for; None if it does not say.

    For LongRoPE it is the original length, where the short factors hold, as transformers uses them there.
    """
    for name, kind in _rope_types(config):
        if kind == "longrope":
            original = _original_length(config, name)
            if original:
                return int(original)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def pin_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Make the rotary frequencies independent of what else is in the batch.

    transformers chooses LongRoPE's factors and dynamic NTK's base by the largest position *of the batch* and
    changes them in place. LongRoPE is fixed to the short factors if no sequence can pass the original length,
    else to the long ones; dynamic NTK never changes below ``max_position_embeddings``, and is refused above.
    """
    config = model.config.get_text_config(decoder=True)
    for name, kind in _rope_types(config):
        if "dynamic" in kind and max_model_len > config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len is {max_model_len}, but dynamic NTK changes its frequencies beyond "
                f"{config.max_position_embeddings} positions",
                fix=f"use max_model_len <= {config.max_position_embeddings}",
            )
        if kind == "longrope":
            _pin_longrope(model, name, long=max_model_len > (_original_length(config, name) or max_model_len))


def _pin_longrope(model: PreTrainedModel, layer_type: str | None, *, long: bool) -> None:
    prefix = f"{layer_type}_" if layer_type else ""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kind = kind.get(layer_type) if isinstance(kind, dict) else kind
        if kind != "longrope":
            continue
        if long:
            # One look beyond the original length makes transformers compute the long factors.
            original = _original_length(module.config, layer_type)
            far = torch.tensor([[int(original or 0) + 1]], device=model.device)
            x = torch.zeros(1, 1, 1, device=model.device, dtype=model.dtype)
            module(x, far, layer_type) if layer_type else module(x, far)
            frequencies = getattr(module, f"{prefix}long_inv_freq")
        else:
            frequencies = getattr(module, f"{prefix}original_inv_freq")
        # Copies, because assigning a registered buffer under a second name would register that name too.
        for name in ("long_inv_freq", "original_inv_freq"):
            setattr(module, f"{prefix}{name}", frequencies.detach().clone())
        getattr(module, f"{prefix}inv_freq").copy_(frequencies)


def _rope_types(config: Any) -> list[tuple[str | None, str]]:
    """(layer type or None, rope type) for each set of rotary parameters."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(parameters, dict):
        return []
    if all(isinstance(value, dict) for value in parameters.values()) and parameters:
        return [(name, str(value.get("rope_type", "default"))) for name, value in parameters.items()]
    return [(None, str(parameters.get("rope_type", "default")))]


def _original_length(config: Any, layer_type: str | None) -> int | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type:
        parameters = parameters.get(layer_type, {})
    return parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
