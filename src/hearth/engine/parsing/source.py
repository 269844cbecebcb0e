"""Text that arrives in pieces, read by ordinary code that pauses where it needs more.

A format is a generator function over a `Source`. Its reads depend on the characters alone, never on how they
were cut, because every read waits until its answer is certain: that is why any chunking gives the same
result. What was read and belongs to nothing yet is held; each event takes what is held as its ``raw``, so
no character is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from hearth.engine.parsing.events import Event, Kind
from hearth.engine.parsing.scanning import JsonScanner, load_json, overlap

T = TypeVar("T")
Reading = Generator[None, None, T]

SPACE = " \t\r\n"
_TRIM = 16  # characters of white space before a marker that are part of it; more of them are text
_MAX_NAME = 256  # characters


class Source:
    """The unread text, what is held, and the events so far.

    tools: the functions that may be called, by name, with the JSON schemas of their parameters; None where
    they are not known. A format without markers calls only these.
    """

    def __init__(self, tools: Mapping[str, Any] | None = None) -> None:
        self.tools = tools
        self.unread = ""
        self.ended = False
        self.events: list[Event] = []
        self.num_calls = 0
        self._held: list[str] = []
        self._flowing: Kind | None = None  # what held text becomes when the reader pauses
        self._arguments: list[str] | None = None  # of the open call

    # -- reading -----------------------------------------------------------------------------------------
    def more(self) -> Reading[bool]:
        """Wait for more unread text; False if there is no more."""
        if self._flowing is not None:
            self.release(self._flowing)
        before = len(self.unread)
        while len(self.unread) == before and not self.ended:
            yield
        return len(self.unread) > before

    def take(self, length: int) -> str:
        """Move ``length`` unread characters to what is held, and return them."""
        text, self.unread = self.unread[:length], self.unread[length:]
        if text:
            self._held.append(text)
        return text

    def peek(self) -> Reading[str]:
        """The next character, or nothing at the end."""
        while not self.unread:
            if not (yield from self.more()):
                return ""
        return self.unread[0]

    def skip_space(self) -> Reading[None]:
        """Take white space."""
        while (yield from self.peek()) and self.unread[0] in SPACE:
            self.take(len(self.unread) - len(self.unread.lstrip(SPACE)))

    def accept(self, word: str) -> Reading[bool]:
        """Take ``word`` if it comes next; otherwise take nothing."""
        while len(self.unread) < len(word):
            if not word.startswith(self.unread) or not (yield from self.more()):
                return False
        if not self.unread.startswith(word):
            return False
        self.take(len(word))
        return True

    def accept_any(self, words: Sequence[str]) -> Reading[str | None]:
        """Take the first of ``words`` that comes next."""
        for word in words:
            if (yield from self.accept(word)):
                return word
        return None

    def read_until(self, markers: Sequence[str], limit: int) -> Reading[str | None]:
        """Take and return the text before the first of ``markers``, which stays unread.

        None, with nothing taken, if the text ends before or is longer than ``limit`` characters.
        """
        while True:
            at, _ = _first(self.unread, markers)
            if at is not None:
                return self.take(at) if at <= limit else None
            if len(self.unread) > limit + max(map(len, markers)) or not (yield from self.more()):
                return None

    def text(self, kind: Kind, markers: Sequence[str], *, trim: bool = True) -> Reading[str | None]:
        """Pass text on as ``kind`` until one of ``markers``, which is taken and returned; None at the end.

        No marker may be part of another. With ``trim`` white space before a marker belongs to it, and
        white space at the end, after calls, to nobody.
        """
        while True:
            at, found = _first(self.unread, markers)
            if at is not None and found is not None:
                self._pass(kind, _without_space(self.unread, at) if trim else at)
                self.take(self.unread.index(found) + len(found))
                return found
            safe = len(self.unread) - max((overlap(self.unread, marker) for marker in markers), default=0)
            self._pass(kind, _without_space(self.unread, safe) if trim else safe)
            if not (yield from self.more()):
                self.take(len(self.unread))
                # White space at the end, after a call, is no answer.
                is_rest = trim and self.num_calls and not "".join(self._held).strip(SPACE)
                self.release("markup" if is_rest else kind)
                return None

    def _pass(self, kind: Kind, length: int) -> None:
        if length:  # else what is held may yet be white space before a marker
            self.take(length)
            self.release(kind)

    def json_value(self) -> Reading[str | None]:
        """Take one JSON value, judged by its brackets and quotes; None if it breaks off or does not close.

        What was read of a broken one is taken.
        """
        scanner, parts = JsonScanner(), list[str]()
        while True:
            used, state = scanner.scan(self.unread)
            parts.append(self.take(used))
            if state == "done":
                return "".join(parts)
            if state == "broken" or not (yield from self.more()):
                at_end = self.ended and state == "open" and scanner.may_end
                return "".join(parts) if at_end else None

    # -- telling -----------------------------------------------------------------------------------------
    def tell(self, kind: Kind, text: str, *, index: int = 0, complete: bool = False) -> None:
        """Emit an event whose raw text is all that is held."""
        raw = "".join(self._held)
        self._held.clear()
        if kind == "arguments" and self._arguments is not None:
            self._arguments.append(text)
        self.events.append(Event(kind, text, raw, index, complete))

    def release(self, kind: Kind) -> None:
        """What is held is text of this kind."""
        if self._held:
            text = "" if kind == "markup" else "".join(self._held)
            self.tell(kind, text, index=self.num_calls - 1 if kind == "arguments" else 0)

    def allows(self, name: str, *, known_only: bool) -> bool:
        """Whether a call may have this name."""
        if known_only and self.tools is not None and name not in self.tools:
            return False
        return 0 < len(name) <= _MAX_NAME and name.isprintable() and " " not in name

    def begin_call(self, name: str) -> None:
        """A call begins; what is held is its envelope."""
        self._arguments = []
        self.tell("call", name, index=self.num_calls)
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Arguments that are written otherwise in the text, which is what is held."""
        if text:
            self.tell("arguments", text, index=self.num_calls - 1)

    def flow_arguments(self) -> None:
        """From here on what is read is arguments as they stand, until `stop_flow`."""
        self.release("markup")
        self._flowing = "arguments"

    def stop_flow(self) -> None:
        """What was read so far was the rest of the arguments."""
        self.release("arguments")
        self._flowing = None

    def end_call(self) -> None:
        """The call is over; it is complete if its arguments are a JSON object."""
        self._flowing = None
        arguments, self._arguments = "".join(self._arguments or ()), None
        self.tell("end", "", index=self.num_calls - 1, complete=isinstance(load_json(arguments), dict))


def _first(text: str, markers: Sequence[str]) -> tuple[int | None, str | None]:
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found) if found else (None, None)


def _without_space(text: str, end: int) -> int:
    """Where the white space begins that ends at ``end``."""
    start = max(0, end - _TRIM)
    return start + len(text[start:end].rstrip(SPACE))
