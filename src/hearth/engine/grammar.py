"""Outputs of a given form: JSON of a schema, a regular expression, a context-free grammar, a choice.

llguidance says which tokens may come next; the sampler draws among those. The rules where a request asks for
more than a form:

- The grammar wins. Tokens and texts that end a sequence do so only where the text before them is complete,
  and what is complete and cannot go on ends, whatever ``min_tokens`` and ``ignore_eos`` say. Bias and
  penalties move the odds among the allowed tokens and nothing else.
- Between the tokens of JSON there may be at most one line break and 24 blanks: models are free to indent, and
  cannot run on in empty space. A schema with llguidance's own ``x-guidance``, such as
  ``{"whitespace_flexible": false}``, has its rules instead.

A grammar is compiled once and copied for each sequence; copies share nothing that changes.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from hearth.engine.params import Guided
from hearth.errors import RequestError

WHITESPACE = r"\n?[ \t]{0,24}"
MAX_GRAMMAR_CHARACTERS = 2**20
_CACHE_SIZE = 128


class Grammar:
    """Where one sequence is in its grammar."""

    def __init__(
        self, matcher: LLMatcher, tokenizer: LLTokenizer, vocab_size: int, end_ids: Iterable[int]
    ) -> None:
        """``end_ids``: the tokens that end this sequence where its text is complete."""
        self._start = matcher  # never advanced
        self._matcher = matcher.deep_copy()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = frozenset(end_ids)
        self.error: str | None = None  # why it cannot go on

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is of the form."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed_tokens(self) -> np.ndarray:
        """Boolean [V], the tokens that may follow; not empty.

        Where the form cannot go on, all are allowed and ``error`` says why: the sequence must end.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(bool)
        why = self._matcher.get_error()
        if why.startswith("NoExtension") or not allowed_V.any():
            self.error = "the grammar allows only text that the tokenizer has no tokens for"
        elif self._matcher.is_error():
            self.error = f"the grammar became too complex: {_first_line(why)}"
        return np.ones(self._vocab_size, bool) if self.error else allowed_V

    def advance(self, token_id: int) -> bool:
        """Take note of a token; whether it ends the sequence without being part of its text."""
        if token_id in self._end_ids and self._matcher.is_accepting():
            return True
        if not self._matcher.consume_token(token_id):
            self.error = f"the grammar does not allow token {token_id}"
        return False

    def validate(self, draft_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other; changes nothing."""
        return self._matcher.validate_tokens(list(draft_ids))

    def accepts(self, text: str) -> bool:
        """Whether a whole text is of the form."""
        matcher = self._start.deep_copy()
        return matcher.consume_tokens(self._tokenizer.tokenize_str(text)) and matcher.is_accepting()


class GrammarCompiler:
    """Compiles the grammars of one engine, and remembers those used last. Safe to use from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def warm_up(self) -> None:
        """Read the tokenizer now, if it can be read, so that no request waits for it."""
        with self._lock, suppress(RequestError):
            self._tokenizer = self._tokenizer or self._read_tokenizer()

    def compile(self, guided: Guided) -> LLMatcher:
        """The grammar at its start; raises `RequestError` with llguidance's own words if it cannot be.

        The first call reads the tokenizer (0.9 s of a processor for 150,000 tokens), unless `warm_up` did;
        after that a schema of usual size takes about a millisecond.
        """
        key = _key(guided)
        kind, text = key
        with self._lock:
            tokenizer = self._tokenizer = self._tokenizer or self._read_tokenizer()
            matcher = self._cache.get(key)
            if matcher is not None:
                self._cache.move_to_end(key)
                return matcher
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"guided.{kind} has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are allowed",
                param="guided",
            )
        try:
            matcher = LLMatcher(tokenizer, _grammar_text(kind, text), log_level=0)
        except (ValueError, RecursionError) as error:  # unpaired surrogates, text that is no JSON, …
            raise _refusal(kind, f"{type(error).__name__}: {error}") from error
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error().strip())
        with self._lock:
            self._cache[key] = matcher
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return matcher

    def start(self, guided: Guided, stop_token_ids: Sequence[int]) -> Grammar:
        """The grammar of a new sequence; ``stop_token_ids`` end it besides the model's own."""
        matcher = self.compile(guided)
        assert self._tokenizer is not None
        return Grammar(matcher, self._tokenizer, self._vocab_size, (*self._eos_ids, *stop_token_ids))

    def _read_tokenizer(self) -> LLTokenizer:
        if self._source is None:
            raise RequestError("guided outputs need a tokenizer, and this engine has none", param="guided")
        backend = getattr(self._source, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(
                f"guided outputs need a fast tokenizer; this model's is a {type(self._source).__name__}",
                param="guided",
            )
        backend = copy(backend)  # what follows must not change the engine's
        backend.no_padding()
        backend.no_truncation()
        # A model may have more rows than its tokenizer has tokens, or fewer.
        size = max(self._vocab_size, len(self._source))
        try:
            return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=self._eos_ids or None)
        except ValueError as error:
            raise RequestError(
                f"guided outputs do not work with this model's tokenizer: {error}", param="guided"
            ) from error


def _key(guided: Guided) -> tuple[str, str]:
    """The kind of a form and its text: equal for equal forms."""
    try:
        if guided.json is not None:
            text = guided.json if isinstance(guided.json, str) else json.dumps(guided.json)
            return "json", text
        if guided.choice:
            return "choice", json.dumps(guided.choice, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal("json", f"it is not JSON: {error}") from error
    if guided.regex is not None:
        return "regex", guided.regex
    assert guided.grammar is not None
    return "grammar", guided.grammar


def _grammar_text(kind: str, text: str) -> str:
    """What llguidance compiles. Raises `ValueError` for what is wrong at first sight."""
    if kind == "json":
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise ValueError(f"a schema is an object, and this is a {type(schema).__name__}")
        own_rules = "x-guidance" in schema
        return LLMatcher.grammar_from_json_schema(
            text, defaults=None if own_rules else {"whitespace_pattern": WHITESPACE}
        )
    if kind == "regex":
        if (len(text) - len(text.rstrip("\\"))) % 2:  # llguidance overlooks it
            raise ValueError("it ends with an unpaired backslash")
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
        return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # llguidance raises bare Exceptions for GBNF that it cannot read
        raise ValueError(str(error)) from error


def _refusal(kind: str, why: str) -> RequestError:
    return RequestError(f"guided.{kind} cannot be compiled: {why}", param="guided")


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
