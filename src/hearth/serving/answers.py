"""The shapes of answers: how tokens of the engine become OpenAI's and our plain JSON, whole or streamed.

A ``Dialect`` renders one request's answer. It sees choices (one per prompt and ``n``) and deltas of them, and
knows nothing of engines or sockets, so that every shape is a pure function of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token: its text, its bytes, its log-probability and the likeliest alternatives."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top: tuple[TokenLogprob, ...] = ()
    id: int = 0


PromptLogprobs = tuple[TokenLogprob | None, ...]  # None for the first token, which nothing predicts


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to one choice."""

    choice: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs = ()  # with the first delta of a choice, if they were asked for


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs = ()

    def add(self, delta: Delta) -> None:
        """Append ``delta``."""
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs


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

    def delta(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """The events of one delta, possibly none yet."""
        ...

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The event after the last delta, if the request asked for one."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        ...


def object_of(heading: Heading, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """An object of OpenAI's."""
    return {
        "id": heading.id, "object": kind, "created": heading.created, "model": heading.model,
        "choices": choices,
    }  # fmt: skip


def render_prompt_logprobs(entries: PromptLogprobs) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token of the prompt, what it and the likeliest tokens had, by token id."""
    return [
        None
        if entry is None
        else {
            str(each.id): {"logprob": each.logprob, "decoded_token": each.token}
            for each in (entry, *entry.top)
        }
        for entry in entries
    ]
