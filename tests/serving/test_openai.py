"""The server as OpenAI's official client sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from hearth.serving import ServerProcess

MODEL = "tiny-chat"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(server: ServerProcess) -> AsyncIterator[AsyncOpenAI]:
    url = server.base_url + "/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == f"{MODEL}@unregistered"
    (choice,) = answer.choices
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == 3 + answer.usage.completion_tokens


def test_streamed_and_whole_completions_are_equal(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "stream me", "max_tokens": 20, "seed": 7, "temperature": 0.9}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert {c.id for c in chunks} == {chunks[0].id}


def test_without_include_usage_a_stream_has_none(client: OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_chat(client: OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    # One token a byte, and one for each of the five ChatML marks.
    for mark in ("<|im_start|>", "<|im_end|>"):
        rendered = rendered.replace(mark, "#")
    assert answer.usage.prompt_tokens == len(rendered)


def test_streamed_and_whole_chats_are_equal(client: OpenAI) -> None:
    request = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_content_in_parts_is_the_same_as_text(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    answers = [
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
        for messages in (HELLO, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_an_answer_goes_back_into_the_history_as_it_is(client: OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
    history = [*HELLO, first.choices[0].message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_default_length_of_a_chat_is_the_rest_of_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_max_completion_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 5


def test_token_ids_lists_and_several_prompts(client: OpenAI) -> None:
    request = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    single = [client.completions.create(prompt=p, **request).choices[0].text for p in ("one", "two")]
    both = client.completions.create(prompt=["one", "two"], **request)
    assert [choice.text for choice in sorted(both.choices, key=lambda c: c.index)] == single
    assert both.usage.prompt_tokens == 6
    ids = [[10, 11, 12], [13, 14]]
    by_ids = client.completions.create(prompt=ids, **request)
    assert len(by_ids.choices) == 2
    assert by_ids.usage.prompt_tokens == 5
    assert client.completions.create(prompt=ids[0], **request).choices[0].text == by_ids.choices[0].text


def test_several_choices(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="many", n=3, max_tokens=12, seed=5, temperature=1.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, n=2, max_tokens=5, stream=True)
    assert {choice.index for chunk in chat for choice in chunk.choices} == {0, 1}


def test_echo(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "say it", "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**request).choices[0].text
    assert client.completions.create(**request, echo=True).choices[0].text == "say it" + plain
    streamed = client.completions.create(**request, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "say it" + plain


def test_the_same_seed_gives_the_same_answer_in_any_company(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "dice", "max_tokens": 16, "temperature": 1.3}
    alone = client.completions.create(**request, seed=11).choices[0].text
    assert client.completions.create(**request, seed=11).choices[0].text == alone
    others = [client.completions.create(**request, seed=seed).choices[0].text for seed in (12, 13, 14)]
    assert any(other != alone for other in others)


def test_stop_texts_end_the_answer_and_are_not_in_it(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "zzz", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**request).choices[0].text
    stop = free[5:7]
    stopped = client.completions.create(**request, stop=[stop]).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = client.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    without = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert without.choices[0].logprobs is None


def test_logprobs_of_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    count = answer.usage.completion_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == count
    assert logprobs.text_offset[0] == 0


def test_logit_bias_bans_and_forces(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=5, logit_bias={"65": 100}, extra_body={"ignore_eos": True}
    )
    assert len(set(answer.choices[0].text)) == 1


def test_extensions(client: OpenAI) -> None:
    greedy = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=0).choices[0].text
    narrow = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=8, extra_body={"top_k": 1, "min_p": 0.1, "min_tokens": 8}
    )
    assert narrow.choices[0].text.startswith(greedy[:4])
    assert narrow.usage.completion_tokens == 8


async def test_sixteen_at_once(async_client: AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        request = {"model": MODEL, "prompt": f"number {number}", "max_tokens": 12, "temperature": 0}
        if number % 2:
            answer = await async_client.completions.create(**request)
            return answer.choices[0].text
        chunks = await async_client.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    together = await asyncio.gather(*map(ask, range(16)))
    alone = [await ask(number) for number in range(16)]
    assert together == alone


async def test_leaving_a_stream_frees_the_engine(async_client: AsyncOpenAI, server: ServerProcess) -> None:
    def engine() -> dict:
        return server.get("/stats")["models"][MODEL]["worker"]["engine"]

    before = engine()["finished"].get("abort", 0)
    stream = await async_client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, n=8, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    deadline = time.monotonic() + 20
    while engine()["num_running"] and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    after = engine()
    assert after["num_running"] == after["num_used_blocks"] == 0
    assert after["finished"].get("abort", 0) > before


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"prompt": "x" * 300}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 300}, "prompt", "context_length_exceeded"),
        ({"prompt": [100000]}, None, None),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_choice", "invalid_value"),
        ({"extra_body": {"guided_regex": "("}}, None, None),
        ({"extra_body": {"beam": 3}}, "beam", "unknown_parameter"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", None),
        ({"logit_bias": {"word": 1}}, "logit_bias", None),
        # Numbers larger than those of the wire and of tensors.
        ({"logit_bias": {str(2**70): 1}}, "logit_bias", None),
        ({"extra_body": {"top_k": 2**63}}, "top_k", None),
        ({"prompt": [2**70]}, "prompt", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"extra_body": {"min_tokens": 50}}, "min_tokens", None),
    ],
)
def test_bad_requests(client: OpenAI, changes: dict, param: str | None, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x", "max_tokens": 4, **changes})
    if param is not None:
        assert caught.value.param == param
    if code is not None:
        assert caught.value.code == code


def test_what_a_chat_refuses(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="there are no tools"):
        client.chat.completions.create(model=MODEL, messages=HELLO, tool_choice="required")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported by"):
        client.chat.completions.create(model=MODEL, messages=HELLO, reasoning_effort="high")
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 400}])
    with pytest.raises(openai.BadRequestError, match="disagree"):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, max_completion_tokens=4)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_special_tokens_in_a_users_text_are_only_text_of_the_prompt(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "naïve 🔥"}], max_tokens=4
    )
    assert answer.usage.prompt_tokens == len("#user\n#\n#assistant\n") + len("naïve 🔥".encode())
