"""The harmony format of gpt-oss: messages with channels, which are reasoning, answers or calls.

Source: OpenAI harmony response format. ``<|channel|>analysis<|message|>…<|end|>`` is reasoning,
``commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>`` a call, all else is content.
"""

from __future__ import annotations

import re

from hearth.engine.parsing.source import Reading, Source

MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_HEAD = ("<|start|>", "<|channel|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", *_HEAD)
_MAX_HEAD = 512
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def read_harmony(source: Source, *, calls: bool) -> Reading[None]:
    """All messages. Without ``calls`` a call is content, as its arguments stand."""
    yield from source.skip_space()
    marker = yield from source.accept_any((*_HEAD, "to="))  # the prompt ends with <|start|>assistant
    while True:
        if marker is None:
            marker = yield from source.text("content", _ENDS)
            if marker is None:
                return
        if marker not in (*_HEAD, "to="):
            source.release("markup")
            marker = None
            continue
        head = yield from source.read_until(("<|message|>",), _MAX_HEAD)
        if head is None:
            source.release("content")
            marker = None
            continue
        source.take(len("<|message|>"))
        marker = yield from _message(source, marker + head, calls)


def _message(source: Source, head: str, calls: bool) -> Reading[str | None]:
    """The body of one message; returns the marker that ended it."""
    recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
    name = recipient[1].removeprefix("functions.") if recipient else ""
    if calls and source.allows(name, known_only=False):
        source.begin_call(name)
        marker = yield from source.text("arguments", _ENDS, trim=False)
        source.end_call()
        return marker
    source.release("markup")
    is_reasoning = channel is not None and channel[1] == "analysis"
    return (yield from source.text("reasoning" if is_reasoning else "content", _ENDS, trim=False))
