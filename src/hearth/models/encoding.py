"""A prompt as the token ids that serving feeds to the model. Everything that serves goes through here.

The parity gate compares these ids with the training side's, so there must be one way to make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hearth.errors import RequestError


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Ids of a plain prompt, with the tokens that the tokenizer itself puts around a text (such as BOS).

    Raises RequestError for what is no Unicode text, such as an argument of the command line in other bytes.
    """
    _check_unicode(text, "prompt")
    # Not verbose: whoever serves checks the length, and says it better than a warning does.
    return list(tokenizer(text, verbose=False, add_special_tokens=add_special_tokens)["input_ids"])


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation in the model's own template, up to where the assistant is to speak.

    tools: descriptions of functions, in OpenAI's form. settings: further variables of the template. Raises
    RequestError for what the template refuses, such as a system message where it knows none.
    """
    for message in messages:
        _check_unicode(str(message.get("content", "")), "messages")
    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
                **(settings or {}),
            )
        )
    # A template is a program over what a client sent, and fails in a program's ways.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise RequestError(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from None


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode at character {error.start}", fix="send UTF-8", param=param
        ) from None
