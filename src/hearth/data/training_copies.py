"""Training copies: templates with marks for families whose own template has none.

A template without ``{% generation %}`` marks gives an all-zero loss mask, and most families ship one. For
those in ``templates/`` there is a copy with marks that covers plain conversations. A copy is found by what it
does, not by a name or a hash: it has to render a set of probes exactly like the template at hand. And it is
never trusted further than that: for every conversation the text comes from the model's own template, the copy
only says which part of it the assistant wrote, and a difference of one character is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from hearth.data.template import ChatTemplate, Message, compiled_template
from hearth.errors import DataError

_FOLDER = Path(__file__).with_name("templates")
_TEXTS = (
    "  Which one?\n",
    "This one.",
    "<b>Why?</b> ",
    "\n Because 1 < 2. 米\n\n",
    "<think>\nhm\n</think>\n\nSo.",
)


def _conversation(*roles: str) -> list[Message]:
    return [
        {"role": role, "content": text} for role, text in zip(roles, itertools.cycle(_TEXTS), strict=False)
    ]


# What a template's treatment of system prompts, white space, thoughts and order shows itself in.
PROBES: tuple[Sequence[Message], ...] = (
    _conversation("user", "assistant"),
    _conversation("system", "user", "assistant"),
    _conversation("user", "assistant", "user", "assistant"),
    _conversation("system", "user", "assistant", "user", "assistant"),
    _conversation("user", "assistant", "user", "assistant", "user", "assistant"),
    _conversation("user", "assistant", "assistant"),
    _conversation("user", "assistant", "tool", "tool", "assistant"),
    [{"role": "system", "content": ""}, *_conversation("user", "assistant")],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TEXTS[4]}],
)


def copy_names() -> list[str]:
    """The families with a training copy."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def load_copy(name: str, variables: Mapping[str, str]) -> ChatTemplate:
    """The training copy of a family, with the special tokens of a tokenizer."""
    return compiled_template(copy_text(name), variables)


@functools.cache
def copy_text(name: str) -> str:
    """The training copy of a family as it is shipped."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def find_copy(template: ChatTemplate) -> str | None:
    """The name of the training copy that renders every probe like ``template``; None when there is none."""
    return _find(template.text, tuple(sorted(template.variables.items())))


@functools.lru_cache(maxsize=64)
def _find(text: str, variables: tuple[tuple[str, str], ...]) -> str | None:
    template = compiled_template(text, dict(variables))
    expected = [_rendered(template, probe) for probe in PROBES]
    if all(each is None for each in expected):
        return None
    for name in copy_names():
        copy = load_copy(name, dict(variables))
        if all(
            want is None or _rendered(copy, probe) == want
            for probe, want in zip(PROBES, expected, strict=True)
        ):
            return name
    return None


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """None where the template refuses: what it does not allow, a copy need not do alike."""
    try:
        return template.render(messages)[0]
    except DataError:
        return None


def marked_spans(
    name: str, template: ChatTemplate, messages: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """The spans of ``text`` that the training copy marks. Raises DataError when it renders another text."""
    copied, spans = load_copy(name, template.variables).render(messages)
    if copied != text:
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(copied, text, strict=False))
        )
        raise DataError(
            f"the training copy {name!r} does not cover this conversation: the model's own template goes on "
            f"with {text[same : same + 40]!r} where the copy has {copied[same : same + 40]!r}",
            fix="leave such conversations out (copies cover plain turns, no tool calls), or put "
            "{% generation %} marks into a copy of the template and name its folder as tokenizer.base",
        )
    return spans
