"""Runs plans on a transformers model: one forward pass over all tokens of a step.

Legend: T tokens of the step, R positions that want logits, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hearth.engine.adapters import AdapterSet
from hearth.engine.attention import layer as layers
from hearth.engine.attention.choice import choose_path
from hearth.engine.attention.graphs import DecodeGraphs
from hearth.engine.attention.layer import LayerKV, LayerSpec
from hearth.engine.attention.step import StepContext
from hearth.engine.hostcopy import HostBlocks
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.engine.stack import DecoderStack
from hearth.engine.support import attention, refuse, set_attention
from hearth.engine.tp.leader import Leader

# A forward through the paged cache may differ from transformers' own by rounding, not by more: the ratio of
# norms below which two sets of logits count as the same. In 16 bits a router of experts may flip.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
_QUANTISED_TOLERANCE = 0.1  # at least, where keys and values are compressed


class Runner:
    """Owns the model and the paged keys and values of its layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        specs: list[tuple[torch.nn.Module, LayerSpec]],
        *,
        num_blocks: int,
        block_size: int,
        attention: str = "auto",
        native: bool = True,
        kv_dtype: str = "auto",
    ) -> None:
        self.model = model
        self.device = model.device
        self.step = StepContext(block_size, self.device)
        self.layers: list[LayerKV] = []
        for module, spec in specs:
            path = choose_path(spec, model.dtype, self.device, block_size, wanted=attention, native=native)
            kv = LayerKV(spec, self.step, num_blocks, model.dtype, path=path, kv_dtype=kv_dtype)
            setattr(module, layers.SLOT, kv)
            self.layers.append(kv)
        set_attention(model, layers.NAME)
        self._tolerance = _TOLERANCE[model.dtype]
        if kv_dtype != "auto":
            self._tolerance = max(self._tolerance, _QUANTISED_TOLERANCE)
        self.stack: DecoderStack | None = None  # runs the layers in the compiled kernels, where it can
        self.hidden_TD: torch.Tensor | None = None
        self.graphs: DecodeGraphs | None = None  # on a GPU: the passes of plain decodes
        self.leader: Leader | None = None  # of the other ranks, which compute every plan too
        self.adapters: AdapterSet | None = None  # once one is loaded
        self.host: HostBlocks | None = None  # where plans may copy blocks to and from
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def num_bytes(self) -> int:
        return sum(kv.num_bytes for kv in self.layers)

    def execute(self, plan: Plan) -> torch.Tensor:
        """Compute the plan's tokens; float32 logits [R, V] of the positions that want them, in plan order."""
        if self.leader is None:
            return self._execute(plan)
        with self.leader.step(plan):
            return self._execute(plan)

    @torch.inference_mode()
    def _execute(self, plan: Plan) -> torch.Tensor:
        if self.host is not None:
            self.host.copy(plan)
        self.step.fill(plan)
        self.step.needs_modules = self.adapters is not None and self.adapters.begin(plan)
        captured = self.graphs is not None and not self.step.needs_modules
        bucket = self.graphs.bucket(plan) if self.graphs is not None and captured else None
        if self.graphs is not None and bucket is not None:
            self.hidden_TD = None
            return self.graphs.run(plan, bucket)
        token_ids = [token for row in plan.rows for token in row.token_ids]
        input_ids = torch.tensor([token_ids], device=self.device)
        positions = torch.from_numpy(self.step.positions_np).to(self.device)[None]
        wanted = torch.from_numpy(wanted_positions(plan)).to(self.device)
        arguments: dict[str, Any] = {}
        if self._slices_logits:
            arguments["logits_to_keep"] = wanted
        with self._hidden_kept(plan):
            output = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0] if self._slices_logits else output.logits[0, wanted]
        return logits.float()

    @contextmanager
    def _hidden_kept(self, plan: Plan) -> Iterator[None]:
        """Leaves in ``hidden_TD`` what the step's logits come from, if a row of the plan is to be pooled."""
        self.hidden_TD = None
        if all(row.request.pooling is None for row in plan.rows):
            yield
            return

        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self.hidden_TD = output.last_hidden_state[0]

        body = self.model.get_decoder() or self.model.base_model
        hook = body.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.inference_mode()
    def self_test(self, vocab_size: int, max_model_len: int) -> None:
        """Compare chunks through the paged cache with one pass of transformers' eager attention.

        It sees what reading the config cannot: a state outside the cache, positions taken from elsewhere, a
        bias in the mask. Uses the first blocks, so it must run before any request.
        """
        probe = self._probe(vocab_size, max_model_len)
        token_ids = [token_id for row in probe for token_id in row.token_ids]
        with attention(self.model, "eager"):
            expected = self.model(
                input_ids=torch.tensor([token_ids], device=self.device),
                position_ids=torch.arange(len(token_ids), device=self.device)[None],
                use_cache=False,
            ).logits[0]
        for row, got in zip(probe, self.probe_logits(vocab_size, max_model_len), strict=True):
            error = distance(got, expected[row.end - 1].float())
            if not error <= self._tolerance:
                raise refuse(
                    self.model,
                    f"its logits through the paged cache differ from its own by {error:.1%} "
                    f"at token {row.end}",
                )

    def probe_logits(self, vocab_size: int, max_model_len: int) -> torch.Tensor:
        """Logits [chunks, V] after each chunk of a random text; overwrites the first blocks."""
        rows = self._probe(vocab_size, max_model_len)
        return torch.cat([self.execute(Plan((row,))) for row in rows])

    def _probe(self, vocab_size: int, max_model_len: int) -> list[PlanRow]:
        chunks: tuple[int, ...] = (17, 5, 1, 1)  # the long path, the tiled path, and two decodes
        size = self.step.block_size
        if min(self.layers[0].num_blocks * size, max_model_len) < sum(chunks):
            chunks = (1, 1)
        total = sum(chunks)
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(0, vocab_size, (total,), generator=generator).tolist()
        request = Request("self-test", 0, token_ids, SamplingParams(), 1)
        blocks = tuple(range(-(-total // size)))
        ends = list(itertools.accumulate(chunks))
        return [
            PlanRow(request, end - count, count, tuple(token_ids[end - count : end]), blocks, 1, True)
            for count, end in zip(chunks, ends, strict=True)
        ]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the second."""
    return float((got - want).norm() / want.norm().clamp_min(1e-6))


def wanted_positions(plan: Plan) -> np.ndarray:
    """[R] where in the step the positions are whose logits are wanted."""
    ends = np.cumsum([row.num_tokens for row in plan.rows])
    parts = [np.arange(end - row.num_logits, end) for end, row in zip(ends, plan.rows, strict=True)]
    return np.concatenate(parts)
