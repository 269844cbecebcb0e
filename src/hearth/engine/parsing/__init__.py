"""Reasoning and tool calls in the text of a model, found while it streams.

Contract: pure and torch-free. For every text and every way to cut it the joined events are the same; the raw
texts of the events are the text; nothing raises. A call that is malformed ends as content if its name was
not out yet, and as an incomplete call otherwise.
"""

from hearth.engine.parsing.events import Call, Event, Parsed
from hearth.engine.parsing.parser import HARMONY, Parser, Style, detect_style
from hearth.engine.parsing.reasoning import REASONING_FORMATS
from hearth.engine.parsing.tools import TOOL_FORMATS

__all__ = [
    "HARMONY",
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "Call",
    "Event",
    "Parsed",
    "Parser",
    "Style",
    "detect_style",
]
