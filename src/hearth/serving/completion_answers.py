"""The answers of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hearth.serving.answers import (
    Choice,
    Delta,
    Heading,
    PromptLogprobs,
    TokenLogprob,
    Usage,
    object_of,
    render_prompt_logprobs,
)


class CompletionDialect:
    """``echo`` holds the prompts' texts by choice when they are to be repeated.

    With echo and logprobs those of the prompt come too. prompt_logprobs: they are given in vLLM's form.
    """

    def __init__(
        self,
        heading: Heading,
        *,
        logprobs: bool,
        include_usage: bool,
        echo: Sequence[str] | None = None,
        prompt_logprobs: bool = False,
    ) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._echo = echo
        self._prompt_logprobs = prompt_logprobs
        self._offsets: dict[int, int] = {}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = object_of(self._heading, "text_completion", choices)
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:
        """The prompts, where they are echoed; with log-probabilities they wait for the first delta."""
        if self._echo is None or self._logprobs:
            return
        for index in range(num_choices):
            choice = {"index": index, "text": self._echo[index], "logprobs": None, "finish_reason": None}
            yield self._chunk([choice])

    def delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A ``text_completion`` with the new text."""
        text, entries = delta.text, list[TokenLogprob | None](delta.logprobs)
        if self._logprobs and self._echo is not None and delta.choice not in self._offsets:
            text = self._echo[delta.choice] + text
            entries = [*self._of_prompt(delta.choice, delta.prompt_logprobs), *entries]
            self._offsets[delta.choice] = 0
        offset = self._offsets.get(delta.choice, self._echo_length(delta.choice))
        choice = {
            "index": delta.choice,
            "text": text,
            "logprobs": self._render(entries, offset),
            "finish_reason": delta.finish_reason,
        }
        # By tokens, not by text, which may be held back: the same numbers as in the whole answer.
        self._offsets[delta.choice] = offset + sum(len(entry.token) for entry in entries if entry)
        if self._prompt_logprobs and delta.prompt_logprobs:
            choice["prompt_logprobs"] = render_prompt_logprobs(delta.prompt_logprobs)
        yield self._chunk([choice])

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The object without choices that ``stream_options.include_usage`` asks for."""
        return {**self._chunk([]), "usage": usage.render()} if self._include_usage else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """A ``text_completion``."""
        rendered = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**object_of(self._heading, "text_completion", rendered), "usage": usage.render()}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        entries, offset = list[TokenLogprob | None](choice.logprobs), self._echo_length(index)
        if self._logprobs and self._echo is not None:
            entries, offset = [*self._of_prompt(index, choice.prompt_logprobs), *entries], 0
        rendered = {
            "index": index,
            "text": (self._echo[index] if self._echo is not None else "") + choice.text,
            "logprobs": self._render(entries, offset),
            "finish_reason": choice.finish_reason,
        }
        if self._prompt_logprobs:
            rendered["prompt_logprobs"] = render_prompt_logprobs(choice.prompt_logprobs)
        return rendered

    def _of_prompt(self, index: int, entries: PromptLogprobs) -> list[TokenLogprob | None]:
        """The prompt's records; the first token has a text and no probability."""
        assert self._echo is not None
        known = [entry for entry in entries if entry is not None]
        rest = sum(len(entry.token) for entry in known)
        echo = self._echo[index]
        first = TokenLogprob(echo[: max(0, len(echo) - rest)], _UNKNOWN)
        return [first, *known]

    def _echo_length(self, index: int) -> int:
        return len(self._echo[index]) if self._echo is not None else 0

    def _render(self, logprobs: Sequence[TokenLogprob | None], offset: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = [entry for entry in logprobs if entry is not None]
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.token)
        return {
            "tokens": [_name(entry) for entry in entries],
            "token_logprobs": [None if entry.logprob == _UNKNOWN else entry.logprob for entry in entries],
            "top_logprobs": [None if entry.logprob == _UNKNOWN else _by_name(entry) for entry in entries],
            "text_offset": offsets,
        }


_UNKNOWN = float("inf")  # no log-probability is that


def _name(entry: TokenLogprob) -> str:
    """A token's text; bytes that are no text of their own are spelt out, as OpenAI did."""
    raw = bytes(entry.bytes)
    if raw and raw != entry.token.encode():
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return entry.token


def _by_name(entry: TokenLogprob) -> dict[str, float]:
    names: dict[str, float] = {}
    for top in entry.top:
        names.setdefault(_name(top), top.logprob)  # the best of those that look the same
    return names
