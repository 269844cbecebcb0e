"""What the compiled decoder layers know of positions: that leading dims of queries and keys are rotated.

`RotaryTables` has a model's own rotary module make the angles, and `Positions` shows that queries and keys
depend on the position in no other way. Some scale queries by a function of it, which begins only beyond
thousands of tokens, where no short text would show it.

Legend: P positions looked at, H heads, D dims of a head, R the half of the dims that are rotated.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hearth.engine.support import attention

_OBSERVER = "hearth_positions"
_TABLE_CHUNK = 4096  # positions
_TOLERANCE = 0.02  # of the norm of a head; rounding to bfloat16 costs a quarter of it
_Call = tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]

_calls: list[_Call] = []


class Unsuited(Exception):
    """Why the layers of a model are not of the kernels' form."""


class RotaryTables:
    """Cosines and sines of all positions, as the model itself computes them for its dtype; a pair a kind."""

    def __init__(self, base: nn.Module, num_positions: int) -> None:
        rotary = getattr(base, "rotary_emb", None)
        if not isinstance(rotary, nn.Module):
            raise Unsuited(f"its {type(base).__name__} has no rotary_emb")
        self.rotary = rotary
        self.config: Any = base.config
        self.num_positions = num_positions
        self.by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.dtype = next(base.parameters()).dtype
        self._made: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, layer_index: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[positions, rotated dims / 2] cosines and sines of this layer, float32."""
        kind = None
        if self.by_type:
            if layer_index is None:
                raise Unsuited("its attention does not say which layer it is")
            kind = self.config.layer_types[layer_index]
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    @torch.inference_mode()
    def _make(self, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.zeros(1, 1, 1, dtype=self.dtype)
        arguments = () if kind is None else (kind,)
        halves: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for begin in range(0, self.num_positions, _TABLE_CHUNK):
            positions = torch.arange(begin, min(begin + _TABLE_CHUNK, self.num_positions))[None]
            pair = self.rotary(like, positions, *arguments)
            if not isinstance(pair, tuple) or len(pair) != 2 or pair[0].dim() != 3:
                raise Unsuited("its rotary embedding has another form")
            for half, table in zip(halves, pair, strict=True):
                left, right = table[0].float().chunk(2, dim=-1)
                if not torch.equal(left, right):
                    raise Unsuited("its rotary embedding pairs neighbours")
                half.append(left)
        return torch.cat(halves[0]).contiguous(), torch.cat(halves[1]).contiguous()


class Positions:
    """Queries, keys and values of one token at positions from the first to the last, in every layer.

    Attention gives nothing meanwhile, so that in each layer all rows are the same but for their positions.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, num_positions: int) -> None:
        last = num_positions - 1
        self.positions = sorted({0, last, *(1 << i for i in range(last.bit_length()))})
        ids = torch.full((1, len(self.positions)), vocab_size // 2)
        _calls.clear()
        with attention(model, _OBSERVER), torch.inference_mode():
            model(input_ids=ids, position_ids=torch.tensor([self.positions]), use_cache=False)
        self._seen = {module: tensors for module, *tensors in _calls}
        _calls.clear()

    def check(self, module: nn.Module, tables: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Raise `Unsuited` unless the heads of this attention module turn as the tables say, or, without
        tables, not at all."""
        if module not in self._seen:
            raise Unsuited(f"its {type(module).__name__} lets another module attend")
        query_PHD, key_PHD, value_PHD = self._seen[module]
        for name, heads_PHD, turns in (
            ("queries", query_PHD, tables), ("keys", key_PHD, tables), ("values", value_PHD, None)
        ):  # fmt: skip
            expected_PHD = heads_PHD[:1].expand_as(heads_PHD)
            if turns is not None:
                expected_PHD = _rotate(expected_PHD, turns[0][self.positions], turns[1][self.positions])
            error_PH = (heads_PHD - expected_PHD).norm(dim=-1) / expected_PHD.norm(dim=-1).clamp_min(1e-6)
            worst_P = error_PH.amax(-1)
            if not float(worst_P.max()) <= _TOLERANCE:
                where = self.positions[int(worst_P.argmax())]
                raise Unsuited(f"its {name} at position {where} are not merely rotated")


def _rotate(first_PHD: torch.Tensor, cos_PR: torch.Tensor, sin_PR: torch.Tensor) -> torch.Tensor:
    """The heads of each position from those of position 0, where all sines are 0."""
    size = cos_PR.shape[1]
    cos_P1R, sin_P1R = cos_PR[:, None], sin_PR[:, None]
    a, b = first_PHD[..., :size] / cos_P1R[:1], first_PHD[..., size : 2 * size] / cos_P1R[:1]
    turned = [a * cos_P1R - b * sin_P1R, b * cos_P1R + a * sin_P1R]
    return torch.cat([*turned, first_PHD[..., 2 * size :]], dim=-1)


def _observe(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, P, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call, and answer it with zeros [1, P, H, D]."""
    del attention_mask, kwargs
    query_PHD, key_PHD, value_PHD = (heads[0].transpose(0, 1).float() for heads in (query, key, value))
    _calls.append((module, query_PHD, key_PHD, value_PHD))
    _, H, P, _ = query.shape
    return query.new_zeros(1, P, H, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(_OBSERVER, _observe)
