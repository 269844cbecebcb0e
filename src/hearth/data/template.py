"""Chat templates: the Jinja text that turns messages into the string a model reads.

Rendered in the same sandbox with the same helpers as ``transformers.apply_chat_template``, without importing
torch. ``{% generation %} … {% endgeneration %}`` marks what the assistant says; a render reports the marked
spans of characters, from which the loss mask is made.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from hearth.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]

# The assistant's text is trimmed so that it never shares a token with the line break before it.
CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _GenerationMarks(jinja2.ext.Extension):
    """Records where the text inside generation blocks begins and ends."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it this way

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[Span] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model must not see.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - templates expect the local time


class ChatTemplate:
    """A compiled template. Raises DataError when the text is not valid Jinja."""

    def __init__(self, text: str, variables: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.variables = dict(variables or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template is not valid: {error}", fix="correct chat_template.jinja of the tokenizer"
            ) from error
        marks = environment.extensions[_GenerationMarks.identifier]
        assert isinstance(marks, _GenerationMarks)
        self._marks = marks

    @property
    def has_generation_marks(self) -> bool:
        """Whether the template says which text is the assistant's."""
        return _GENERATION_TAG.search(self.text) is not None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans of characters inside generation blocks."""
        blocks: list[str] = []
        self._marks.blocks, self._marks.spans = blocks, []
        try:
            context = self._template.new_context(
                {
                    **self.variables,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            for block in self._template.root_render_func(context):
                blocks.append(block)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                fix="bring the roles into the order that the template expects, or use another template",
            ) from error
        return "".join(blocks), self._marks.spans


@functools.lru_cache(maxsize=8)
def _compiled(text: str, variables: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(text, dict(variables))


def compiled_template(text: str, variables: Mapping[str, str]) -> ChatTemplate:
    """``ChatTemplate`` with a small cache; compiling takes milliseconds."""
    return _compiled(text, tuple(sorted(variables.items())))
