"""An answer that the policy has given, as a reward sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a reward judges.

    prompt: the rendered prompt, special tokens included. completion: the answer without special tokens.
    token_ids: of the completion; with the stop token, if it ended by itself.
    truncated: it was cut off at ``max_new_tokens``. fields: the other columns of the prompt's row.
    """

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    truncated: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer itself, without the stop token."""
        return len(self.token_ids) - (not self.truncated)
