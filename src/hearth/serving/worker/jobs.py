"""From a request body to a job: prompts as token ids, sampling parameters, and the dialect of the answer."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hearth.engine import SamplingParams
from hearth.models import encode_chat, encode_text
from hearth.serving import protocol
from hearth.serving.answers import ChatDialect, CompletionDialect, Dialect, Heading, PlainDialect
from hearth.serving.http import HttpError

# Encoding takes about a microsecond a character; longer texts are encoded off the event loop.
_INLINE_CHARACTERS = 8192
_DEFAULT_COMPLETION_TOKENS = 16
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    """What a worker serves. ``version`` (``name@3``) is the answer's lineage; all ``names`` mean it."""

    name: str
    version: str
    names: tuple[str, ...]
    path: Path
    max_model_len: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A validated request. Choice ``i * n + j`` is the j-th answer to prompt i."""

    prompts: tuple[list[int], ...]
    params: SamplingParams
    dialect: Dialect
    stream: bool

    @property
    def num_choices(self) -> int:
        """How many answers the request gets."""
        return len(self.prompts) * self.params.n


def generation_defaults(path: Path) -> dict[str, Any]:
    """The sampling values that the model's ``generation_config.json`` asks for, if it samples at all."""
    try:
        config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or not config.get("do_sample"):
        return {}
    return {key: config[key] for key in _SAMPLING_DEFAULTS if config.get(key) is not None}


