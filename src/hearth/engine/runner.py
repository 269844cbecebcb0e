"""Runs plans on a transformers model: one forward pass over all tokens of a step.

Legend: T tokens of the step, R positions that want logits, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hearth.engine.attention import layer as layers
from hearth.engine.attention.layer import LayerKV, LayerSpec
from hearth.engine.attention.step import StepContext
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.engine.support import attention, refuse, set_attention

# A forward through the paged cache may differ from transformers' own by rounding, not by more: the ratio of
# norms below which two sets of logits count as the same. In 16 bits a router of experts may flip.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.25}


class Runner:
    """Owns the model and the paged keys and values of its layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        specs: list[tuple[torch.nn.Module, LayerSpec]],
        *,
        num_blocks: int,
        block_size: int,
        numba: bool,
    ) -> None:
        self.model = model
        self.device = model.device
        self.step = StepContext(block_size, self.device)
        self.layers: list[LayerKV] = []
        for module, spec in specs:
            kv = LayerKV(spec, self.step, num_blocks, model.dtype, numba=numba)
            setattr(module, layers.SLOT, kv)
            self.layers.append(kv)
        set_attention(model, layers.NAME)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def num_bytes(self) -> int:
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> torch.Tensor:
        """Compute the plan's tokens; float32 logits [R, V] of the positions that want them, in plan order."""
        self.step.fill(plan)
        token_ids = [token for row in plan.rows for token in row.token_ids]
        input_ids = torch.tensor([token_ids], device=self.device)
        positions = torch.from_numpy(self.step.positions_np).to(self.device)[None]
        wanted = torch.from_numpy(wanted_positions(plan)).to(self.device)
        arguments: dict[str, Any] = {}
        if self._slices_logits:
            arguments["logits_to_keep"] = wanted
        output = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0] if self._slices_logits else output.logits[0, wanted]
        return logits.float()

    @torch.inference_mode()
    def self_test(self, vocab_size: int, max_model_len: int) -> None:
        """Compare chunks through the paged cache with one pass of transformers' eager attention.

        It sees what reading the config cannot: a state outside the cache, positions taken from elsewhere, a
        bias in the mask. Uses the first blocks, so it must run before any request.
        """
        chunks: tuple[int, ...] = (17, 5, 1, 1)  # the long path, the tiled path, and two decodes
        total = sum(chunks)
        size = self.step.block_size
        if min(self.layers[0].keys.shape[0] * size, max_model_len) < total:
            chunks = (1, 1)
            total = 2
        token_ids = torch.randint(
            0, vocab_size, (total,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        request = Request("self-test", 0, token_ids, SamplingParams(), 1)
        blocks = tuple(range(-(-total // size)))
        with attention(self.model, "eager"):
            expected = self.model(
                input_ids=torch.tensor([token_ids], device=self.device),
                position_ids=torch.arange(total, device=self.device)[None],
                use_cache=False,
            ).logits[0]
        start = 0
        for count in chunks:
            end = start + count
            row = PlanRow(request, start, count, tuple(token_ids[start:end]), blocks, 1, True)
            got = self.execute(Plan((row,)))[0]
            want = expected[end - 1].float()
            error = float((got - want).norm() / want.norm().clamp_min(1e-6))
            if not error <= _TOLERANCE[self.model.dtype]:
                raise refuse(
                    self.model,
                    f"its logits through the paged cache differ from its own by {error:.1%} at token {end}",
                )
            start = end


def wanted_positions(plan: Plan) -> np.ndarray:
    """[R] where in the step the positions are whose logits are wanted."""
    ends = np.cumsum([row.num_tokens for row in plan.rows])
    parts = [np.arange(end - row.num_logits, end) for end, row in zip(ends, plan.rows, strict=True)]
    return np.concatenate(parts)
