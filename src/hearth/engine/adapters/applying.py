"""Applying the adapters that the rows of a step ask for: two products a layer, however many there are.

The A of all loaded adapters stand below one another and their B beside one another. Between the two products
whatever does not belong to a token's adapter is set to zero: out += ((x A^T) * mask) B^T, in float32 as PEFT
does. With few adapters that costs less than gathering the rows of each (Punica, arXiv 2310.18547).

Legend: T tokens, K inputs, N outputs, C rank columns of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hearth.engine.adapters.reading import Adapter, read_adapter
from hearth.engine.linear import PackedLinear
from hearth.engine.plan import Plan
from hearth.errors import RequestError

_LINEARS = (PackedLinear, nn.Linear, Conv1D)


@dataclass
class _Stacked:
    """All adapters of one layer."""

    a_CK: torch.Tensor
    b_NC: torch.Tensor
    owner_C: torch.Tensor  # which adapter a column belongs to, its number in the order of loading
    layout: tuple[tuple[int, int], ...]  # (owner, rank) in order: layers with the same one share masks


class AdapterSet:
    """The adapters of one model. Their names are what requests give; their content is what is cached."""

    def __init__(self, model: nn.Module, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self.linears = {name: m for name, m in model.named_modules() if isinstance(m, _LINEARS)}
        self.device = next(model.parameters()).device
        self._named: dict[str, Adapter] = {}
        self._loaded: dict[bytes, Adapter] = {}  # those of the names, and those that requests still use
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._owner_T: torch.Tensor | None = None  # of each token of the step; -1 = no adapter
        self._owner_R: torch.Tensor | None = None  # of each position that wants logits
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}

    # -- loading -----------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        return list(self._named)

    @property
    def num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._loaded.values())

    def get(self, name: str) -> Adapter:
        """The adapter of this name; raises `RequestError` that lists the loaded ones."""
        adapter = self._named.get(name)
        if adapter is None:
            loaded = ", ".join(self._named) or "none"
            raise RequestError(
                f"adapter {name!r} is not loaded; loaded: {loaded}", fix="load it first", param="adapter"
            )
        return adapter

    def load(self, name: str, path: Path | str) -> Adapter:
        """Load an adapter, or replace the one of this name; running requests keep theirs.

        Raises `ModelError` if it cannot be read or does not fit, `RequestError` if there are too many, and
        changes nothing then.
        """
        if not name:
            raise RequestError("an adapter needs a name", param="lora_name")
        adapter = read_adapter(name, path, self.linears)
        if name not in self._named and len(self._named) >= self.max_adapters:
            raise RequestError(
                f"{len(self._named)} adapters are loaded, and max_adapters is {self.max_adapters}",
                fix="unload one, or start the engine with a larger max_adapters",
                param="lora_name",
            )
        if adapter.digest not in self._loaded:
            self._rebuild({**self._loaded, adapter.digest: adapter})
        self._named[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget the adapter's name; its weights go when nobody uses them any more, see `collect`."""
        self.get(name)
        del self._named[name]

    def collect(self, digests_in_use: Iterable[bytes]) -> None:
        """Drop the weights of adapters that have no name and that none of these requests uses."""
        keep = {adapter.digest for adapter in self._named.values()} | set(digests_in_use)
        if set(self._loaded) - keep:
            self._rebuild({digest: each for digest, each in self._loaded.items() if digest in keep})

    def _rebuild(self, loaded: dict[bytes, Adapter]) -> None:
        """Apply these from now on. All memory is taken first: where there is none, nothing has changed."""
        stacked = {}
        for module in {module for adapter in loaded.values() for module in adapter.weights}:
            parts = [
                (owner, adapter.weights[module])
                for owner, adapter in enumerate(loaded.values())
                if module in adapter.weights
            ]
            layout = tuple((owner, len(a)) for owner, (a, _) in parts)
            stacked[module] = _Stacked(
                torch.cat([a for _, (a, _) in parts]).to(self.device),
                torch.cat([b for _, (_, b) in parts], dim=1).to(self.device),
                torch.tensor([owner for owner, rank in layout for _ in range(rank)], device=self.device),
                layout,
            )
        for hook in self._hooks:
            hook.remove()
        self._loaded = loaded
        self._hooks = [
            self.linears[module].register_forward_hook(self._hook(each)) for module, each in stacked.items()
        ]

    # -- applying ----------------------------------------------------------------------------------------
    def begin(self, plan: Plan) -> bool:
        """Take note of whose tokens the step computes; returns whether any adapter is among them."""
        self._masks.clear()
        digests = [row.request.adapter_hash for row in plan.rows]
        if not any(digests):
            self._owner_T = self._owner_R = None
            return False
        number = {digest: owner for owner, digest in enumerate(self._loaded)}
        owner_N = torch.tensor([number[digest] if digest else -1 for digest in digests])
        counts = torch.tensor([(row.num_tokens, row.num_logits) for row in plan.rows])
        self._owner_T = owner_N.repeat_interleave(counts[:, 0]).to(self.device)
        self._owner_R = owner_N.repeat_interleave(counts[:, 1]).to(self.device)
        return True

    def _hook(self, stacked: _Stacked) -> Any:
        def add(
            module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor
        ) -> torch.Tensor | None:
            del module
            if self._owner_T is None:
                return None
            x_TK = inputs[0].reshape(-1, inputs[0].shape[-1])
            inner_TC = F.linear(x_TK.float(), stacked.a_CK) * self._mask(stacked, len(x_TK))
            change = F.linear(inner_TC, stacked.b_NC).view(out.shape)
            return (out.float() + change).to(out.dtype)

        return add

    def _mask(self, stacked: _Stacked, num_rows: int) -> torch.Tensor:
        """[rows, C] one where a column belongs to the row's adapter, else zero."""
        key = (num_rows, stacked.layout)
        if key not in self._masks:
            assert self._owner_T is not None
            assert self._owner_R is not None
            # The output layer sees the positions that want logits only.
            owner = self._owner_T if num_rows == len(self._owner_T) else self._owner_R
            assert len(owner) == num_rows
            self._masks[key] = (owner[:, None] == stacked.owner_C[None]).float()
        return self._masks[key]
