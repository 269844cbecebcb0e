"""Counting: parameters, floating-point operations per token, and what the hardware could do."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hearth.models.loading import quiet_transformers
from hearth.models.quantised import QuantisedLinear

# Dense tensor-core peaks in FLOP/s from the vendors' data sheets, without sparsity, by a part of the name.
_GPU_PEAKS_16BIT = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}


def num_parameters(model: torch.nn.Module) -> int:
    """All weights of a model, tied ones once; of a quantised layer those that it stands for."""
    return sum(parameter.numel() for parameter in model.parameters()) + _num_quantised(model)


def _num_quantised(model: torch.nn.Module) -> int:
    return sum(module.num_weights for module in model.modules() if isinstance(module, QuantisedLinear))


def flops_per_token(model_or_config: PreTrainedModel | PreTrainedConfig, sequence_length: int) -> float:
    """Floating-point operations to train on one token: 6·P + 6·L·H·D·T.

    P: weights that multiply each token: everything but the input embedding (an output matrix tied to it
    counts once), and of the experts only the share that is routed to. L layers, H heads of size D, T tokens
    in a row. The factor 6 is 2 for multiply and add, times 3 for forward and backward; attention counts its
    causal half, as if the row were one document, and a sliding window shortens T. Recomputation does not
    count.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    if isinstance(model_or_config, PreTrainedConfig):
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(model_or_config)
    else:
        model = model_or_config
    text = config.get_text_config()
    return 6.0 * _active_parameters(model, text) + 6.0 * _attention_products(text, sequence_length)


def _active_parameters(model: Any, text: Any) -> float:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    routed = getattr(text, "num_experts_per_tok", None)
    share = routed / experts if experts and routed else 1.0
    total = float(_num_quantised(model))
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight and not tied:
            continue
        total += parameter.numel() * (share if ".experts." in name else 1.0)
    return total


def _attention_products(text: Any, sequence_length: int) -> float:
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    if window and not getattr(text, "layer_types", None):
        kinds = ["sliding_attention"] * text.num_hidden_layers
    total = 0.0
    for kind in kinds:
        # Of T² pairs the causal half is used: T per token on average, half of it twice (scores and values).
        span = min(sequence_length, 2 * window) if "sliding" in kind and window else sequence_length
        total += heads * head_dim * span
    return total


@functools.lru_cache(maxsize=16)
def _measured_peak(device: str, dtype: torch.dtype, num_threads: int) -> float:  # noqa: ARG001 - cache key
    """FLOP/s of a square matrix product, the best of a few short runs."""
    size = 1024 if device == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> float:
    """What the device can reach in FLOP/s: from data sheets for known GPUs, measured otherwise.

    The measurement is a 1024³ matrix product on the CPU with the threads that torch uses now.
    """
    kind = torch.device(device).type
    if kind == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(torch.device(device))
        for part, peak in _GPU_PEAKS_16BIT.items():
            if part in name:
                return peak
    return _measured_peak(kind, dtype, torch.get_num_threads())
