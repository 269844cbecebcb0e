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
    "lookalikes": "if a <|b|> c: print('<|im_end|> <|endoftext|> </s> [INST] <s> <unk>')",
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
    """A prompt as token ids of both sides; ``show`` turns a token id into text for the report.

    ``ids_equal`` speaks of the whole prompt; the ids here may be cut to fit.
    """

    name: str
    trained_ids: tuple[int, ...]
    served_ids: tuple[int, ...]
    ids_equal: bool
    show: Callable[[int], str]
    note: str = ""


def make_prompts(
    trained: DataTokenizer,
    served: Any,
    *,
    documents: Sequence[str] = (),
    conversations: Sequence[list[dict[str, Any]]] = (),
    num_prompts: int,
    max_prompt_tokens: int,
    vocab_size: int,
) -> list[ParityPrompt]:
    """Prompts of both sides for one model directory.

    ``trained`` is the data pipeline's tokenizer, ``served`` the engine's (transformers). Every built-in kind
    is always asked: each stands for a way in which the two sides have differed in practice. Held-out
    ``documents`` and ``conversations`` are added up to ``num_prompts``. Prompts longer than
    ``max_prompt_tokens`` are cut, on both sides alike, after their ids were compared.
    """
    from hearth.models import encode_chat, encode_text

    prompts = []

    def add(name: str, trained_ids: Sequence[int], served_ids: Sequence[int]) -> None:
        ids_equal = list(trained_ids) == list(served_ids)
        note = "cut to fit" if max(len(trained_ids), len(served_ids)) > max_prompt_tokens else ""
        cut_trained, cut_served = trained_ids[:max_prompt_tokens], served_ids[:max_prompt_tokens]
        if max(*trained_ids, *served_ids, 0) >= vocab_size:
            # The engine refuses such a prompt, and the training side has no embedding for it either.
            ids_equal, note = False, f"holds a token beyond the model's {vocab_size}"
            cut_trained = cut_served = [min(token, vocab_size - 1) for token in cut_trained]
        if trained_ids or served_ids:
            # A side without any token cannot be computed; that the two differ is verdict enough.
            prompts.append(
                ParityPrompt(
                    name,
                    tuple(cut_trained or cut_served),
                    tuple(cut_served or cut_trained),
                    ids_equal,
                    lambda token: trained.decode([token]),
                    note,
                )
            )

    texts = dict(TEXTS)
    asked = dict(CONVERSATIONS) if trained.chat_template else {}
    room = max(0, num_prompts - len(texts) - len(asked))
    texts |= {f"held-out document {n}": text for n, text in enumerate(documents[:room], start=1)}
    if trained.chat_template:
        asked |= {f"held-out question {n}": each for n, each in enumerate(conversations[:room], start=1)}
    for name, text in texts.items():
        add(name, trained.encode_prompt(text), encode_text(served, text))
    for name, messages in asked.items():
        rendered, _ = trained.template.render(messages, add_generation_prompt=True)
        add(name, trained.encode_rendered(rendered)[0], encode_chat(served, messages))
    return prompts
