"""From a request body to a job: prompts as token ids, sampling parameters, and the dialect of the answer."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hearth.engine import SamplingParams
from hearth.engine.params import Guided
from hearth.engine.parsing import Parser, Style
from hearth.serving import protocol
from hearth.serving.answers import Dialect, Heading
from hearth.serving.chat_answers import AnswerForm, ChatDialect
from hearth.serving.completion_answers import CompletionDialect
from hearth.serving.constraints import form_field, guided_of
from hearth.serving.decoding import invalid, missing
from hearth.serving.http import HttpError
from hearth.serving.inputs import as_list, text_inputs
from hearth.serving.messages import chat_messages
from hearth.serving.plain_answers import PlainDialect
from hearth.serving.tool_use import ToolUse, tool_use
from hearth.serving.worker.adapters import Adapters
from hearth.serving.worker.prompts import PromptMaker, special_texts

_DEFAULT_COMPLETION_TOKENS = 16
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    """What a worker serves. ``version`` (``name@3``) is the answer's lineage; all ``names`` mean it.

    style: how its answers are written, by its chat template or by the operator's word.
    """

    name: str
    version: str
    names: tuple[str, ...]
    path: Path
    max_model_len: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    style: Style = field(default_factory=Style)


@dataclass(frozen=True)
class Job:
    """A validated request. Choice ``i * n + j`` is the j-th answer to prompt i."""

    prompts: tuple[list[int], ...]
    params: SamplingParams
    dialect: Dialect
    stream: bool
    version: str = ""  # what the answer is attributed to, adapter included
    form_field: str = "guided"  # which field of the request says the answer's form

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

    def __init__(self, model: ServedModel, prompts: PromptMaker, adapters: Adapters) -> None:
        self._model = model
        self._prompts = prompts
        self._adapters = adapters
        special = special_texts(prompts.tokenizer)
        hidden = any(marker in text or text in marker for marker in model.style.markers for text in special)
        # Where markers are special tokens, an answer shows them only if it shows all special tokens.
        self._markers_hidden = hidden

    async def completion(self, body: bytes) -> Job:
        """``POST /v1/completions``."""
        request = protocol.parse(body, protocol.CompletionRequest)
        texts = text_inputs(request.prompt, "prompt")
        prompts = [await self._prompts.encode(text) for text in texts]
        echo_logprobs = request.logprobs if request.echo else None
        if None not in (request.prompt_logprobs, echo_logprobs) and request.prompt_logprobs != echo_logprobs:
            raise invalid(
                "prompt_logprobs and logprobs with echo disagree: send one number", "prompt_logprobs"
            )
        params = self._params(
            request, prompts, "prompt", request.max_tokens, default=_DEFAULT_COMPLETION_TOKENS,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs if echo_logprobs is None else echo_logprobs,
            best_of=request.best_of, guided=guided_of(request),
        )  # fmt: skip
        if request.stream and params.num_sequences > params.n:
            raise invalid("best_of above n cannot be streamed: the best is known at the end", "best_of")
        if request.stream and params.n > 1 and params.prompt_logprobs is not None:
            raise invalid("log-probabilities of the prompt are streamed for one choice only", "n")
        echo = None
        if request.echo:
            echo = [self._prompts.text_of(prompt) for prompt in texts for _ in range(params.n)]
        heading = self._heading("cmpl", params)
        dialect = CompletionDialect(
            heading,
            logprobs=request.logprobs is not None,
            include_usage=_include_usage(request),
            echo=echo,
            prompt_logprobs=request.prompt_logprobs is not None,
        )
        return Job(tuple(prompts), params, dialect, bool(request.stream), heading.model, form_field(request))

    async def chat(self, body: bytes) -> Job:
        """``POST /v1/chat/completions``."""
        request = protocol.parse(body, protocol.ChatRequest)
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        limits = {value for value in (request.max_tokens, request.max_completion_tokens) if value is not None}
        if len(limits) > 1:
            raise invalid(
                f"max_tokens {request.max_tokens} and max_completion_tokens {request.max_completion_tokens} "
                "disagree: send one of them",
                "max_completion_tokens",
            )
        use = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
        settings = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort not in (None, "none"):
            if "reasoning_effort" not in self._prompts.template:
                raise invalid(
                    "reasoning_effort is not supported by this model's chat template", "reasoning_effort",
                    "unsupported_parameter",
                )  # fmt: skip
            settings.setdefault("reasoning_effort", request.reasoning_effort)
        prompt = await self._prompts.render(
            chat_messages(request.messages), tools=use.described if use else (), kwargs=settings
        )
        guided = guided_of(request) if use is None else self._enforced(use, guided_of(request))
        form = self._form(use, guided, prompt)
        params = self._params(
            request, [prompt], "messages", limits.pop() if limits else None, default=None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs, guided=guided,
            show_markers=self._markers_hidden and form is not None and (use is None or use.mode == "auto"),
        )  # fmt: skip
        heading = self._heading("chatcmpl", params)
        dialect = ChatDialect(
            heading,
            logprobs=bool(request.logprobs),
            include_usage=_include_usage(request),
            form=form,
            prompt_logprobs=request.prompt_logprobs is not None,
        )
        enforced = use is not None and use.mode != "auto"
        field_name = "tools" if enforced else form_field(request)
        return Job((prompt,), params, dialect, bool(request.stream), heading.model, field_name)

    def _form(self, use: ToolUse | None, guided: Guided | None, prompt: list[int]) -> AnswerForm | None:
        """How the answer is read; None where its text is the content."""
        if use is not None and use.name is not None:
            name = use.name
            return AnswerForm(lambda: Parser.of_call(name), forced=True)
        style, schemas = self._model.style, use.schemas if use else None
        if use is not None and use.mode == "required":
            listed = Style(tools="json_list")
            short_ids = style.tools == "mistral"
            return AnswerForm(
                lambda: Parser.of(listed, tools=schemas), max_calls=use.max_calls, short_ids=short_ids
            )
        if use is None and style.reasoning is None:
            return None
        # A grammar holds from the first token on: what it forces is no reasoning that the prompt has begun.
        opened = guided is None and style.opened_by(self._prompts.tail_of(prompt))
        return AnswerForm(
            lambda: Parser.of(style, tools=schemas, opened=opened, calls=use is not None),
            max_calls=use.max_calls if use else None,
            short_ids=style.tools == "mistral",
        )

    async def generate(self, body: bytes) -> Job:
        """``POST /generate``."""
        request = protocol.parse(body, protocol.GenerateRequest)
        if not isinstance(request.prompt, (str, list)):
            raise missing("prompt")
        prompt = await self._prompts.encode(request.prompt)
        params = self._params(
            request, [prompt], "prompt", request.max_tokens, default=256, guided=guided_of(request)
        )
        heading = self._heading("gen", params)
        dialect, field_name = PlainDialect(heading), form_field(request)
        return Job((prompt,), params, dialect, bool(request.stream), heading.model, field_name)

    async def plain_chat(self, body: bytes) -> Job:
        """``POST /chat``."""
        request = protocol.parse(body, protocol.PlainChatRequest)
        if (request.messages is None) == (request.message is None):
            raise invalid("send either 'message' or 'messages'", "message")
        if request.messages is not None:
            for name in ("system", "history"):
                if getattr(request, name) is not None:
                    raise invalid(f"{name} goes with 'message'; put it into 'messages'", name)
            messages = chat_messages(request.messages)
        else:
            history = chat_messages(request.history, param="history") if request.history else []
            messages = [{"role": "system", "content": request.system}] if request.system is not None else []
            messages += [*history, {"role": "user", "content": request.message or ""}]
        prompt = await self._prompts.render(messages)
        guided = guided_of(request)
        form = self._form(None, guided, prompt)
        params = self._params(
            request, [prompt], "messages", request.max_tokens, default=None, guided=guided,
            show_markers=self._markers_hidden and form is not None,
        )  # fmt: skip
        heading = self._heading("chat", params)
        dialect = PlainDialect(heading, None if form is None else form.make_parser)
        field_name = form_field(request)
        return Job((prompt,), params, dialect, bool(request.stream), heading.model, field_name)

    def _heading(self, prefix: str, params: SamplingParams) -> Heading:
        version = self._model.version + (f":{params.adapter}" if params.adapter else "")
        return Heading(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), version)

    def _params(
        self,
        request: protocol.Sampling,
        prompts: Sequence[list[int]],
        param: str,
        max_tokens: int | None,
        *,
        default: int | None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        best_of: int | None = None,
        guided: Guided | None = None,
        show_markers: bool = False,
    ) -> SamplingParams:
        """Check the context and fill in defaults: request, then the model's own, then OpenAI's."""
        adapter = self._adapters.find(request.model)
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
        if show_markers:
            values["skip_special_tokens"] = False
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "n", "ignore_eos"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
            *("priority", "cache_salt", "skip_special_tokens"),
        ):
            if (value := getattr(request, name)) is not None:
                values[name] = value
        if request.stop_token_ids is not None:
            values["stop_token_ids"] = tuple(request.stop_token_ids)
        return SamplingParams(
            max_tokens=max_tokens, stop=as_list(request.stop), logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, best_of=best_of, guided=guided, adapter=adapter, **values,
        )  # fmt: skip

    def _enforced(self, use: ToolUse, guided: Guided | None) -> Guided | None:
        """The grammar of an answer with tools; HttpError 400 where tools could not do what is asked."""
        if use.mode != "auto":
            if guided is not None:
                raise invalid("tool_choice and another form of the answer are both asked for", "tool_choice")
            return use.guided()
        if "tools" not in self._prompts.template or self._model.style.tools is None:
            raise invalid(
                f"the chat template of {self._model.version} knows no tools, or writes calls in no format "
                'that we know; tool_choice "required" or a named function works with any model',
                "tools", "unsupported_parameter",
            )  # fmt: skip
        return guided


def _include_usage(request: protocol.CompletionRequest | protocol.ChatRequest) -> bool:
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    return bool(options is not None and options.include_usage)
