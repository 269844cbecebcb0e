"""A prompt as the token ids that serving feeds to the model. Everything that serves goes through here.

The parity gate compares these ids with the training side's, so there must be one way to make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hearth.errors import RequestError


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain prompt, with the tokens that the tokenizer itself puts around a text (such as BOS).

    Raises RequestError for what is no Unicode text, such as an argument of the command line in other bytes.
    """
    _check_unicode(text, "prompt")
    # Not verbose: whoever serves checks the length, and says it better than a warning does.
    return list(tokenizer(text, verbose=False)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation in the model's own template, up to where the assistant is to speak.

    Raises RequestError for what the template refuses, such as a system message where it knows none.
    """
    for message in messages:
        _check_unicode(str(message.get("content", "")), "messages")
    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except TemplateError as error:
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
