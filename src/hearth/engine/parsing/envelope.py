"""Calls as JSON objects ``{"name": …, "arguments": {…}}``, which several formats share."""

from __future__ import annotations

from hearth.engine.parsing.scanning import load_json
from hearth.engine.parsing.source import Reading, Source

_ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("type", "id", "index")  # may stand beside the name and mean nothing
MAX_HEAD = 512  # characters of a name and what stands around it


def json_call(source: Source, *, known_only: bool = False) -> Reading[bool]:
    """Read one call, from its brace on. False: it is none, and what was read of it is held.

    The call begins when name and arguments are both in sight; what goes wrong later makes it incomplete.
    """
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    begun = False
    if not (yield from source.accept("{")):
        return False
    while True:
        key = yield from _key(source)
        if key is None:
            break
        if not begun and key == "name":
            text = yield from source.json_value()
            name = _name(source, text, known_only)
            if name is None:
                return False
            if early is not None:
                source.begin_call(name)
                source.arguments(early)
                begun = True
        elif not begun and key in _ARGUMENTS:
            if name is None:
                text = yield from source.json_value()
                if text is None:
                    return False
                early = _as_object(text)
            else:
                source.begin_call(name)
                begun = True
                if not (yield from _arguments(source)):
                    source.end_call()
                    return True
        elif begun or key in _BESIDE:
            if (yield from source.json_value()) is None:
                break
        else:
            return False
        yield from source.skip_space()
        if not (yield from source.accept(",")):
            break
    closed = yield from source.accept("}")
    if not begun:
        if name is None or not closed:
            return False
        source.begin_call(name)
        source.arguments("{}")
    source.end_call()
    return True


def _key(source: Source) -> Reading[str | None]:
    """Read ``"key":`` and the space around it; None if something else comes."""
    yield from source.skip_space()
    if (yield from source.peek()) != '"':
        return None
    text = yield from source.json_value()
    yield from source.skip_space()
    if text is None or not (yield from source.accept(":")):
        return None
    yield from source.skip_space()
    return _string(text)


def _name(source: Source, text: str | None, known_only: bool) -> str | None:
    name = None if text is None else _string(text)
    return name if name is not None and source.allows(name, known_only=known_only) else None


def _arguments(source: Source) -> Reading[bool]:
    """Read the arguments of the open call; an object passes through as it is written."""
    if (yield from source.peek()) == "{":
        return (yield from flowing_object(source))
    text = yield from source.json_value()
    if text is None:
        source.release("arguments")
        return False
    source.arguments(_as_object(text))
    return True


def flowing_object(source: Source) -> Reading[bool]:
    """Pass an object on as arguments while it arrives; False if it breaks off."""
    source.flow_arguments()
    text = yield from source.json_value()
    source.stop_flow()
    return text is not None


def _as_object(text: str) -> str:
    """Arguments that are no object: none at all, or an object that was written as a string."""
    if text == "null":
        return "{}"
    return _string(text) or text


def _string(text: str) -> str | None:
    """The value of a JSON string; half a surrogate pair is replaced, because no wire carries it."""
    value = load_json(text)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def closing(source: Source, *markers: str) -> Reading[None]:
    """The end marker of a call, if it comes; without it the space stays for what follows."""
    yield from source.skip_space()
    if (yield from source.accept_any(markers)) is not None:
        source.release("markup")
