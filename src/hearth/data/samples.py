"""Rows of comparisons, verdicts and prompts: which part of a row is the prompt, and which are answers. Pure.

Shapes that are read: conversational (lists of messages), plain (strings), and that of Anthropic's hh-rlhf,
where each answer is one string with the whole dialogue in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hearth.data.chat import check_messages
from hearth.errors import DataError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class SampleFields:
    """The keys of a source that say where prompt, answers and verdict are."""

    messages: str
    prompt: str | None
    response: str | None
    chosen: str
    rejected: str
    label: str


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it: two of a comparison, one with a verdict, or none yet.

    ``defect`` names the filter that drops it: what no loss could be computed from.
    """

    prompt: Messages
    completions: Messages = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    defect: str = ""


def filled(row: Mapping[str, Any], pattern: str, where: str, setting: str) -> str:
    """The value of a key, or of a pattern such as ``"{instruction}\\n\\n{input}"``, trimmed."""
    if not _PLACEHOLDER.search(pattern):
        return unify_newlines(text_field(row, pattern, where, setting))
    text = _PLACEHOLDER.sub(lambda match: text_field(row, match[1], where, setting), pattern)
    return unify_newlines(text).strip()


def text_field(row: Mapping[str, Any], key: str, where: str, setting: str) -> str:
    """A string of a row, or DataError that names the keys it has."""
    value = _value(row, key, where, setting)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__}, not a string")
    return value


def unify_newlines(text: str) -> str:
    """Line ends as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _value(row: Mapping[str, Any], key: str, where: str, setting: str) -> Any:
    if key not in row:
        raise DataError(
            f"{where} has no key {key!r}; its keys are {', '.join(map(repr, row)) or 'none'}",
            fix=f"set {setting} of the source to the right key",
        )
    return row[key]


def parse_preference(row: Mapping[str, Any], fields: SampleFields, where: str) -> Sample:
    """A prompt and two answers, the better one first."""
    chosen = _value(row, fields.chosen, where, "chosen_field")
    rejected = _value(row, fields.rejected, where, "rejected_field")
    if type(chosen) is not type(rejected):
        raise DataError(
            f"{where}: {fields.chosen!r} is {type(chosen).__name__} and {fields.rejected!r} is "
            f"{type(rejected).__name__}",
            fix="write both as lists of messages, or both as strings",
        )
    prompt = _prompt(row, fields, where) if _has_prompt(row, fields) else None
    if isinstance(chosen, str) and prompt is None:
        if not (_is_dialogue(chosen) and _is_dialogue(rejected)):
            raise DataError(
                f"{where} has no prompt: there is no key 'prompt' (its keys are "
                f"{', '.join(map(repr, row))}), and its answers are not dialogues of Human and Assistant",
                fix="set prompt_field of the source, for example to 'question' or to '{instruction} {input}'",
            )
        chosen, rejected = _turns_of(chosen), _turns_of(rejected)
    talks = [
        _conversation(answer, prompt, where, key)
        for answer, key in ((chosen, fields.chosen), (rejected, fields.rejected))
    ]
    shared = talks[0][:-1]
    defect = ""
    if shared != talks[1][:-1]:
        defect = "prompts_differ"
    elif talks[0][-1] == talks[1][-1]:
        defect = "equal_answers"
    return Sample(shared, [talks[0][-1], talks[1][-1]], defect=defect)


def parse_feedback(row: Mapping[str, Any], fields: SampleFields, where: str) -> Sample:
    """A prompt, an answer, and whether the answer is good."""
    label = _value(row, fields.label, where, "label_field")
    if label not in (0, 1) or not isinstance(label, bool | int):
        raise DataError(
            f"{where}: {fields.label!r} is {label!r}, which is no verdict",
            fix="write true for a good answer and false for a bad one",
        )
    key = fields.response or "completion"
    whole = fields.response is None and key not in row and fields.messages in row
    prompt = None if whole else _prompt(row, fields, where)
    answer = row[fields.messages] if whole else _value(row, key, where, "response_field")
    talk = _conversation(answer, prompt, where, fields.messages if whole else key)
    return Sample(talk[:-1], [talk[-1]], {"label": bool(label)})


def parse_prompt(row: Mapping[str, Any], fields: SampleFields, where: str) -> Sample:
    """A prompt, and every other column of its row."""
    prompt = _prompt(row, fields, where)
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the prompt ends with an assistant's turn, so there is nothing to answer",
            fix="leave the last answer out, or use format: chat to train on it",
        )
    pattern = fields.prompt or ("prompt" if "prompt" in row else fields.messages)
    used = set(_PLACEHOLDER.findall(pattern)) or {pattern}
    return Sample(prompt, [], {key: value for key, value in row.items() if key not in used})


def _has_prompt(row: Mapping[str, Any], fields: SampleFields) -> bool:
    return fields.prompt is not None or "prompt" in row


def _prompt(row: Mapping[str, Any], fields: SampleFields, where: str) -> Messages:
    """The messages before the answer: a list of the row, or a user's turn made of its strings."""
    pattern = fields.prompt or "prompt"
    if fields.prompt is None and "prompt" not in row:
        if fields.messages not in row:
            raise DataError(
                f"{where} has no prompt: neither 'prompt' nor {fields.messages!r} is among its keys, "
                f"{', '.join(map(repr, row)) or 'none'}",
                fix="set prompt_field (or messages_field) of the source to the right key",
            )
        return check_messages(row[fields.messages], where)
    if isinstance(row.get(pattern), list):
        return check_messages(row[pattern], where)
    return [{"role": "user", "content": filled(row, pattern, where, "prompt_field")}]


def _conversation(answer: Any, prompt: Messages | None, where: str, key: str) -> Messages:
    """Prompt and answer; the answer may repeat the prompt, and has to end with the assistant's turn."""
    if isinstance(answer, str):
        return [*(prompt or []), {"role": "assistant", "content": unify_newlines(answer)}]
    messages = check_messages(answer, f"{where}: {key!r}")
    if prompt is not None and messages[: len(prompt)] != prompt:
        messages = [*prompt, *messages]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {key!r} ends with the turn of role {messages[-1]['role']!r}",
            fix="end it with the assistant's answer",
        )
    if len(messages) < 2:
        raise DataError(
            f"{where}: {key!r} is an answer without a prompt",
            fix="set prompt_field of the source, or write the user's turn into the messages",
        )
    return messages


def _is_dialogue(text: str) -> bool:
    turns = _HH_TURN.findall(unify_newlines(text))
    return len(turns) >= 2 and turns[0] == "Human" and turns[-1] == "Assistant"


def _turns_of(text: str) -> Messages:
    """Turns of hh-rlhf's text: ``\\n\\nHuman: … \\n\\nAssistant: …``."""
    pieces = _HH_TURN.split(unify_newlines(text))[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
