"""Calls as Python (Llama 3.2 and 4, Gemma): ``[f(a=1), g(b="x")]``."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from hearth.engine.parsing.envelope import MAX_HEAD, closing
from hearth.engine.parsing.source import Reading, Source

_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_PYTHON_WORDS = {"true": True, "false": False, "null": None}


def python_calls(source: Source, _: str) -> Reading[None]:
    """A list of calls; each is read whole before it is told."""
    yield from source.skip_space()
    if not (yield from source.accept("[")):
        return
    while True:
        yield from source.skip_space()
        name = yield from source.read_until(("(",), MAX_HEAD)
        known = name is not None and _PYTHON_NAME.fullmatch(name) and source.allows(name, known_only=True)
        if name is None or not known:
            return
        text = yield from _parenthesis(source)
        arguments = None if text is None else _python_arguments(text)
        if arguments is None:
            return
        source.begin_call(name)
        source.arguments(arguments)
        source.end_call()
        yield from source.skip_space()
        if not (yield from source.accept(",")):
            break
    yield from closing(source, "]")
    yield from closing(source, "<|python_end|>")


def _parenthesis(source: Source) -> Reading[str | None]:
    """Take ``(…)``, judged by brackets and Python's strings; None if it does not close."""
    depth, quote, parts = 0, "", list[str]()
    while (yield from source.peek()):
        character = source.take(1)
        parts.append(character)
        if quote:
            if character == "\\":
                yield from source.peek()
                parts.append(source.take(1))
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return "".join(parts)
    return None


def _python_arguments(text: str) -> str | None:
    """The keyword arguments of ``(a=1, b='x')`` as a JSON object; None for what is no literal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse(f"f{text}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                return None
            values = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        encoded = json.dumps(values, ensure_ascii=False, allow_nan=False)
        if None in values or len(values) != len(call.keywords):
            return None
        encoded.encode()
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return encoded


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _PYTHON_WORDS:
        return _PYTHON_WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary is spread")
        return {
            _literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    return ast.literal_eval(node)
