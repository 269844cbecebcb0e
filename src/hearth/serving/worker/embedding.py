"""``POST /v1/embeddings``."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
from typing import Any, Protocol

from hearth.engine.outputs import Embedding
from hearth.errors import RequestError
from hearth.serving.decoding import decode, invalid
from hearth.serving.inputs import text_inputs
from hearth.serving.protocol import EmbeddingRequest
from hearth.serving.worker.adapters import Adapters
from hearth.serving.worker.prompts import PromptMaker
from hearth.telemetry.metrics import EngineMetrics

MAX_INPUTS = 2048  # as OpenAI's


class EmbeddingEngine(Protocol):
    """What is used of AsyncEngine."""

    async def embed(self, prompt: list[int]) -> Embedding: ...


class Embedder:
    """Answers requests for vectors."""

    def __init__(
        self,
        engine: EmbeddingEngine,
        prompts: PromptMaker,
        adapters: Adapters,
        metrics: EngineMetrics,
        version: str,
        max_len: int,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._prompts = prompts
        self._adapters = adapters
        self._version = version
        self._max_len = max_len

    async def answer(self, body: bytes) -> dict[str, Any]:
        """OpenAI's list of embeddings, in the order of the inputs."""
        request = decode(body, EmbeddingRequest)
        if self._adapters.find(request.model) is not None:
            raise invalid("embeddings with an adapter are not supported", "model", "unsupported_parameter")
        texts = text_inputs(request.input, "input")
        if len(texts) > MAX_INPUTS:
            raise invalid(f"input has {len(texts)} entries, at most {MAX_INPUTS} are allowed", "input")
        prompts = [await self._prompts.encode(text, "input") for text in texts]
        longest = max(map(len, prompts))
        if longest > self._max_len:
            raise invalid(
                f"this model's context is {self._max_len} tokens; an input has {longest}",
                "input", "context_length_exceeded",
            )  # fmt: skip
        results = await self._vectors(prompts)
        for result in results:
            self._metrics.observe_embedding(num_prompt_tokens=result.num_prompt_tokens)
        size = len(results[0].embedding)
        if request.dimensions not in (None, size):
            raise invalid(
                f"dimensions {request.dimensions} is not supported: this model's embeddings have {size}",
                "dimensions", "unsupported_parameter",
            )  # fmt: skip
        encode = _base64 if request.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(result.embedding)}
            for index, result in enumerate(results)
        ]
        count = sum(result.num_prompt_tokens for result in results)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self._version, "usage": usage}

    async def _vectors(self, prompts: list[list[int]]) -> list[Embedding]:
        """One vector a prompt; HttpError 400 or the engine's error for the first that cannot be embedded."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._engine.embed(prompt)) for prompt in prompts]
        except* RequestError as errors:
            first = errors.exceptions[0]
            assert isinstance(first, RequestError)
            # The engine knows prompts; the client has sent "input".
            raise RequestError(first.message, fix=first.fix, param="input") from None
        return [task.result() for task in tasks]


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client expects."""
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