class JobMaker:
    """Makes jobs for one model."""

    def __init__(self, model: ServedModel, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    async def completion(self, body: bytes) -> Job:
        """``POST /v1/completions``."""
        request = protocol.parse(body, protocol.CompletionRequest)
        self._check_model(request)
        texts = protocol.completion_prompts(request.prompt)
        if request.echo and request.logprobs is not None:
            raise HttpError(
                400,
                "echo together with logprobs is not supported yet",
                param="echo",
                code="unsupported_parameter",
            )
        prompts = [await self._encode(text) for text in texts]
        limit = request.max_tokens
        params = self._params(
            request, prompts, "prompt", limit, default=_DEFAULT_COMPLETION_TOKENS, logprobs=request.logprobs
        )
        echo = [self._text(prompt) for prompt in texts for _ in range(params.n)] if request.echo else None
        dialect = CompletionDialect(
            self._heading("cmpl"),
            logprobs=request.logprobs is not None,
            include_usage=_include_usage(request),
            echo=echo,
        )
        return Job(tuple(prompts), params, dialect, bool(request.stream))

    async def chat(self, body: bytes) -> Job:
        """``POST /v1/chat/completions``."""
        request = protocol.parse(body, protocol.ChatRequest)
        self._check_model(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise HttpError(
                400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
            )
        limits = {value for value in (request.max_tokens, request.max_completion_tokens) if value is not None}
        if len(limits) > 1:
            raise HttpError(
                400,
                f"max_tokens {request.max_tokens} and max_completion_tokens {request.max_completion_tokens} "
                "disagree: send one of them",
                param="max_completion_tokens",
                code="invalid_value",
            )
        prompt = await self._render(protocol.chat_messages(request.messages))
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = self._params(
            request, [prompt], "messages", limits.pop() if limits else None, default=None, logprobs=logprobs
        )
        dialect = ChatDialect(
            self._heading("chatcmpl"), logprobs=bool(request.logprobs), include_usage=_include_usage(request)
        )
        return Job((prompt,), params, dialect, bool(request.stream))

    async def generate(self, body: bytes) -> Job:
        """``POST /generate``."""
        request = protocol.parse(body, protocol.GenerateRequest)
        self._check_model(request)
        if not isinstance(request.prompt, (str, list)):
            raise HttpError(
                400, "missing required field 'prompt'", param="prompt", code="missing_required_parameter"
            )
        prompt = await self._encode(request.prompt)
        params = self._params(request, [prompt], "prompt", request.max_tokens, default=256)
        return Job((prompt,), params, PlainDialect(self._heading("gen")), bool(request.stream))

    async def plain_chat(self, body: bytes) -> Job:
        """``POST /chat``."""
        request = protocol.parse(body, protocol.PlainChatRequest)
        self._check_model(request)
        if (request.messages is None) == (request.message is None):
            raise HttpError(400, "send either 'message' or 'messages'", param="message", code="invalid_value")
        if request.messages is not None:
            for name in ("system", "history"):
                if getattr(request, name) is not None:
                    raise HttpError(
                        400,
                        f"{name} goes with 'message'; put it into 'messages'",
                        param=name,
                        code="invalid_value",
                    )
            messages = protocol.chat_messages(request.messages)
        else:
            history = protocol.chat_messages(request.history, param="history") if request.history else []
            messages = [{"role": "system", "content": request.system}] if request.system is not None else []
            messages += [*history, {"role": "user", "content": request.message or ""}]
        prompt = await self._render(messages)
        params = self._params(request, [prompt], "messages", request.max_tokens, default=None)
        return Job((prompt,), params, PlainDialect(self._heading("chat")), bool(request.stream))

    def _heading(self, prefix: str) -> Heading:
        return Heading(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self._model.version)

    def _check_model(self, request: protocol.Sampling) -> None:
        if request.model is not None and request.model not in self._model.names:
            raise HttpError(
                404, f"the model {request.model!r} is not served here; this is {self._model.version}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt))

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            if not prompt:
                raise HttpError(
                    400, "prompt: the list of token ids is empty", param="prompt", code="invalid_value"
                )
            return list(prompt)
        ids = await self._call(len(prompt), lambda: encode_text(self._tokenizer, prompt))
        if not ids:
            raise HttpError(
                400, "prompt is empty, and this tokenizer has no token that begins a text", param="prompt",
                code="invalid_value",
            )  # fmt: skip
        return ids

    async def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise HttpError(
                400,
                f"the model {self._model.version} has no chat template: it was not trained to chat; "
                "use /v1/completions or /generate",
                code="no_chat_template",
            )
        num_characters = sum(len(turn["content"]) for turn in messages)
        return await self._call(num_characters, lambda: encode_chat(self._tokenizer, messages))

    @staticmethod
    async def _call(num_characters: int, work: Callable[[], list[int]]) -> list[int]:
        if num_characters <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.to_thread(work)

    def _params(
        self,
        request: protocol.Sampling,
        prompts: Sequence[list[int]],
        param: str,
        max_tokens: int | None,
        *,
        default: int | None,
        logprobs: int | None = None,
    ) -> SamplingParams:
        """Check the context and fill in defaults: request, then the model's own, then OpenAI's."""
        longest, room = max(map(len, prompts)), self._model.max_model_len
        if longest >= room or (max_tokens is not None and longest + max_tokens > room):
            asked = f" and {max_tokens} tokens of output" if max_tokens is not None else ""
            raise HttpError(
                400,
                f"this model's context is {room} tokens, prompt and answer together; the request has "
                f"{longest} tokens of {param}{asked}",
                param=param,
                code="context_length_exceeded",
            )
        rest = room - longest
        if max_tokens is None:
            max_tokens = rest if default is None else min(default, rest)
        values: dict[str, Any] = dict(self._model.defaults)
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "n", "ignore_eos"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        ):
            if (value := getattr(request, name)) is not None:
                values[name] = value
        if request.stop_token_ids is not None:
            values["stop_token_ids"] = tuple(request.stop_token_ids)
        return SamplingParams(
            max_tokens=max_tokens, stop=protocol.as_list(request.stop), logprobs=logprobs, **values
        )


def _include_usage(request: protocol.CompletionRequest | protocol.ChatRequest) -> bool:
    options = request.stream_options
    if options is not None and not request.stream:
        raise HttpError(
            400, "stream_options needs stream: true", param="stream_options", code="invalid_value"
        )
    return bool(options is not None and options.include_usage)
