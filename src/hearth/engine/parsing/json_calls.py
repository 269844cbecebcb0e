"""Formats that write arguments as JSON. Sources: the models' published chat templates."""

from __future__ import annotations

from hearth.engine.parsing.envelope import MAX_HEAD, closing, flowing_object, json_call
from hearth.engine.parsing.source import Reading, Source


def hermes(source: Source, _: str) -> Reading[None]:
    """Hermes, Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""
    yield from source.skip_space()
    if (yield from json_call(source)):
        yield from closing(source, "</tool_call>")


def llama(source: Source, _: str) -> Reading[None]:
    """Llama 3: ``{"name": …, "parameters": {…}}``, alone or after ``<|python_tag|>``; a ; between several."""
    while True:
        yield from source.skip_space()
        if not (yield from json_call(source, known_only=True)):
            return
        yield from source.skip_space()
        if not (yield from source.accept_any((";", ","))):
            return


def mistral(source: Source, _: str) -> Reading[None]:
    """``[TOOL_CALLS] [{…}, …]``, and since 2025 ``[TOOL_CALLS]name[ARGS]{…}``."""
    yield from source.skip_space()
    if (yield from source.accept("[")):
        yield from _list(source)
        return
    head = yield from source.read_until(("{", "[ARGS]", "[CALL_ID]"), MAX_HEAD)
    name = (head or "").strip()
    if not source.allows(name, known_only=False):
        return
    if (yield from source.accept("[CALL_ID]")):
        yield from source.read_until(("[ARGS]",), MAX_HEAD)
    yield from source.accept("[ARGS]")
    yield from source.skip_space()
    if (yield from source.peek()) == "{":
        source.begin_call(name)
        yield from flowing_object(source)
        source.end_call()


def _list(source: Source) -> Reading[None]:
    """The rest of ``[{…}, {…}]``."""
    while True:
        yield from source.skip_space()
        if not (yield from json_call(source)):
            return
        yield from source.skip_space()
        if not (yield from source.accept(",")):
            break
    yield from closing(source, "]")


def json_list(source: Source, _: str) -> Reading[None]:
    """``[{"name": …, "parameters": {…}}, …]``: what a grammar makes of any model."""
    if (yield from source.accept("[")):
        yield from _list(source)


CALLS_BEGIN, _CALLS_END = "<\uff5ctool▁calls▁begin\uff5c>", "<\uff5ctool▁calls▁end\uff5c>"
_CALL_BEGIN, _CALL_SEP, _CALL_END = (
    "<\uff5ctool▁call▁begin\uff5c>",
    "<\uff5ctool▁sep\uff5c>",
    "<\uff5ctool▁call▁end\uff5c>",
)


def deepseek(source: Source, _: str) -> Reading[None]:
    """V3 and R1: ``function<sep>name`` and a fenced block of JSON; V3.1: ``name<sep>{…}``."""
    while True:
        yield from source.skip_space()
        if not (yield from source.accept(_CALL_BEGIN)):
            break
        name = yield from source.read_until((_CALL_SEP,), MAX_HEAD)
        yield from source.accept(_CALL_SEP)
        if name == "function":  # V3 and R1: function<sep>name, then a fenced block
            name = yield from source.read_until(("\n",), MAX_HEAD)
        if name is None or not source.allows(name.strip(), known_only=False):
            return
        yield from source.skip_space()
        yield from source.accept("```json")
        yield from source.skip_space()
        if (yield from source.peek()) != "{":
            return
        source.begin_call(name.strip())
        whole = yield from flowing_object(source)
        source.end_call()
        if not whole:
            return
        yield from closing(source, "```")
        yield from closing(source, _CALL_END)
    if (yield from source.accept(_CALLS_END)):
        source.release("markup")
