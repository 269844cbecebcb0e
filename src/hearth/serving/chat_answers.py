"""The answers of ``/v1/chat/completions``: content, reasoning and tool calls, whole or streamed."""

from __future__ import annotations

import itertools
import secrets
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hearth.engine.parsing import Event, Parsed, Parser
from hearth.serving.answers import (
    Choice,
    Delta,
    Heading,
    TokenLogprob,
    Usage,
    object_of,
    render_prompt_logprobs,
)


@dataclass(frozen=True)
class AnswerForm:
    """How the text of an answer is to be read.

    make_parser: makes a parser for one choice. max_calls: further calls are left out. forced: the request
    named the function, so the answer ends with "stop", as OpenAI's does. short_ids: Mistral's templates
    accept ids of nine letters and digits only.
    """

    make_parser: Callable[[], Parser]
    max_calls: int | None = None
    forced: bool = False
    short_ids: bool = False

    def allows(self, event: Event) -> bool:
        """Whether this event is part of the answer."""
        of_call = event.kind in ("call", "arguments", "end")
        return not of_call or self.max_calls is None or event.index < self.max_calls

    def call_id(self) -> str:
        """A new id."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{uuid.uuid4().hex[:24]}"

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """OpenAI's: an answer that ends with calls says so."""
        return "tool_calls" if reason == "stop" and num_calls and not self.forced else reason


@dataclass(slots=True)
class _Reading:
    """One choice of a stream."""

    parser: Parser
    num_calls: int = 0


class ChatDialect:
    """``/v1/chat/completions``; without ``form`` the text is the content. prompt_logprobs: vLLM's field."""

    def __init__(
        self,
        heading: Heading,
        *,
        logprobs: bool,
        include_usage: bool,
        form: AnswerForm | None = None,
        prompt_logprobs: bool = False,
    ) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._form = form
        self._prompt_logprobs = prompt_logprobs
        self._readings: dict[int, _Reading] = {}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = object_of(self._heading, "chat.completion.chunk", choices)
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:
        """One event a choice, with the role."""
        for index in range(num_choices):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Chunks: a call's id and name come alone, and its arguments after them.

        Log-probabilities come with the first chunk of their delta, the end with the last.
        """
        reason, parts = delta.finish_reason, [{"content": delta.text}] if delta.text else []
        if self._form is not None:
            reading = self._readings.setdefault(delta.choice, _Reading(self._form.make_parser()))
            events = reading.parser.feed(delta.text)
            if reason is not None:
                events += reading.parser.finish()
            parts = list(self._parts(reading, events))
            reason = self._form.finish_reason(reason, reading.num_calls)
        logprobs = self._render(delta.logprobs)
        if not parts and (reason is not None or delta.logprobs or self._form is None):
            parts = [{}] if reason is not None or self._form is not None else [{"content": ""}]
        for number, part in enumerate(parts):
            choice = {
                "index": delta.choice,
                "delta": part,
                "logprobs": logprobs if number == 0 else None,
                "finish_reason": reason if number == len(parts) - 1 else None,
            }
            yield self._chunk([choice])

    def _parts(self, reading: _Reading, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The ``delta`` objects of some events."""
        assert self._form is not None
        told = (event for event in events if self._form.allows(event))
        for (kind, index), group in itertools.groupby(told, key=lambda event: (event.kind, event.index)):
            text = "".join(event.text for event in group)
            match kind:
                case "content":
                    yield {"content": text}
                case "reasoning":
                    yield {"reasoning_content": text}
                case "call":
                    reading.num_calls += 1
                    function = {"name": text, "arguments": ""}
                    call = {
                        "index": index,
                        "id": self._form.call_id(),
                        "type": "function",
                        "function": function,
                    }
                    yield {"tool_calls": [call]}
                case "arguments":
                    yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
                case _:
                    pass

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The chunk without choices that ``stream_options.include_usage`` asks for."""
        return {**self._chunk([]), "usage": usage.render()} if self._include_usage else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """A ``chat.completion``."""
        rendered = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        answer = {**object_of(self._heading, "chat.completion", rendered), "usage": usage.render()}
        if self._prompt_logprobs:
            answer["prompt_logprobs"] = render_prompt_logprobs(choices[0].prompt_logprobs)
        return answer

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        reason = choice.finish_reason
        if self._form is not None:
            parser = self._form.make_parser()
            events = [*parser.feed(choice.text), *parser.finish()]
            parsed = Parsed().add(filter(self._form.allows, events))
            reason = self._form.finish_reason(reason, len(parsed.calls))
            message["content"] = parsed.content
            if parsed.reasoning:
                message["reasoning_content"] = parsed.reasoning
            if parsed.calls:
                message["content"] = parsed.content or None
                message["tool_calls"] = [
                    {
                        "id": self._form.call_id(),
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in parsed.calls
                ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._render(choice.logprobs),
            "finish_reason": reason,
        }

    def _render(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in logprobs
            ],
            "refusal": None,
        }


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}
