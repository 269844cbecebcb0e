"""The settings of one engine. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from hearth.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "triton", "native", "numba", "torch")
WEIGHTS = ("auto", "int8", "int4")
KV_DTYPES = ("auto", "int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine loads and runs a model; a wrong value raises `ConfigError`.

    dtype: "auto" computes in the dtype that the checkpoint is stored in, because what was trained is what is
        served; one exception: float16 on a CPU, which has no fast float16 arithmetic, becomes float32.
    device: "auto" is the first GPU, else the CPU.
    max_model_len: prompt plus output, in tokens; None takes the model's own limit, or less if the KV cache
        cannot hold one such sequence.
    max_num_seqs: sequences that run at once; more of them wait.
    max_num_batched_tokens: the token budget of one step; a longer prompt is computed in chunks. While other
        sequences decode, an eighth of it (at least 64) goes to prompts, so that they need not wait long.
    kv_cache_memory: bytes for the KV cache; None takes what max_num_seqs x max_model_len tokens need, at most
        40 % of the memory that is free after loading.
    block_size: tokens in a KV block.
    prefix_cache: reuse the blocks of a prompt that starts like an earlier one.
    prepack: rearrange the linear weights for the CPU's matrix units at load.
    attention: "auto" chooses the quickest for device, dtype and shapes: compiled or numba kernels on a CPU,
        Triton's on a GPU, torch elsewhere; "triton", "native", "numba" and "torch" insist.
    native: use the compiled kernels where there is a compiler and a processor for them.
    weights: "auto" as stored; "int8" (a scale per output channel) and "int4" (a scale per group of inputs)
        compress the linear weights at load.
    kv_dtype: keys and values in the model's dtype ("auto"), in "int8" on a CPU, or in "fp8" on a GPU.
    swap_memory: bytes of ordinary memory to which the blocks of a preempted sequence may be copied, instead
        of computing them anew; 0 always computes.
    speculation: None; "ngram" drafts by looking for the last tokens in the text so far; anything else is a
        reference to a draft model with the same vocabulary.
    num_draft_tokens: tokens drafted at most in a step.
    max_adapters: LoRA adapters that may be loaded at once.
    tensor_parallel: processes that share each layer's work.
    seed: the engine's source of randomness for requests without a seed of their own.
    num_threads: CPU threads; None leaves torch's choice.
    """

    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory: int | None = None
    block_size: int = 32
    prefix_cache: bool = True
    prepack: bool = True
    attention: str = "auto"
    native: bool = True
    weights: str = "auto"
    kv_dtype: str = "auto"
    swap_memory: int = 0
    speculation: str | None = None
    num_draft_tokens: int = 4
    max_adapters: int = 8
    tensor_parallel: int = 1
    seed: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES),
            ("attention", ATTENTIONS),
            ("weights", WEIGHTS),
            ("kv_dtype", KV_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}", fix=f"use one of {', '.join(allowed)}"
                )
        for name, low in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("swap_memory", 0),
            ("num_draft_tokens", 1),
            ("max_adapters", 1),
            ("tensor_parallel", 1),
        ):
            _at_least(name, getattr(self, name), low)
        for name, low in (("max_model_len", 2), ("kv_cache_memory", 1), ("num_threads", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), low)

    @classmethod
    def of(cls, **fields: Any) -> EngineConfig:
        """The configuration with these fields; an unknown one is a `ConfigError` that lists the known."""
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"unknown engine setting {', '.join(unknown)}", fix=f"use one of {known}")
        return cls(**fields)

    def with_(self, **changes: Any) -> EngineConfig:
        return replace(self, **changes)


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least {low}")


def default_num_threads() -> int:
    """CPU threads that the operating system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
