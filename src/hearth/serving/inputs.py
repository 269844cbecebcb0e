"""Prompts, inputs and stop texts in all the forms in which they may be sent."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from hearth.serving.decoding import invalid, missing

MAX_STOPS = 16


def as_list(stop: str | list[str] | None) -> tuple[str, ...]:
    """``stop`` as a tuple; HttpError 400 for empty strings or too many."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop has {len(stops)} entries, at most {MAX_STOPS} are allowed", "stop")
    if any(not text for text in stops):
        raise invalid("stop contains an empty string, which would end every answer at once", "stop")
    return stops


def text_inputs(value: Any, param: str) -> list[str | list[int]]:
    """A string, strings, token ids, or lists of token ids, as a list; never empty."""
    if value is UNSET or value is None:
        raise missing(param)
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if _is_token_ids(value):
            return [list(value)]
        if all(isinstance(item, list) and item and _is_token_ids(item) for item in value):
            return [list(item) for item in value]
    raise invalid(
        f"{param}: a string, a list of strings, a list of token ids (integers from 0) or a list of such "
        "lists; no list may be empty",
        param,
    )


def _is_token_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)
