"""Questions to the served model, over HTTP, with the official openai client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hearth.demo.report import Answer

if TYPE_CHECKING:
    from openai import OpenAI

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A question, what the documentation says, and whether its module was held out of training."""

    text: str
    expected: str
    held_out: bool


def ask(client: OpenAI, model: str, question: Question) -> Answer:
    """Stream the answer to one question and time it. The first token counts from the sending."""
    started = time.perf_counter()
    first = None
    pieces, num_tokens = [], 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question.text}],
        max_tokens=MAX_ANSWER_TOKENS,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            pieces.append(chunk.choices[0].delta.content)
    ended = time.perf_counter()
    first = first or ended
    rate = (num_tokens - 1) / (ended - first) if num_tokens > 1 and ended > first else 0.0
    return Answer(question.text, question.expected, "".join(pieces), question.held_out, first - started, rate)


def ask_all(base_url: str, model: str, questions: Sequence[Question]) -> list[Answer]:
    """Ask one question after another; the first request of a server is a warm-up and not among them."""
    from openai import OpenAI

    with OpenAI(base_url=f"{base_url}/v1", api_key="not-needed", max_retries=0, timeout=120) as client:
        ask(client, model, questions[0])
        return [ask(client, model, question) for question in questions]
