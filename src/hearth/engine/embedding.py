"""Embeddings: the pooled last hidden states of a prompt, computed in the same steps as generation.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hearth.engine.outputs import RequestOutput
from hearth.engine.params import POOLINGS
from hearth.engine.request import Request
from hearth.errors import RequestError

_NAMES = {  # of sentence-transformers: older directories have a flag for each, newer ones a name
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "lasttoken": "last",
}


def pooling_of(path: Path | None, pooling: str | None) -> str:
    """``pooling``, or what the model directory says (``1_Pooling/config.json``), or "last".

    "last" because only the last position of a causal model has seen the whole text. Raises `RequestError`
    for a pooling that there is not.
    """
    source = "pooling"
    if pooling is None:
        pooling = "last"
        file = None if path is None else path / "1_Pooling" / "config.json"
        if file is not None and file.is_file():
            source = str(file)
            pooling = _read_pooling(file)
    pooling = _NAMES.get(pooling, pooling)
    if pooling not in POOLINGS:
        raise RequestError(
            f"{source} asks for pooling {pooling!r}", fix=f"use one of {', '.join(POOLINGS)}", param="pooling"
        )
    return pooling


def _read_pooling(file: Path) -> str:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if "pooling_mode" in settings:
            return str(settings["pooling_mode"])
        return ", ".join(key for key, value in settings.items() if key.startswith("pooling_") and value)
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(
            f"{file} cannot be read: {error}", fix="name the pooling in the request", param="pooling"
        ) from error


class EmbeddingSequence:
    """Takes the hidden states of a prompt chunk by chunk; `flush_output` gives their pool when all are in."""

    def __init__(self, request: Request, *, normalize: bool) -> None:
        assert request.pooling in POOLINGS
        self.request = request
        self.normalize = normalize
        self.reason: str | None = None
        self._num_taken = 0
        self._pool_D: torch.Tensor | None = None

    def take(self, start: int, hidden_TD: torch.Tensor) -> None:
        """Hidden states of the positions from ``start`` on; those known already, from before a preemption,
        are passed over."""
        end = start + len(hidden_TD)
        new_TD = hidden_TD[max(0, self._num_taken - start) :]
        if not len(new_TD):
            return
        match self.request.pooling:
            case "last":
                self._pool_D = new_TD[-1].float()
            case "cls":
                self._pool_D = new_TD[0].float() if self._pool_D is None else self._pool_D
            case _:
                total_D = new_TD.sum(dim=0, dtype=torch.float32)
                self._pool_D = total_D if self._pool_D is None else self._pool_D + total_D
        self._num_taken = end

    @property
    def is_complete(self) -> bool:
        return self._num_taken == self.request.num_prompt_tokens

    @property
    def is_finite(self) -> bool:
        """Whether the model gave numbers for all of the text."""
        return self._pool_D is not None and bool(torch.isfinite(self._pool_D).all())

    def flush_output(self) -> RequestOutput:
        request = self.request
        output = RequestOutput(
            request_id=request.request_id,
            finished=self.reason is not None,
            finish_reason=self.reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached,
        )
        if self.reason == "stop":
            assert self._pool_D is not None
            pool_D = self._pool_D / self._num_taken if request.pooling == "mean" else self._pool_D
            if self.normalize:
                pool_D = torch.nn.functional.normalize(pool_D, dim=0)
            output.embedding = pool_D.tolist()
        return output
