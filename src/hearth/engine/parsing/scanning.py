"""Finding the end of a JSON value in text that arrives in pieces."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

_CLOSING = {"{": "}", "[": "]"}
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,\]}]")


class JsonScanner:
    """Follows brackets and strings of one value; what else stands between them is not judged."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._in_string = self._escaped = self._in_scalar = False

    @property
    def may_end(self) -> bool:
        """Whether the value is a number or a word, which the end of the text ends."""
        return self._in_scalar

    def scan(self, text: str) -> tuple[int, Literal["open", "done", "broken"]]:
        """How many more characters belong to the value, and whether it is over, or cannot be one."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                found = _STRING_END.search(text, at)
                if found is None:
                    return len(text), "open"
                at = found.end()
                self._escaped = found[0] == "\\"
                self._in_string = self._escaped
                if not self._in_string and not self._stack:
                    return at, "done"
            elif self._in_scalar:
                found = _SCALAR_END.search(text, at)
                return (len(text), "open") if found is None else (found.start(), "done")
            elif not self._stack and text[at] not in '"{[':
                if text[at] in ",:]}":
                    return at, "broken"
                self._in_scalar = True
            else:
                found = _STRUCTURE.search(text, at)
                if found is None:
                    return len(text), "open"
                at = found.end()
                if found[0] == '"':
                    self._in_string = True
                elif found[0] in _CLOSING:
                    self._stack.append(_CLOSING[found[0]])
                elif self._stack.pop() != found[0]:
                    return found.start(), "broken"
                elif not self._stack:
                    return at, "done"
        return at, "open"


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def load_json(text: str) -> Any:
    """The value of a JSON text; None for what is none, such as NaN, and for null."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)
