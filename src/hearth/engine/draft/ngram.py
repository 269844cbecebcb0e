"""Drafts by looking up the last tokens in the text so far (prompt lookup decoding).

Summaries, edits of code and answers with quotations repeat their prompt; a match of a few tokens often goes
on as it did before. Costs next to nothing, and needs no second model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from hearth.engine.request import Request

LONGEST = 4  # tokens of the suffix that is looked up first; then shorter ones, down to a single token
# A sequence whose drafts were all wrong this many times in a row pauses for `_PAUSE` tokens, twice as many
# each time, until a draft is right.
_PATIENCE = 3
_PAUSE = 16
_LONGEST_PAUSE = 1024


class NgramIndex:
    """Where each run of 1 to `LONGEST` tokens of one text occurred last.

    One dictionary entry a token and length: building and asking cost O(1) a token, however long the text.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # Run of tokens -> the position after its most recent occurrence.
        self._after: dict[tuple[int, ...], int] = {}

    def lookup(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that followed the longest, then most recent, match of the text's end.

        ``tokens``: the whole text; it must continue what was given before.
        """
        known = self._tokens
        assert len(tokens) >= len(known), "the text got shorter"
        # The runs that end at the last token come in only with the next token: they must not find themselves.
        for end in range(max(1, len(known)), len(tokens)):
            for length in range(1, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        known.extend(tokens[len(known) :])
        for length in range(min(LONGEST, len(known)), 0, -1):
            position = self._after.get(tuple(known[-length:]))
            if position is not None:
                return self._continue(position, count)
        return []

    def _continue(self, position: int, count: int) -> list[int]:
        """The tokens from ``position`` on; past the end of the text they go on as a repetition."""
        period = len(self._tokens) - position
        return [self._tokens[position + i % period] for i in range(count)]


class _Lookup:
    """The index of one sequence, and how it has fared."""

    def __init__(self) -> None:
        self.index = NgramIndex()
        self.failures = 0
        self.pause = _PAUSE
        self.paused_until = 0  # length of the text


class NgramDrafter:
    """A `Drafter` that needs nothing but the tokens."""

    def __init__(self) -> None:
        self._lookups: WeakKeyDictionary[Request, _Lookup] = WeakKeyDictionary()

    def propose(self, allowance: Mapping[Request, int], running: Sequence[Request]) -> bool:
        del running
        usual = True
        for request, count in allowance.items():
            lookup = self._lookups.get(request)
            if lookup is None:
                lookup = self._lookups[request] = _Lookup()
                usual = False
            if len(request.tokens) >= lookup.paused_until:
                request.draft_ids = lookup.index.lookup(request.tokens, count)
        return usual

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        lookup = self._lookups.get(request)
        if lookup is None or not num_drafts:
            return
        if num_accepted:
            lookup.failures, lookup.pause = 0, _PAUSE
            return
        lookup.failures += 1
        if lookup.failures >= _PATIENCE:
            lookup.paused_until = len(request.tokens) + lookup.pause
            lookup.pause = min(2 * lookup.pause, _LONGEST_PAUSE)
            lookup.failures = _PATIENCE - 1  # one more failure after the pause is enough
