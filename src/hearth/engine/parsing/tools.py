"""The formats in which models write tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hearth.engine.parsing import json_calls
from hearth.engine.parsing.python_calls import python_calls
from hearth.engine.parsing.source import Reading, Source
from hearth.engine.parsing.xml_calls import xml_call


@dataclass(frozen=True)
class ToolFormat:
    """One format.

    starts: markers that begin calls anywhere in the text. read: reads calls once this marker was taken. bare:
    characters at which ``read`` is tried at the beginning of the text, without a marker. hints: one of these
    is in the chat templates of models that write so, and none of ``against``.
    """

    name: str
    starts: tuple[str, ...]
    read: Callable[[Source, str], Reading[None]]
    bare: str = ""
    hints: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


def read_text(source: Source, tools: ToolFormat | None) -> Reading[None]:
    """Everything after the reasoning: content, and the calls in it."""
    if tools is None:
        yield from source.text("content", (), trim=False)
        return
    if tools.bare:
        yield from source.skip_space()
        if (yield from source.peek()) and source.unread[0] in tools.bare:
            yield from tools.read(source, "")
            source.release("content")
    while (marker := (yield from source.text("content", tools.starts))) is not None:
        yield from tools.read(source, marker)
        source.release("content")  # what turned out to be no call


_FORMATS = (
    ToolFormat("deepseek", (json_calls.CALLS_BEGIN,), json_calls.deepseek, hints=(json_calls.CALLS_BEGIN,)),
    ToolFormat("mistral", ("[TOOL_CALLS]",), json_calls.mistral, hints=("[TOOL_CALLS]",)),
    ToolFormat("qwen3_coder", ("<tool_call>", "<function="), xml_call, hints=("<parameter=",)),
    ToolFormat("hermes", ("<tool_call>",), json_calls.hermes, hints=("<tool_call>",), against=("<arg_key>",)),
    ToolFormat(
        "pythonic", ("<|python_start|>",), python_calls, bare="[", hints=("<|python_start|>", "[func_name1(")
    ),
    ToolFormat(
        "llama3_json",
        ("<|python_tag|>",),
        json_calls.llama,
        bare="{",
        hints=("<|python_tag|>", '"parameters": dictionary of argument name'),
    ),
    ToolFormat("json_list", (), json_calls.json_list, bare="["),  # what a grammar makes of any model
)
TOOL_FORMATS = {each.name: each for each in _FORMATS}
