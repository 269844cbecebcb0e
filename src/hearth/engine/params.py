"""What a caller may ask of one request. Torch-free, and checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hearth.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 16
POOLINGS = ("mean", "last", "cls")
_TOO_LARGE = 2**63  # for tensors and for the wire


@dataclass(frozen=True, kw_only=True)
class Guided:
    """The form that an output must have: exactly one of these.

    json: a JSON schema, as an object or as its text; ``{"type": "object"}`` is any JSON object.
    regex: a regular expression that the whole output matches.
    grammar: a context-free grammar in Lark's notation.
    choice: the output is one of these texts.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "grammar") if getattr(self, name) is not None]
        given += ["choice"] if self.choice else []
        if len(given) != 1:
            raise RequestError(
                f"guided has {', '.join(given) or 'nothing'}; it must have exactly one form",
                fix="give one of json, regex, grammar, choice",
                param="guided",
            )
        if self.json is not None and not isinstance(self.json, dict | str):
            raise RequestError(
                f"guided.json is {self.json!r}; it must be a schema, as an object or its text", param="guided"
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(
                    f"guided.{name} is {value!r}; it must be a text that is not empty", param="guided"
                )
        object.__setattr__(self, "choice", _as_tuple("guided", self.choice))
        if not all(isinstance(text, str) and text for text in self.choice):
            raise RequestError(
                f"guided.choice is {self.choice!r}; it must be texts that are not empty", param="guided"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Every wrong value raises `RequestError` naming the field.

    max_tokens: tokens to generate at most; None means up to the model's context.
    min_tokens: no end-of-sequence, stop token or stop string ends the text before this many tokens.
    temperature: 0 is greedy. top_p in (0, 1]; top_k 0 (or -1) is off; min_p in [0, 1].
    seed: sequence i of n throws the dice of (seed, i), whatever else is in the batch; the logits that they
        meet may differ in their last digits with the size of the batch.
    stop: texts that end the generation and are not part of it. stop_token_ids: likewise, as ids.
    repetition_penalty: > 1 discourages tokens of prompt and output (CTRL, arXiv 1909.05858).
    presence_penalty, frequency_penalty: OpenAI's, over the output only.
    logit_bias: added to the logits, by token id.
    logprobs: None, or how many most likely tokens to report at each position, 0 to 20. They are taken
        from the model's own distribution, before penalties, bias and temperature.
    prompt_logprobs: likewise for the tokens of the prompt, the first one excepted.
    best_of: generate so many sequences and return, when all are done, the n whose tokens have the highest
        mean log-probability in the model's own distribution, best first; the token that ended one counts.
        With best_of = n there is nothing to choose, and the order stays.
    guided: the form that the output must have, see `Guided`.
    priority: a lower number goes first; equals go in the order of arrival.
    adapter: the name of a loaded LoRA adapter; None is the model itself.
    cache_salt: only requests with the same salt share cached prefixes.
    skip_special_tokens: leave special tokens out of the text; some formats of tool calls are written in them.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    best_of: int | None = None
    guided: Guided | None = None
    priority: int = 0
    adapter: str | None = None
    cache_salt: str | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _integer("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        _integer("n", self.n, 1, 128)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, 128)
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        for name in ("adapter", "cache_salt"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"{name} is {value!r}; it must be a text that is not empty", param=name)
        if self.guided is not None and not isinstance(self.guided, Guided):
            raise RequestError(f"guided is {self.guided!r}; it must be a Guided", param="guided")
        for name in ("ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; it must be true or false", param=name)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(
                f"stop has {len(self.stop)} texts; at most {MAX_STOPS} are allowed", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"stop contains {text!r}; every stop must be a text that is not empty", param="stop"
                )
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, None)
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, None)
            _number("logit_bias", bias, -100.0, 100.0)

    def _normalise(self) -> None:
        """Accept one stop text, lists for tuples, string keys in logit_bias (JSON has no other), top_k -1."""
        stop: Any = self.stop
        _set(
            self,
            "stop",
            () if stop is None else (stop,) if isinstance(stop, str) else _as_tuple("stop", stop),
        )
        _set(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids or ()))
        if self.top_k == -1:
            _set(self, "top_k", 0)
        try:
            _set(self, "logit_bias", {int(key): value for key, value in dict(self.logit_bias or {}).items()})
        except (TypeError, ValueError):
            raise RequestError(
                f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers", param="logit_bias"
            ) from None

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated; `n` of them are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def selects(self) -> bool:
        """Whether some of the generated sequences are dropped, so that all must be done before any is out."""
        return self.num_sequences > self.n

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def check_prompt(prompt: Sequence[int], max_model_len: int, vocab_size: int, *, num_answer: int = 1) -> None:
    """Raise `RequestError` if this prompt cannot be completed by ``num_answer`` tokens."""
    if not prompt:
        raise RequestError("the prompt is empty", fix="give at least one token", param="prompt")
    limit = max_model_len - num_answer
    if len(prompt) > limit:
        answer = " must hold the answer too" if num_answer else " holds no more"
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; the context of {max_model_len}{answer}",
            fix=f"shorten it to at most {limit} tokens, or load with a larger max_model_len",
            param="prompt",
        )
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"the prompt has token id {token_id!r}, outside the vocabulary of {vocab_size}",
                param="prompt",
            )


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r}; it must be a list", param=name)
    return tuple(value)


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}; it must be a whole number, {allowed}", param=name)
    if high is None and value >= _TOO_LARGE:
        raise RequestError(f"{name} is {value}; it must be less than 2^63", param=name)
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name} is {value}; it must be {allowed}", param=name)


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    allowed = f"{'above' if low_open else 'at least'} {low:g} and at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise RequestError(f"{name} is {value!r}; it must be a number {allowed}", param=name)
    if not low <= value <= high or (low_open and value == low):
        raise RequestError(f"{name} is {value}; it must be {allowed}", param=name)
