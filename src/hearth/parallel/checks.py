"""What cannot be combined, found before anything is built or sent. Pure; no torch.

Every function raises ConfigError, which all processes do alike, as they are given the same. A setting that
would have no effect is refused like one that cannot work: whoever wrote it expects something of it.
"""

from __future__ import annotations

from typing import Any

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.layout import Layout

# Families of transformers whose outputs were compared with those of the whole model, in float64 and with all
# differences below 1e-9: cut by tensor parallelism (gradients, too), as stages of a pipeline, with positions
# and with experts spread over processes.
TENSOR_FAMILIES = frozenset(
    """
    apertus arcee cohere cohere2 deepseek_v3 ernie4_5 exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt_neox granite granitemoe helium llama minimax ministral ministral3 mistral mixtral nemotron
    olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2
    """.split()  # noqa: SIM905 - a list of names to read
)
PIPELINE_FAMILIES = frozenset(
    """
    apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone4
    flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_oss granite granite_swa helium llama
    minimax ministral ministral3 mistral mixtral olmo olmo2 olmo3 phi phi3 qwen2 qwen2_moe qwen3
    qwen3_moe qwen3_next seed_oss smollm3 starcoder2 vaultgemma
    """.split()  # noqa: SIM905 - a list of names to read
)
CONTEXT_FAMILIES = frozenset(
    """
    apertus arcee bitnet cohere cohere2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma
    gemma3_text glm glm4 glm4_moe gpt2 gpt_neox granite granitemoe granitemoeshared helium
    hunyuan_v1_dense llama ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
    """.split()  # noqa: SIM905 - a list of names to read
)
EXPERT_FAMILIES = frozenset(
    """
    deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoeshared minimax
    mixtral olmoe qwen2_moe qwen3_moe qwen3_next
    """.split()  # noqa: SIM905 - a list of names to read
)
_ATTENTIONS = ("full_attention", "sliding_attention")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHARD = "use parallel.shard, which takes every family"


def cuts_weights(section: ParallelSection, layout: Layout) -> bool:
    """Whether weights are in parts, each in another process."""
    whole = section.shard == 1 and section.tensor == 1 and section.expert == 1 and section.offload == "none"
    return not whole or (section.pipeline > 1 and layout.data * layout.context > 1)


def check_settings(section: ParallelSection, layout: Layout) -> None:
    """Settings of ``parallel`` that exclude each other, or that would do nothing."""
    if section.zero != 3 and section.shard == 1:
        raise ConfigError(
            f"parallel.zero {section.zero} says what is shared over parallel.shard, which is 1",
            fix="set parallel.shard to a number of processes, or leave zero out",
        )
    if section.schedule != "1f1b" and section.stages == 1:
        raise ConfigError(
            f"parallel.schedule {section.schedule} with parallel.stages 1 has no pieces to take in turns",
            fix="use stages: 2, or schedule: 1f1b",
        )
    if section.offload_dir is not None and section.offload != "nvme":
        raise ConfigError(
            f"parallel.offload_dir {section.offload_dir!r} is not used with parallel.offload "
            f"{section.offload}",
            fix="set offload: nvme with engine: deepspeed, or leave offload_dir out",
        )
    if section.offload == "cpu" and section.engine == "native" and layout.world_size == 1:
        raise ConfigError(
            "parallel.offload: cpu lets weights rest that are shared out, and there is one process",
            fix="start several processes with parallel.shard, or leave offload out",
        )
    _check_reduce(section)
    _check_expert_layout(section)


def _check_reduce(section: ParallelSection) -> None:
    if section.reduce == "fp32":
        return
    if (section.data, section.shard, section.context) == (1, 1, 1):
        raise ConfigError(
            f"parallel.reduce {section.reduce}: with data, shard and context 1 no gradients travel",
            fix="leave parallel.reduce out",
        )
    cutting = [
        f"{key} {getattr(section, key)}"
        for key in ("shard", "tensor", "pipeline", "expert")
        if getattr(section, key) > 1
    ]
    cutting += [f"offload {section.offload}"] if section.offload != "none" else []
    cutting += [f"engine {section.engine}"] if section.engine != "native" else []
    if section.reduce == "powersgd" and cutting:
        raise ConfigError(
            f"parallel.reduce powersgd takes gradients of whole weights, between replicas alone; here are "
            f"{', '.join(cutting)}",
            fix="use reduce: bf16, or parallel.data alone",
        )


def _check_expert_layout(section: ParallelSection) -> None:
    for key in ("tensor", "context"):
        if section.expert > 1 and getattr(section, key) > 1:
            raise ConfigError(
                f"parallel.expert {section.expert} with parallel.{key} {getattr(section, key)}: experts are "
                f"spread over the processes of data and shard alone",
                fix=f"use {key}: 1, or expert: 1",
            )


