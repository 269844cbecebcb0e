"""From a loaded model and a configuration to what runs it: packed weights, KV cache, runner."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from hearth.engine import stack, support
from hearth.engine.attention import graphs
from hearth.engine.attention.choice import why_not_numba
from hearth.engine.attention.layer import LayerSpec
from hearth.engine.config import EngineConfig
from hearth.engine.hostcopy import HostBlocks, block_bytes
from hearth.engine.linear import can_pack, pack_linears
from hearth.engine.memory import DEFAULT_SHARE, available_memory
from hearth.engine.norm import fuse_norms
from hearth.engine.pool import BlockPool
from hearth.engine.runner import Runner
from hearth.engine.scheduler import Scheduler
from hearth.engine.swap import Costs, HostPool
from hearth.engine.timeline import Timeline
from hearth.engine.tp.collectives import Collectives
from hearth.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

Specs = list[tuple[torch.nn.Module, LayerSpec]]


def assemble(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    num_blocks: int | None = None,
    shared_token_bytes: int = 0,
    group: Collectives | None = None,
    timeline: Timeline | None = None,
) -> tuple[Runner, int, int]:
    """A tested runner, the number of blocks of its KV cache, and the longest sequence that it serves.

    num_blocks: of a pool that exists already, for a draft model; None sizes one.
    shared_token_bytes: what else each token of the pool takes, in the cache of a draft model.
    group: the ranks that each hold a part of the model; all of them call this.
    Changes ``model`` in place. Raises `UnsupportedModelError` if the model cannot run, `ConfigError` if the
    settings do not fit it, `EngineError` if the memory does not suffice.
    """
    text_config = model.config.get_text_config(decoder=True)
    timeline = timeline or Timeline()
    with timeline.stage("examine"):
        specs = support.examine(model)
    with timeline.stage("pack"):
        if config.weights != "auto" or (config.prepack and can_pack(model.dtype, model.device)):
            pack_linears(model, weights=config.weights, use_native=config.native)
    if num_blocks is None:
        token_bytes = sum(spec.bytes_per_token(model.dtype, config.kv_dtype) for _, spec in specs)
        num_blocks, max_model_len = size_pool(model, text_config, token_bytes + shared_token_bytes, config)
        if group is not None:
            num_blocks, max_model_len = group.least(num_blocks), group.least(max_model_len)
    else:
        assert config.max_model_len is not None
        max_model_len = config.max_model_len
    support.pin_rope(model, max_model_len)
    with timeline.stage("cache"):
        runner = _make_runner(model, specs, num_blocks, config)
    if runner.layers[0].path != "torch" and not why_not_numba(model.dtype, model.device):
        with timeline.stage("fuse"):
            fuse_norms(model)
    vocab_size = int(text_config.vocab_size)
    if config.native and config.tensor_parallel == 1:
        with timeline.stage("fuse"):
            runner.stack = stack.install(model, runner, vocab_size, max_model_len)
    with timeline.stage("test"):
        runner.self_test(vocab_size, max_model_len)
    runner.graphs = graphs.install(runner, max_model_len, config.max_num_seqs)
    return runner, num_blocks, max_model_len


def make_scheduler(
    runner: Runner, num_blocks: int, config: EngineConfig, *, allow_window: bool = True
) -> Scheduler:
    """A scheduler with its pool, and with a host pool if ``config.swap_memory`` asks for one.

    allow_window: give up blocks that all layers of the model have out of sight. A model whose layers differ
        keeps them all, as one of them sees all.
    Raises `ConfigError` if the host pool cannot hold a block.
    """
    windows = [layer.spec.window for layer in runner.layers]
    size = block_bytes(runner.layers)
    num_slots = config.swap_memory // (size * config.tensor_parallel)
    costs, host = Costs(), None
    if config.swap_memory:
        if not config.prefix_cache:
            raise ConfigError("swap_memory needs the prefix cache", fix="set prefix_cache, or swap_memory 0")
        if not num_slots:
            raise ConfigError(
                f"swap_memory is {config.swap_memory} bytes, less than a KV block",
                fix=f"use a multiple of {size * config.tensor_parallel}, or 0",
            )
        runner.host = HostBlocks(runner.layers, num_slots)
        costs.bytes_per_second = runner.host.measure()
        host = HostPool(num_slots)
    pool = BlockPool(
        num_blocks,
        config.block_size,
        prefix_cache=config.prefix_cache,
        window=max(windows) if allow_window and all(windows) else 0,
        host=host,
    )
    return Scheduler(
        pool,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        costs=costs,
        block_bytes=size,
    )


def size_pool(
    model: PreTrainedModel, text_config: Any, token_bytes: int, config: EngineConfig
) -> tuple[int, int]:
    """Blocks of the pool and the longest sequence, from the model's limit and the free memory.

    token_bytes: keys and values of one token in all layers.
    """
    limit = support.context_limit(text_config)
    wanted = config.max_model_len or limit or 4096
    hard = getattr(text_config, "max_position_embeddings", None) or limit
    if hard and wanted > hard:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {hard} positions",
            fix=f"use max_model_len <= {hard}",
        )
    block_bytes = token_bytes * config.block_size
    blocks_per_sequence = -(-wanted // config.block_size)
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(available_memory(model.device) * DEFAULT_SHARE)
    if config.kv_cache_memory is not None or model.device.type == "cpu":  # one memory for all ranks
        budget //= config.tensor_parallel
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
    try:
        return Runner(
            model,
            specs,
            num_blocks=num_blocks,
            block_size=config.block_size,
            attention=config.attention,
            native=config.native,
            kv_dtype=config.kv_dtype,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"not enough memory for the KV cache: {error}", fix="set kv_cache_memory"
        ) from error
