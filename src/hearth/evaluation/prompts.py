"""What the parity gate asks: plain text, code, odd Unicode, long prompts, conversations, held-out documents.

Each prompt carries its token ids twice, made by two paths that share no code: the training side's (the
encoder of the dataset, the renderer that made the loss mask) and the serving side's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hearth.data.tokenizer import DataTokenizer

TEXTS = {
    "plain text": "The library opened at nine, and by ten every chair was taken.",
    "code": "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n",
    "whitespace": "  leading,\ttabs,\n\n\nblank lines and trailing   ",
    "unicode": "naïve café, Größe, ελληνικά, 日本語の文章, 🙂👩‍👩‍👧, e\u0301",
    "numbers": "3.14159 * 10^-7 = 0x1F4A9, 1,000,000.00; 2026-11-23T05:10:00Z",
    "one character": "a",
}

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "question": [{"role": "user", "content": "What does os.path.join do?"}],
    "system and question": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?\nAnd grass green?"},
    ],
    "three turns": [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello. What can I do for you?"},
        {"role": "user", "content": "  Tell me about naïve café <b>markup</b>.  "},
    ],
}


@dataclass(frozen=True)
class ParityPrompt:
    """A prompt as token ids of both sides; ``show`` turns a token id into text for the report."""

    name: str
    trained_ids: tuple[int, ...]
    served_ids: tuple[int, ...]
    show: Callable[[int], str]
    note: str = ""


def make_prompts(
    trained: DataTokenizer,
    served: Any,
    *,
    documents: Sequence[str] = (),
    num_prompts: int,
    max_prompt_tokens: int,
    vocab_size: int,
) -> list[ParityPrompt]:
    """At least ``num_prompts`` prompts of both sides for one model directory.

    ``trained`` is the data pipeline's tokenizer, ``served`` the engine's (transformers). ``documents`` are
    held-out texts; the built-in texts fill up what they leave open. Every built-in kind is always asked:
    each stands for a way in which the two sides have differed in practice. Prompts longer than
    ``max_prompt_tokens`` are cut, on both sides alike, after encoding.
    """
    from hearth.models import encode_chat, encode_text

    prompts = []

    def add(name: str, trained_ids: Sequence[int], served_ids: Sequence[int]) -> None:
        note = "cut to fit" if len(trained_ids) > max_prompt_tokens else ""
        cut_trained, cut_served = (
            tuple(trained_ids[:max_prompt_tokens]),
            tuple(served_ids[:max_prompt_tokens]),
        )
        # An id that the model has no embedding for can be compared, but not computed with.
        if cut_trained and max(*cut_trained, *cut_served, 0) < vocab_size:
            prompts.append(
                ParityPrompt(name, cut_trained, cut_served, lambda token: trained.decode([token]), note)
            )

    texts = dict(TEXTS)
    for number, document in enumerate(documents[: max(0, num_prompts - len(texts))], start=1):
        texts[f"held-out document {number}"] = document
    for name, text in texts.items():
        add(name, trained.encode_prompt(text), encode_text(served, text))
    if trained.chat_template:
        for name, messages in CONVERSATIONS.items():
            rendered, _ = trained.template.render(messages, add_generation_prompt=True)
            add(name, trained.encode_rendered(rendered)[0], encode_chat(served, messages))
    return prompts