def check_training(section: ParallelSection, layout: Layout, *, optimizer: str, compiled: bool) -> None:
    """Settings of ``train`` that do not go with a layout."""
    if compiled and section.schedule == "zero_bubble":
        raise ConfigError(
            "parallel.schedule zero_bubble takes the backward pass of a layer apart, which train.compile "
            "makes one piece",
            fix="use compile: false, or schedule: 1f1b or interleaved",
        )
    if optimizer in ("adamw8bit", "adafactor") and cuts_weights(section, layout):
        raise ConfigError(
            f"train.optimizer {optimizer} keeps state of whole weights, which {layout} cuts",
            fix="use optimizer: adamw, lion or muon, or parallel.data alone",
        )


def check_micro_batches(section: ParallelSection, num: int) -> None:
    """Whether a pipeline can take so many micro-batches a step."""
    if section.pipeline == 1:
        return
    size = section.pipeline
    if num < size or (section.schedule != "1f1b" and num % (num // size)):
        allowed = "at least" if section.schedule == "1f1b" else "a multiple of"
        raise ConfigError(
            f"parallel.pipeline {size} with schedule {section.schedule} takes {allowed} {size} micro-batches "
            f"a step; there are {num} (train.batch_size / processes of data and shard / micro_batch_size)",
            fix="raise train.batch_size, or lower train.micro_batch_size",
        )


def check_model(section: ParallelSection, config: Any, *, sequence_length: int) -> None:
    """Whether a model can be spread so. ``config``: its configuration, of transformers."""
    text = config.get_text_config()
    if section.pipeline > 1:
        _check_pipeline(section, text)
    if section.context > 1:
        _check_context(section, text, sequence_length)
    if section.expert > 1:
        _check_experts(section, text)


def _check_family(key: str, size: int, text: Any, families: frozenset[str]) -> None:
    if text.model_type not in families:
        raise ConfigError(
            f"parallel.{key} {size}: {text.model_type} is none of the families that are known to compute the "
            f"same: {', '.join(sorted(families))}",
            fix=_SHARD,
        )


def _check_pipeline(section: ParallelSection, text: Any) -> None:
    _check_family("pipeline", section.pipeline, text, PIPELINE_FAMILIES)
    if getattr(text, "tie_word_embeddings", False):
        raise ConfigError(
            f"parallel.pipeline {section.pipeline}: the model's output layer is its embedding "
            "(tie_word_embeddings), which are in different stages",
            fix="use a model with tie_word_embeddings: false, or parallel.shard",
        )
    factor = getattr(text, "embedding_multiplier", 1.0)
    if factor != 1.0:
        raise ConfigError(
            f"parallel.pipeline {section.pipeline}: this model multiplies what enters its layers by "
            f"{factor:g} (embedding_multiplier), which every stage would do again",
            fix=_SHARD,
        )
    num_stages = section.pipeline * section.stages
    if num_stages > text.num_hidden_layers:
        raise ConfigError(
            f"parallel: pipeline {section.pipeline} x stages {section.stages} = {num_stages} stages are more "
            f"than the {text.num_hidden_layers} layers of the model",
            fix=f"use at most {text.num_hidden_layers} stages",
        )


def _check_context(section: ParallelSection, text: Any, sequence_length: int) -> None:
    _check_family("context", section.context, text, CONTEXT_FAMILIES)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(_ATTENTIONS))
    if others:
        raise ConfigError(
            f"parallel.context {section.context}: the model has layers of {', '.join(others)}, which see the "
            f"positions of one process alone; {', '.join(_ATTENTIONS)} see all",
            fix=_SHARD,
        )
    if sequence_length % (2 * section.context):
        raise ConfigError(
            f"data.sequence_length {sequence_length} is not a multiple of 2 x parallel.context "
            f"{section.context}",
            fix=f"use a multiple of {2 * section.context}",
        )


def _check_experts(section: ParallelSection, text: Any) -> None:
    counts = [getattr(text, name) for name in NUM_EXPERTS if isinstance(getattr(text, name, None), int)]
    if not counts:
        raise ConfigError(
            f"parallel.expert {section.expert}: {text.model_type} has no experts",
            fix="leave parallel.expert out, or use parallel.shard",
        )
    _check_family("expert", section.expert, text, EXPERT_FAMILIES)
    if counts[0] % section.expert:
        raise ConfigError(
            f"parallel.expert {section.expert} does not divide the {counts[0]} experts of the model",
            fix=f"use a number that divides {counts[0]}",
        )
