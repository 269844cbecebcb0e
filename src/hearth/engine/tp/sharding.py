"""Which part of which weight a rank holds: transformers' tensor-parallel plan of a model, read as data.

A plan names modules by patterns (``layers.*.self_attn.q_proj``) and gives each a style. The base model has
one, and so has the head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hearth.errors import ConfigError, UnsupportedModelError

# Style of the plan -> what becomes of a linear layer. Replicated modules are simply left whole.
_COLUMNS, _GATHERED, _ROWS, _ROWS_OF_WHOLE = "columns", "gathered columns", "rows", "rows of a whole input"
_STYLES = {
    "colwise": _COLUMNS,
    "colwise_rep": _GATHERED,
    "colwise_gather_output": _GATHERED,
    "rowwise": _ROWS,
    "rowwise_rep": _ROWS_OF_WHOLE,
    "rowwise_split_input": _ROWS_OF_WHOLE,
    "replicated_with_grad_allreduce": None,
    "replicated": None,
}


@dataclass(frozen=True)
class Cut:
    """How the linear layer ``name`` is divided."""

    name: str
    kind: str

    @property
    def dim(self) -> int:
        """Of the weight [out, in]."""
        return 0 if self.kind in (_COLUMNS, _GATHERED) else 1

    @property
    def gathers(self) -> bool:
        return self.kind == _GATHERED

    @property
    def adds(self) -> bool:
        return self.dim == 1

    @property
    def splits_input(self) -> bool:
        return self.kind == _ROWS_OF_WHOLE


def find_cuts(model: PreTrainedModel, num_ranks: int) -> list[Cut]:
    """How ``model`` is divided over ``num_ranks`` ranks, in the order of its modules.

    Raises `UnsupportedModelError` if it has no plan, or one with styles that are unknown here (experts,
    say), and `ConfigError` if heads or features cannot be divided.
    """
    plan = _read_plan(model)
    _check_heads(model, plan, num_ranks)
    tied = model.get_output_embeddings() if _is_tied(model) else None
    cuts = []
    for name, module in model.named_modules():
        style = _style_of(name, plan)
        if style is None:
            continue
        if style not in _STYLES:
            raise _refuse(model, f"its plan divides {name} as {style!r}, which Hearth does not know")
        kind = _STYLES[style]
        if kind is None or module is tied:
            continue
        if not isinstance(module, nn.Linear):
            raise _refuse(model, f"its plan divides {name}, a {type(module).__name__}")
        cut = Cut(name, kind)
        size = module.weight.shape[cut.dim]
        if size % num_ranks:
            if module is model.get_output_embeddings():
                continue  # a vocabulary of any size: every rank computes all logits
            raise ConfigError(
                f"tensor_parallel is {num_ranks}, but {name} has {size} features",
                fix="use a divisor of them",
            )
        cuts.append(cut)
    return cuts


def _read_plan(model: PreTrainedModel) -> dict[str, str]:
    config = model.config.get_text_config(decoder=True)
    base: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not base:
        raise _refuse(model, "transformers has no tensor-parallel plan for it")
    prefix = f"{model.base_model_prefix}."
    plan = {prefix + pattern: style for pattern, style in base.items()}
    return plan | dict(type(model)._tp_plan or {})


def _style_of(name: str, plan: dict[str, str]) -> str | None:
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _check_heads(model: PreTrainedModel, plan: dict[str, str], num_ranks: int) -> None:
    """Columns of attention projections are cut between heads, so there must be heads for everyone."""
    config: Any = model.config.get_text_config(decoder=True)
    if not any(style == "colwise" and ".self_attn." in pattern for pattern, style in plan.items()):
        return  # every rank computes all heads
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_ranks or num_kv_heads % num_ranks:
        raise ConfigError(
            f"tensor_parallel is {num_ranks}, but the model has {num_heads} attention heads and "
            f"{num_kv_heads} key-value heads",
            fix="use a divisor of both",
        )


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _refuse(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tensor_parallel cannot divide {type(model).__name__}: {reason}", fix="use tensor_parallel 1"
    )


def own_part(length: int, rank: int, num_ranks: int) -> slice:
    """The indices of a divided dimension that belong to ``rank``."""
    part = length // num_ranks
    return slice(rank * part, (rank + 1) * part)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these tensors, without making others first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
