"""A prompt as the token ids that serving feeds to the model. Everything that serves goes through here.

The parity gate compares these ids with the training side's, so there must be one way to make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain prompt, with the tokens that the tokenizer itself puts around a text (such as BOS)."""
    # Not verbose: whoever serves checks the length, and says it better than a warning does.
    return list(tokenizer(text, verbose=False)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation in the model's own template, up to where the assistant is to speak."""
    return list(
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )
