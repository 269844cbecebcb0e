"""Prompts as token ids: texts, and conversations in the model's own template."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hearth.models import encode_chat, encode_text
from hearth.serving.decoding import invalid

# Encoding takes about a microsecond a character; longer texts are encoded off the event loop.
_INLINE_CHARACTERS = 8192
_TAIL = 16  # tokens at the end of a prompt that may open the reasoning
# What the template itself or the tokenizer is told by us.
_RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
T = TypeVar("T")


def template_text(tokenizer: Any) -> str:
    """The text of the tokenizer's chat templates; empty if it has none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that decoding leaves out unless it is asked for them."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return tuple(str(token) for token in added.values() if getattr(token, "special", False))


class PromptMaker:
    """Encodes for one model, called ``version`` in errors."""

    def __init__(self, tokenizer: Any, version: str) -> None:
        self.tokenizer = tokenizer
        self.template = template_text(tokenizer)
        self._version = version

    def text_of(self, prompt: str | list[int]) -> str:
        """A prompt as text."""
        return prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt))

    def tail_of(self, ids: Sequence[int]) -> str:
        """The end of an encoded prompt, with its special tokens."""
        return str(self.tokenizer.decode(list(ids[-_TAIL:]), skip_special_tokens=False))

    async def ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, possibly none."""
        return await _call(
            len(text), lambda: encode_text(self.tokenizer, text, add_special_tokens=add_special_tokens)
        )

    async def encode(self, prompt: str | list[int], param: str = "prompt") -> list[int]:
        """Ids of a text, or these ids; HttpError 400 if there are none."""
        if not isinstance(prompt, str):
            if not prompt:
                raise invalid(f"{param}: the list of token ids is empty", param)
            return list(prompt)
        ids = await self.ids(prompt)
        if not ids:
            raise invalid(f"{param} is empty, and this tokenizer has no token that begins a text", param)
        return ids

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation; HttpError 400 for what the template does not know."""
        if not self.template:
            raise invalid(
                f"the model {self._version} has no chat template: it was not trained to chat; "
                "use /v1/completions or /generate",
                code="no_chat_template",
            )
        for name in kwargs or {}:
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", self.template):
                raise invalid(
                    f"the model's chat template has no setting {name!r}",
                    f"chat_template_kwargs.{name}",
                    "unsupported_parameter",
                )
        num_characters = sum(len(turn["content"]) for turn in messages)
        try:
            return await _call(
                num_characters,
                lambda: encode_chat(
                    self.tokenizer,
                    messages,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    settings=kwargs or {},
                ),
            )
        except RecursionError:  # schemas and arguments of calls are what can be nested
            param = "tools" if tools else "messages"
            raise invalid(f"{param}: nested too deeply for the chat template", param) from None


async def _call(num_characters: int, work: Callable[[], T]) -> T:
    if num_characters <= _INLINE_CHARACTERS:
        return work()
    return await asyncio.to_thread(work)
