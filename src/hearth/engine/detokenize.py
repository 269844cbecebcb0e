"""From token ids to text, a piece at a time, without ever showing half a character.

Any tokenizer will do: text is found by decoding a short window of ids again, never by decoding one id. A
window begins with tokens whose text is out already, so a tokenizer that treats the first token of a text
differently (SentencePiece drops its space) treats both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_REBASE = 16  # tokens in the window before it is cut
_PROMPT_TAIL = 6  # tokens of the prompt that open the window
_MAX_TAIL = 24


def decoder_of(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    """A function ids → text, without cosmetic clean-up that needs what follows."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    skip = skip_special_tokens
    if backend is not None:
        return lambda ids: str(backend.decode(list(ids), skip_special_tokens=skip))
    return lambda ids: str(
        tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    )


class Detokenizer:
    """The growing text of one sequence."""

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        length = min(_PROMPT_TAIL, len(prompt_token_ids))
        self._window = list(prompt_token_ids[len(prompt_token_ids) - length :])
        self._done = decode(self._window)  # the window's text that is out
        # A window must not open with nothing visible (special tokens) or inside a character.
        while (not self._done or self._done.startswith(_BROKEN)) and length < min(
            _MAX_TAIL, len(prompt_token_ids)
        ):
            length += 1
            self._window = list(prompt_token_ids[len(prompt_token_ids) - length :])
            self._done = decode(self._window)
        # A character that the prompt left open is completed by the output.
        self._done = self._done.rstrip(_BROKEN)

    def push(self, token_id: int) -> str:
        """Add one token; the text that is certain now and was not before."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(_BROKEN)
        if len(text) - len(certain) > 4:
            # No character has more than four bytes: older broken bytes stay broken, only the last can change.
            certain = text[:-1]
        delta = certain[len(self._done) :]
        if len(certain) > len(self._done):
            self._done = certain
        if len(self._window) > _REBASE and text == certain:
            self._rebase()
        return delta

    def flush(self) -> str:
        """The rest at the end of the sequence: bytes that never became a character."""
        text = self._decode(self._window)
        delta = text[len(self._done) :]
        self._done = max(self._done, text, key=len)
        return delta

    def _rebase(self) -> None:
        """Cut the window to its last tokens, as soon as they show some whole text of their own."""
        tail = self._window[-_REBASE // 2 :]
        text = self._decode(tail)
        if (
            text
            and not text.startswith(_BROKEN)
            and not text.endswith(_BROKEN)
            and self._done.endswith(text.lstrip())
        ):
            self._window, self._done = tail, text


class StopChecker:
    """Ends a text at the first of some stop texts, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], may_stop: Callable[[str], bool] | None = None) -> None:
        """``may_stop`` says of a text whether it may end there; else the stop text is passed over."""
        self._stops = tuple(stops)
        self._may_stop = may_stop
        self._shown = ""  # known only if there is someone to ask about it
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop text was reached (it and what follows are dropped)."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        for position in sorted({place for stop in self._stops for place in _places(buffer, stop)}):
            if self._may_stop is None or self._may_stop(self._shown + buffer[:position]):
                self._held = ""
                return buffer[:position], True
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        shown = buffer[: len(buffer) - keep]
        if self._may_stop is not None:
            self._shown += shown
        return shown, False

    def flush(self) -> str:
        """What was held back and turned out not to be a stop text."""
        held, self._held = self._held, ""
        return held


def _places(text: str, stop: str) -> Iterator[int]:
    """Where ``stop`` begins in ``text``, overlapping or not."""
    position = text.find(stop)
    while position >= 0:
        yield position
        position = text.find(stop, position + 1)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
