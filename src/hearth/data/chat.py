"""Conversations as training examples: ids, loss mask, and the audit of both.

The ids are those of the whole rendered text, exactly what serving encodes for the same messages. The mask
covers the tokens of generation blocks: the assistant's words and the token that stops the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hearth.data.template import Message, Span
from hearth.data.tokenizer import DataTokenizer
from hearth.data.training_copies import copy_names, find_copy, marked_spans
from hearth.errors import DataError

_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")

ROLES = ("system", "developer", "user", "assistant", "tool")

_MARKS_FIX = (
    "wrap what the assistant says, its stop token included, in {% generation %} … {% endgeneration %} "
    "in chat_template.jinja; to leave the base as it is, do so in a copy of its tokenizer files and name "
    "that folder as tokenizer.base"
)


def _as_tokenizer(tokenizer: DataTokenizer | Path | str | Any) -> DataTokenizer:
    if isinstance(tokenizer, DataTokenizer):
        return tokenizer
    if isinstance(tokenizer, Path | str):
        return DataTokenizer.open(tokenizer)
    return DataTokenizer.from_transformers(tokenizer)


def render_chat(
    messages: Sequence[Message], tokenizer: DataTokenizer | Path | str | Any
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Token ids [T] of a conversation and the loss mask [T], true on the assistant's tokens.

    ``tokenizer`` is a DataTokenizer, a directory, or a fast tokenizer of transformers. A token is counted
    when it starts inside a generation block. Raises DataError when there is no chat template.
    """
    ids, mask, _ = render_conversation(messages, _as_tokenizer(tokenizer))
    return ids, mask


def render_conversation(
    messages: Sequence[Message], tokenizer: DataTokenizer
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], str]:
    """Ids, mask and rendered text of a conversation."""
    template = tokenizer.template
    text, spans = template.render(messages)
    copy = None if template.has_generation_marks else find_copy(template)
    if copy is not None:
        spans = marked_spans(copy, template, messages, text)
    ids, offsets = tokenizer.encode_rendered(text)
    return np.asarray(ids, dtype=np.int32), _mask(offsets, spans), text


