"""Answers have OpenAI's shapes, checked with the types of its official client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from hearth.serving.answers import Choice, Delta, Dialect, Heading, TokenLogprob, Usage
from hearth.serving.chat_answers import ChatDialect
from hearth.serving.completion_answers import CompletionDialect
from hearth.serving.plain_answers import PlainDialect

HEADING = Heading("id-1", 1700000000, "tiny@3")
USAGE = Usage(7, 5, 4)
LOGPROB = TokenLogprob(
    "hé", -0.5, (104, 195, 169), (TokenLogprob("a", -1.0, (97,)), TokenLogprob("b", -2.0, (98,)))
)
DELTAS = [
    Delta(0, "hé", 1, (LOGPROB,)),
    Delta(1, "x", 1, (TokenLogprob("x", -0.1, (120,)),)),
    Delta(0, "llo", 2, (TokenLogprob("l", -0.2), TokenLogprob("lo", -0.3)), "stop"),
    Delta(1, "", 1, (TokenLogprob("</s>", -0.4),), "length"),
]


def grow(deltas: list[Delta], num_choices: int) -> list[Choice]:
    choices = [Choice() for _ in range(num_choices)]
    for delta in deltas:
        choices[delta.choice].add(delta)
    return choices


def stream(dialect: Dialect, deltas: list[Delta], num_choices: int) -> list[dict[str, Any]]:
    events = [*dialect.start(num_choices), *(event for delta in deltas for event in dialect.delta(delta))]
    usage = dialect.usage(USAGE)
    return events + ([usage] if usage is not None else [])


def test_a_whole_chat_answer() -> None:
    dialect = ChatDialect(HEADING, logprobs=True, include_usage=False)
    answer = ChatCompletion.model_validate(dialect.whole(grow(DELTAS, 2), USAGE), strict=True)
    assert answer.model == "tiny@3"
    assert [choice.message.content for choice in answer.choices] == ["héllo", "x"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        5,
        12,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    (first, *_) = answer.choices[0].logprobs.content
    assert (first.token, first.bytes, first.top_logprobs[1].token) == ("hé", [104, 195, 169], "b")


def test_a_streamed_chat_answer() -> None:
    dialect = ChatDialect(HEADING, logprobs=False, include_usage=True)
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in stream(dialect, DELTAS, 2)]
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1] if c.choices[0].index == 0)
    assert text == "héllo"


def test_a_whole_completion_with_offsets() -> None:
    dialect = CompletionDialect(HEADING, logprobs=True, include_usage=False)
    answer = Completion.model_validate(dialect.whole(grow(DELTAS, 2), USAGE), strict=True)
    assert [choice.text for choice in answer.choices] == ["héllo", "x"]
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["hé", "l", "lo"]
    assert logprobs.text_offset == [0, 2, 3]
    assert logprobs.top_logprobs[0] == {"a": -1.0, "b": -2.0}


def test_echo_repeats_the_prompt_and_its_logprobs() -> None:
    of_prompt = (None, TokenLogprob("y ", -0.7, (121, 32), (), 9))
    deltas = [replace(DELTAS[0], prompt_logprobs=of_prompt), DELTAS[2]]

    def dialect() -> CompletionDialect:
        return CompletionDialect(HEADING, logprobs=True, include_usage=False, echo=["say "])

    whole = dialect().whole(grow(deltas, 1), USAGE)["choices"][0]
    assert whole["text"] == "say héllo"
    assert whole["logprobs"] == {
        "tokens": ["sa", "y ", "hé", "l", "lo"],
        "token_logprobs": [None, -0.7, -0.5, -0.2, -0.3],
        "top_logprobs": [None, {}, {"a": -1.0, "b": -2.0}, {}, {}],
        "text_offset": [0, 2, 4, 6, 7],
    }
    chunks = [chunk["choices"][0] for chunk in stream(dialect(), deltas, 1)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values
    plain = CompletionDialect(HEADING, logprobs=False, include_usage=False, echo=["say "])
    assert "".join(c["choices"][0]["text"] for c in stream(plain, deltas, 1)) == "say héllo"


def test_prompt_logprobs_in_vllms_form() -> None:
    of_prompt = (None, TokenLogprob("y", -0.7, (121,), (TokenLogprob("z", -0.2, (122,), (), 8),), 9))
    deltas = [replace(DELTAS[0], prompt_logprobs=of_prompt)]
    expected = [
        None,
        {"9": {"logprob": -0.7, "decoded_token": "y"}, "8": {"logprob": -0.2, "decoded_token": "z"}},
    ]
    completion = CompletionDialect(HEADING, logprobs=False, include_usage=False, prompt_logprobs=True)
    assert completion.whole(grow(deltas, 1), USAGE)["choices"][0]["prompt_logprobs"] == expected
    assert stream(completion, deltas, 1)[0]["choices"][0]["prompt_logprobs"] == expected
    chat = ChatDialect(HEADING, logprobs=False, include_usage=False, prompt_logprobs=True)
    assert chat.whole(grow(deltas, 1), USAGE)["prompt_logprobs"] == expected


def test_tokens_that_are_no_text_are_told_apart() -> None:
    """Two halves of characters both read as the replacement character."""
    tops = (TokenLogprob("\ufffd", -1.0, (0xE2,)), TokenLogprob("\ufffd", -2.0, (0xC3,)))
    delta = Delta(0, "", 1, (TokenLogprob("\ufffd", -1.0, (0xE2,), tops),))
    dialect = CompletionDialect(HEADING, logprobs=True, include_usage=False)
    logprobs = dialect.whole(grow([delta], 1), USAGE)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe2": -1.0, "bytes:\\xc3": -2.0}]
    assert logprobs["tokens"] == ["bytes:\\xe2"]


def test_a_streamed_completion_offsets_continue() -> None:
    dialect = CompletionDialect(HEADING, logprobs=True, include_usage=False)
    choices = [chunk["choices"][0] for chunk in stream(dialect, DELTAS, 2)]
    offsets = [offset for c in choices if c["index"] == 0 for offset in c["logprobs"]["text_offset"]]
    assert offsets == [0, 2, 3]


def test_offsets_of_a_stream_are_those_of_the_whole() -> None:
    """Text that is held back, because it may begin a stop text, comes later than its token."""
    deltas = [
        Delta(0, "", 1, (TokenLogprob("ab", -0.1),)),
        Delta(0, "abc", 1, (TokenLogprob("c", -0.1),)),
        Delta(0, "d", 1, (TokenLogprob("d", -0.1),), "length"),
    ]
    dialect = CompletionDialect(HEADING, logprobs=True, include_usage=False)
    chunks = stream(dialect, deltas, 1)
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    whole = dialect.whole(grow(deltas, 1), USAGE)
    assert offsets == whole["choices"][0]["logprobs"]["text_offset"] == [0, 2, 3]


def test_plain_answers() -> None:
    dialect = PlainDialect(HEADING)
    one = dialect.whole(grow([DELTAS[0], DELTAS[2]], 1), USAGE)
    assert (one["text"], one["finish_reason"], one["model"]) == ("héllo", "stop", "tiny@3")
    assert "choices" not in one
    assert [choice["text"] for choice in dialect.whole(grow(DELTAS, 2), USAGE)["choices"]] == ["héllo", "x"]
    events = stream(dialect, [DELTAS[0], DELTAS[2]], 1)
    assert [event.get("text") for event in events] == ["hé", "llo", None]
    assert events[-1]["usage"]["total_tokens"] == 12


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=4)), max_size=20))
def test_streamed_pieces_join_to_the_whole(pieces: list[tuple[int, str]]) -> None:
    deltas = [Delta(choice, text, 1) for choice, text in pieces]
    whole = grow(deltas, 3)
    for dialect, read in (
        (ChatDialect(HEADING, logprobs=False, include_usage=False), lambda c: c["delta"].get("content", "")),
        (CompletionDialect(HEADING, logprobs=False, include_usage=False), lambda c: c["text"]),
    ):
        joined = ["", "", ""]
        for chunk in stream(dialect, deltas, 3):
            for choice in chunk["choices"]:
                joined[choice["index"]] += read(choice)
        assert joined == [choice.text for choice in whole]
