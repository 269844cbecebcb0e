"""Token ids as text and bytes, for log-probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from hearth.engine import TokenLogprob as EngineLogprob
from hearth.serving.answers import TokenLogprob

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "\u2581"  # SentencePiece's visible space


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE (GPT-2) uses for the 256 bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet


class TokenTable:
    """Looks up the bytes of tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes, possibly a part of a character, that the token stands for."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return str(token).encode()
        if match := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(match[1], 16)])
        if self._byte_level:
            alphabet = _byte_level_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
        return str(token).replace(_WORD_MARK, " ").encode()

    def render(self, entry: EngineLogprob) -> TokenLogprob:
        """The engine's record with texts for ids."""
        top = tuple(self._one(token_id, logprob) for token_id, logprob in entry.top)
        return self._one(entry.token_id, entry.logprob, top)

    def _one(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self.bytes_of(token_id)
        # JSON has no infinity; OpenAI writes an impossible token as -9999.
        text = raw.decode("utf-8", errors="replace")
        return TokenLogprob(text, max(logprob, -9999.0), tuple(raw), top, token_id)
