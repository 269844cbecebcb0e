"""From a loaded model and a configuration to what runs it: packed weights, KV cache, runner."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hearth.engine import support
from hearth.engine.attention.layer import LayerSpec
from hearth.engine.config import EngineConfig
from hearth.engine.linear import can_pack, pack_linears
from hearth.engine.memory import DEFAULT_SHARE, available_memory
from hearth.engine.norm import fuse_norms
from hearth.engine.runner import Runner
from hearth.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

Specs = list[tuple[torch.nn.Module, LayerSpec]]


def assemble(model: PreTrainedModel, config: EngineConfig) -> tuple[Runner, int, int]:
    """A tested runner, the number of blocks of its KV cache, and the longest sequence that it serves.

    Changes ``model`` in place. Raises `UnsupportedModelError` if the model cannot run, `ConfigError` if the
    settings do not fit it, `EngineError` if the memory does not suffice.
    """
    text_config = model.config.get_text_config(decoder=True)
    specs = support.examine(model)
    if config.prepack and can_pack(model.dtype, model.device):
        pack_linears(model)
    num_blocks, max_model_len = size_pool(model, text_config, [spec for _, spec in specs], config)
    support.pin_rope(model, max_model_len)
    runner = _make_runner(model, specs, num_blocks, config)
    if runner.layers[0].use_numba:
        fuse_norms(model)
    runner.self_test(int(text_config.vocab_size), max_model_len)
    return runner, num_blocks, max_model_len


def size_pool(
    model: PreTrainedModel, text_config: Any, specs: Sequence[LayerSpec], config: EngineConfig
) -> tuple[int, int]:
    """Blocks of the pool and the longest sequence, from the model's limit and the free memory."""
    limit = support.context_limit(text_config)
    wanted = config.max_model_len or limit or 4096
    hard = getattr(text_config, "max_position_embeddings", None) or limit
    if hard and wanted > hard:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {hard} positions",
            fix=f"use max_model_len <= {hard}",
        )
    block_bytes = sum(spec.bytes_per_token(model.dtype) for spec in specs) * config.block_size
    blocks_per_sequence = -(-wanted // config.block_size)
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(available_memory(model.device) * DEFAULT_SHARE)
    num_blocks = min(blocks_per_sequence * config.max_num_seqs, budget // block_bytes)
    if num_blocks >= blocks_per_sequence:
        return num_blocks, wanted
    fits = num_blocks * config.block_size
    if config.max_model_len is not None or fits < 2:
        raise ConfigError(
            f"the KV cache has {budget} bytes, room for {fits} tokens; one sequence of max_model_len "
            f"{wanted} needs {blocks_per_sequence * block_bytes} bytes",
            fix="lower max_model_len, raise kv_cache_memory, or free memory",
        )
    logger.warning("max_model_len is %d instead of %d: the KV cache holds no more", fits, wanted)
    return num_blocks, fits


def _make_runner(model: PreTrainedModel, specs: Specs, num_blocks: int, config: EngineConfig) -> Runner:
    numba = config.attention != "torch" and model.device.type == "cpu"
    if numba:
        try:
            from hearth.engine.attention import numba_path
        except ImportError:
            if config.attention == "numba":
                raise ConfigError(
                    "attention is 'numba', but numba is not installed", fix="pip install numba"
                ) from None
            numba = False
        else:
            numba = numba_path.supports(model.dtype)
    if config.attention == "numba" and not numba:
        raise ConfigError(
            f"attention is 'numba', which does not run {model.dtype} on {model.device}",
            fix="use attention auto or torch",
        )
    try:
        return Runner(model, specs, num_blocks=num_blocks, block_size=config.block_size, numba=numba)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"not enough memory for the KV cache: {error}", fix="set kv_cache_memory"
        ) from error
