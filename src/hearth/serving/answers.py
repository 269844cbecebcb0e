"""The shapes of answers: how tokens of the engine become OpenAI's and our plain JSON, whole or streamed.

A ``Dialect`` renders one request's answer. It sees choices (one per prompt and ``n``) and deltas of them, and
knows nothing of engines or sockets, so that every shape is a pure function of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token: its text, its bytes, its log-probability and the likeliest alternatives."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to one choice."""

    choice: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Append ``delta``."""
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. A prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0

    def render(self) -> dict[str, Any]:
        """OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str


class Dialect(Protocol):
    """Renders one answer."""

    def start(self, num_choices: int) -> Iterable[dict[str, Any]]:
        """Events sent before the first token."""
        ...

    def delta(self, delta: Delta) -> dict[str, Any]:
        """The event of one delta."""
        ...

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The event after the last delta, if the request asked for one."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class ChatDialect:
    """``/v1/chat/completions``."""

    def __init__(self, heading: Heading, *, logprobs: bool, include_usage: bool) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._include_usage = include_usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._heading
        return {
            "id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk", choices)
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:
        """One event a choice, with the role."""
        for index in range(num_choices):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def delta(self, delta: Delta) -> dict[str, Any]:
        """A ``chat.completion.chunk``."""
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        choice = {
            "index": delta.choice,
            "delta": content,
            "logprobs": self._render(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        return self._chunk([choice])

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The chunk without choices that ``stream_options.include_usage`` asks for."""
        return {**self._chunk([]), "usage": usage.render()} if self._include_usage else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """A ``chat.completion``."""
        rendered = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._render(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._object("chat.completion", rendered), "usage": usage.render()}

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


class CompletionDialect:
    """``/v1/completions``. ``echo`` holds the prompts' texts by choice when they are to be repeated."""

    def __init__(
        self, heading: Heading, *, logprobs: bool, include_usage: bool, echo: Sequence[str] | None = None
    ) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._heading
        return {
            "id": head.id, "object": "text_completion", "created": head.created, "model": head.model,
            "choices": choices,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object(choices)
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:
        """The prompts, where they are echoed."""
        for index in range(num_choices if self._echo is not None else 0):
            assert self._echo is not None
            choice = {"index": index, "text": self._echo[index], "logprobs": None, "finish_reason": None}
            yield self._chunk([choice])

    def delta(self, delta: Delta) -> dict[str, Any]:
        """A ``text_completion`` with the new text."""
        offset = self._offsets.get(delta.choice, self._echo_length(delta.choice))
        # By tokens, not by text, which may be held back: the same numbers as in the whole answer.
        self._offsets[delta.choice] = offset + sum(len(entry.token) for entry in delta.logprobs)
        choice = {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self._render(delta.logprobs, offset),
            "finish_reason": delta.finish_reason,
        }
        return self._chunk([choice])

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The object without choices that ``stream_options.include_usage`` asks for."""
        return {**self._chunk([]), "usage": usage.render()} if self._include_usage else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """A ``text_completion``."""
        rendered = [
            {
                "index": index,
                "text": (self._echo[index] if self._echo is not None else "") + choice.text,
                "logprobs": self._render(choice.logprobs, self._echo_length(index)),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._object(rendered), "usage": usage.render()}

    def _echo_length(self, index: int) -> int:
        return len(self._echo[index]) if self._echo is not None else 0

    def _render(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets = []
        for entry in logprobs:
            offsets.append(offset)
            offset += len(entry.token)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }


class PlainDialect:
    """``/generate`` and ``/chat``: text, finish_reason, model and usage in one flat object."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - part of the protocol
        """Nothing comes before the first token."""
        return iter(())

    def delta(self, delta: Delta) -> dict[str, Any]:
        """The new text; ``finish_reason`` is there in the last event of a choice."""
        event: dict[str, Any] = {"text": delta.text}
        if delta.choice:
            event["index"] = delta.choice
        if delta.finish_reason:
            event["finish_reason"] = delta.finish_reason
        return event

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last event: which model answered, and the counts."""
        return {"model": self._heading.model, "usage": usage.render()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer; with ``n`` above 1, ``choices`` holds all of them and ``text`` the first."""
        answer: dict[str, Any] = {
            "id": self._heading.id,
            "model": self._heading.model,
            "text": choices[0].text,
            "finish_reason": choices[0].finish_reason,
            "usage": usage.render(),
        }
        if len(choices) > 1:
            answer["choices"] = [
                {"text": choice.text, "finish_reason": choice.finish_reason} for choice in choices
            ]
        return answer