def _mask(offsets: list[tuple[int, int]], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    starts = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    mask = np.zeros(len(starts), dtype=np.bool_)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    return mask


def last_turn(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The last run of a mask alone: of a comparison, only the answers that are compared count."""
    kept = np.zeros_like(mask)
    counted = np.flatnonzero(mask)
    if len(counted):
        skipped = np.flatnonzero(~mask[: counted[-1]])
        begin = skipped[-1] + 1 if len(skipped) else 0
        kept[begin : counted[-1] + 1] = True
    return kept


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages of one row, or DataError naming what is wrong and where."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: messages is {_kind(messages)}; a non-empty list of messages is needed",
            fix='write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}',
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: messages[{index}] is {_kind(message)}, not an object with role, content"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(
                f"{where}: messages[{index}].role is {role!r}", fix=f"use one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(f"{where}: messages[{index}].content is {_kind(content)}, not a string")
    return messages


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    return {"list": "an empty list", "dict": "an object"}.get(type(value).__name__, repr(value)[:40])


@dataclass(frozen=True)
class AuditReport:
    """What the audit saw. ``num_prefix_mismatches`` counts conversations whose prompt, as serving renders
    it, is not the beginning of the training example: legal (some templates drop earlier thoughts) but worth
    knowing. ``num_empty_thoughts`` counts those in which the template adds an empty thought that counts in
    the loss: it teaches the model not to think."""

    num_conversations: int
    num_tokens: int
    num_supervised_tokens: int
    num_turns: int
    num_prefix_mismatches: int
    num_empty_thoughts: int = 0

    def as_dict(self) -> dict[str, int]:
        """For the manifest."""
        return asdict(self)


def check_template(tokenizer: DataTokenizer) -> None:
    """Raise DataError when the tokenizer cannot give loss masks: no template, no marks, pad equal to eos."""
    copy = None if tokenizer.template.has_generation_marks else find_copy(tokenizer.template)
    if copy is None and not tokenizer.template.has_generation_marks:
        raise DataError(
            "the chat template has no {% generation %} marks, so the loss mask of every conversation "
            f"would be all zero; nor is it one of those that Hearth knows ({', '.join(copy_names())})",
            fix=_MARKS_FIX,
        )
    # Phi-3 pads with its eos, which ends no turn there: harmless, and check_mask sees to the others.
    if copy is None and tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        raise DataError(
            f"the pad token is the eos token ({tokenizer.eos_token!r}): masking the padding would also mask "
            "the end of every answer, and the model would never learn to stop",
            fix="give the tokenizer a pad token of its own",
        )


def audit_chat(
    conversations: Iterable[Sequence[Message]], tokenizer: DataTokenizer | Path | str | Any
) -> AuditReport:
    """Check that training on these conversations teaches what serving will ask for.

    Raises DataError when the template has no generation marks, when the mask of a conversation with an
    assistant's turn is all zero, when a stop token lies outside the mask, when a turn does not end with a
    stop token, or when pad equals eos.
    """
    tokenizer = _as_tokenizer(tokenizer)
    check_template(tokenizer)
    counts = dict.fromkeys(AuditReport.__dataclass_fields__, 0)
    for number, messages in enumerate(conversations):
        ids, mask, text = render_conversation(messages, tokenizer)
        num_turns = check_mask(ids, mask, messages, tokenizer, f"conversation {number}")
        counts["num_conversations"] += 1
        counts["num_tokens"] += len(ids)
        counts["num_supervised_tokens"] += int(mask.sum())
        counts["num_turns"] += num_turns
        counts["num_empty_thoughts"] += supervises_empty_thought(text, ids, mask, messages, tokenizer)
        counts["num_prefix_mismatches"] += not prompt_is_prefix(messages, ids, tokenizer)
    return AuditReport(**counts)


def check_mask(
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    messages: Sequence[Message],
    tokenizer: DataTokenizer,
    where: str,
) -> int:
    """The audit of one rendered conversation: the number of the assistant's turns, or DataError."""
    if not mask.any():
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"{where}: the loss mask is all zero (roles: {roles}); nothing would be learnt from it",
            fix=_MARKS_FIX if "assistant" in roles else "leave out conversations without an assistant's turn",
        )
    ends = _run_ends(mask)
    for end in ends:
        if int(ids[end]) == tokenizer.pad_id:
            raise DataError(
                f"{where}: the assistant's turn ends with the pad token ({tokenizer.pad_token!r}): masking "
                "the padding would also mask the end of every answer, and the model would not learn to stop",
                fix="give the tokenizer a pad token of its own",
            )
        if int(ids[end]) in tokenizer.stop_token_ids:
            continue
        following = int(ids[end + 1]) if end + 1 < len(ids) else None
        if following in tokenizer.stop_token_ids:
            raise DataError(
                f"{where}: the stop token {tokenizer.decode([following])!r} follows the assistant's turn "
                "outside the loss mask; the model would never learn to stop",
                fix="move {% endgeneration %} behind the stop token in chat_template.jinja",
            )
        names = sorted(tokenizer.decode([index]) for index in tokenizer.stop_token_ids)
        raise DataError(
            f"{where}: the assistant's turn ends with {tokenizer.decode([int(ids[end])])!r}, which is not a "
            f"stop token ({', '.join(names) or 'the tokenizer has none'})",
            fix="end the generation block with the stop token, or list it in generation_config.json",
        )
    return len(ends)


def _run_ends(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Index of the last token of each run of the mask."""
    following = np.append(mask[1:], False)
    ends: list[int] = np.flatnonzero(mask & ~following).tolist()
    return ends


def supervises_empty_thought(
    text: str,
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    messages: Sequence[Message],
    tokenizer: DataTokenizer,
) -> bool:
    """Whether an empty thought that no message has, but the template adds, counts in the loss."""
    if not _EMPTY_THOUGHT.search(text):
        return False
    counted = tokenizer.decode(ids[mask].tolist())
    written = sum(len(_EMPTY_THOUGHT.findall(str(message.get("content")))) for message in messages)
    return len(_EMPTY_THOUGHT.findall(counted)) > written


def prompt_is_prefix(
    messages: Sequence[Message], ids: npt.NDArray[np.int32], tokenizer: DataTokenizer
) -> bool:
    """Whether the prompt of the last answer, as serving renders it, begins the training example."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    text, _ = tokenizer.template.render(messages[:last], add_generation_prompt=True)
    prompt = tokenizer.encode_rendered(text)[0]
    return bool(np.array_equal(ids[: len(prompt)], prompt))
