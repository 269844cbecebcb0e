"""Tools, reasoning, forms of answers, tokens and vectors, on a real engine, as OpenAI's client sees them.

The model's weights are random; grammars make it say what the tests are about.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from hearth.serving import ServerProcess

MODEL = "tiny-tools"
ADAPTERS = ("first", "second")
HELLO = [{"role": "user", "content": "hello"}]
DIGIT = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2, 3]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": DIGIT}},
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>{"name": "count", "arguments": {"a": [1-3]}}</tool_call>'
SAYS_AND_CALLS = f"<think>[a-c]{{5}}</think>\n\n[x-z]{{4}}{CALL}{CALL}".replace("{", "\\{").replace(
    "}", "\\}"
)
SAYS_AND_CALLS = re.sub(r"\\\{(\d)\\\}", r"{\1}", SAYS_AND_CALLS)


def make_adapter(directory: Path, *, seed: int) -> None:
    """A LoRA adapter in PEFT's format whose random weights change every answer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(2):
        for name, size in (("q_proj", 64), ("v_proj", 32)):  # of the tiny model
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, 4, generator=generator)
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Iterator[ServerProcess]:
    """A server of its own: descriptions of tools are long for a model of bytes."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model(folder / MODEL, chat=True, context=1024)
    for number, name in enumerate(ADAPTERS):
        make_adapter(folder / name, seed=number)
    options = ("--num-threads", "1", "--max-num-seqs", "16", "--log-level", "warning")
    options = (*options, "--adapter", f"{ADAPTERS[0]}={folder / ADAPTERS[0]}")
    with ServerProcess.start([model], options=options, timeout=300) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client: OpenAI, **request: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 200, **request})


def joined(chunks: Any) -> dict[str, Any]:
    """A streamed message, put together as a client would."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in chunks:
        (choice,) = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            if part.id is not None:
                assert part.index == len(message["calls"])
                assert part.function.arguments == ""
                message["calls"].append([part.function.name, ""])
            else:
                assert part.function.name is None
                message["calls"][part.index][1] += part.function.arguments
        message["finish_reason"] = choice.finish_reason or message["finish_reason"]
    return message


def test_the_formats_are_told(server: ServerProcess) -> None:
    (model,) = server.facts["models"]
    assert (model["tool_parser"], model["reasoning_parser"]) == ("hermes", "think")
    info = server.get("/models")["models"][0]["info"]
    assert (info["tool_parser"], info["reasoning_parser"]) == ("hermes", "think")


def test_reasoning_and_calls_streamed_and_whole(client: OpenAI) -> None:
    request = {"tools": TOOLS, "seed": 5, "extra_body": {"guided_regex": SAYS_AND_CALLS}}
    whole = chat(client, **request).choices[0]
    assert re.fullmatch("[x-z]{4}", whole.message.content)
    assert re.fullmatch("[a-c]{5}", whole.message.reasoning_content)
    assert [call.function.name for call in whole.message.tool_calls] == ["count", "count"]
    assert all(json.loads(call.function.arguments)["a"] in (1, 2, 3) for call in whole.message.tool_calls)
    assert len({call.id for call in whole.message.tool_calls}) == 2
    assert whole.finish_reason == "tool_calls"
    assert joined(chat(client, **request, stream=True)) == {
        "content": whole.message.content,
        "reasoning": whole.message.reasoning_content,
        "calls": [[call.function.name, call.function.arguments] for call in whole.message.tool_calls],
        "finish_reason": "tool_calls",
    }
    one = joined(chat(client, **request, stream=True, parallel_tool_calls=False))
    assert len(one["calls"]) == 1


def test_tools_nested_without_end_are_refused(client: OpenAI) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    function = {"name": "f", "parameters": schema}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[{"type": "function", "function": function}], max_tokens=2)
    assert caught.value.param == "tools"


def test_plain_chat_tells_reasoning_apart(client: OpenAI) -> None:
    request = {
        "message": "hello", "seed": 5, "max_tokens": 60, "n": 2,
        "guided_regex": "<think>\n[a-c]{5}\n</think>\n\n[x-z]{4}",
    }  # fmt: skip
    whole = client.post("/../chat", body=request, cast_to=object)
    assert re.fullmatch("[x-z]{4}", whole["text"])
    assert re.fullmatch("[a-c]{5}", whole["reasoning"])
    assert [set(choice) for choice in whole["choices"]] == [{"text", "reasoning", "finish_reason"}] * 2
    streamed = [{"text": "", "reasoning": "", "finish_reason": None} for _ in range(2)]
    text = client.post("/../chat", body={**request, "stream": True}, cast_to=str)
    for line in text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "usage" not in event:
                choice = streamed[event.get("index", 0)]
                choice["finish_reason"] = event.get("finish_reason") or choice["finish_reason"]
                for name in ("text", "reasoning"):
                    choice[name] += event.get(name, "")
    assert streamed == whole["choices"]


def test_without_tools_a_call_is_text(client: OpenAI) -> None:
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = chat(client, **extra, extra_body={"guided_regex": SAYS_AND_CALLS}).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content.count("<tool_call>") == 2
        assert answer.finish_reason == "stop"


def test_a_call_can_be_required(client: OpenAI) -> None:
    request = {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    whole = chat(client, **request).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "count"
    assert set(json.loads(call.function.arguments)) == {"a"}
    assert whole.message.content is None
    assert whole.finish_reason == "tool_calls"
    assert joined(chat(client, **request, stream=True))["calls"] == [["count", call.function.arguments]]


def test_a_function_can_be_named(client: OpenAI) -> None:
    request = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "count"}}, "seed": 4}
    whole = chat(client, **request).choices[0]
    (call,) = whole.message.tool_calls
    assert json.loads(call.function.arguments)["a"] in (1, 2, 3)
    assert whole.finish_reason == "stop"  # as OpenAI's
    streamed = joined(chat(client, **request, stream=True))
    assert streamed["calls"] == [["count", call.function.arguments]]


def test_a_call_that_is_cut_off_is_not_lost(client: OpenAI) -> None:
    answer = chat(client, tools=TOOLS, max_tokens=72, extra_body={"guided_regex": SAYS_AND_CALLS}).choices[0]
    assert answer.finish_reason == "length"
    (call,) = answer.message.tool_calls
    assert call.function.arguments == '{"a"'


def test_tools_and_their_results_are_in_the_prompt(client: OpenAI) -> None:
    count = {"max_tokens": 1, "tools": TOOLS[1:]}
    plain = chat(client, max_tokens=1).usage.prompt_tokens
    with_tools = chat(client, **count).usage.prompt_tokens
    assert with_tools > plain + 50
    turns = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    used = chat(client, messages=turns, **count).usage.prompt_tokens
    assert used == with_tools + len("#assistant\nstop{}#\n") + len("#tool\ndone#\n")


def test_the_prompt_may_begin_the_reasoning(client: OpenAI) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = chat(client, max_tokens=8, extra_body={**thinking, "ignore_eos": True}).choices[0].message
    assert message.content == ""
    assert message.reasoning_content
    # What a grammar forces is the answer, though the prompt has begun the reasoning.
    forced = chat(client, extra_body={**thinking, "guided_choice": ["yes", "no"]}).choices[0].message
    assert forced.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="no setting 'enable_dreaming'"):
        chat(client, extra_body={"chat_template_kwargs": {"enable_dreaming": True}})
    with pytest.raises(openai.BadRequestError, match="no setting 'tokenize'"):
        chat(client, extra_body={"chat_template_kwargs": {"tokenize": True}})
    with pytest.raises(openai.BadRequestError, match="a late system message"):
        chat(client, messages=[*HELLO, {"role": "system", "content": "x"}])


def test_forms_of_answers(client: OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "digit", "schema": DIGIT, "strict": True}}
    text = chat(client, response_format=schema).choices[0].message.content
    assert json.loads(text)["a"] in (1, 2, 3)

    def complete(**extra: Any) -> str:
        answer = client.completions.create(model=MODEL, prompt="x", max_tokens=60, extra_body=extra)
        return answer.choices[0].text

    assert json.loads(complete(guided_json=DIGIT))["a"] in (1, 2, 3)
    assert re.fullmatch("[0-9]{3}", complete(guided_regex="[0-9]{3}"))
    assert complete(guided_choice=["left", "right"]) in ("left", "right")
    assert complete(guided_grammar='start: "a" | "bc"') in ("a", "bc")
    assert complete(structured_outputs={"choice": ["up"]}) == "up"
    for wrong in ({"guided_regex": "("}, {"guided_json": "{"}, {"guided_grammar": "start: nowhere"}):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(**wrong)
        assert caught.value.param == next(iter(wrong))


def test_echo_with_logprobs_and_prompt_logprobs(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "abc", "max_tokens": 2, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**request, echo=True).choices[0]
    assert whole.logprobs.tokens[:3] == ["a", "b", "c"]
    assert whole.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in whole.logprobs.token_logprobs[1:])
    assert whole.logprobs.text_offset[:3] == [0, 1, 2]
    streamed = [c.choices[0] for c in client.completions.create(**request, echo=True, stream=True)]
    assert "".join(choice.text for choice in streamed) == whole.text
    assert [t for choice in streamed for t in choice.logprobs.token_logprobs] == whole.logprobs.token_logprobs
    answer = client.completions.create(**request, extra_body={"prompt_logprobs": 1}).choices[0]
    first, *rest = answer.prompt_logprobs
    assert first is None
    table = [next(iter(entry.values())) for entry in rest]
    assert [entry["decoded_token"] for entry in table] == ["b", "c"]
    assert [entry["logprob"] for entry in table] == whole.logprobs.token_logprobs[1:3]


def test_best_of(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "abc", "max_tokens": 6, "temperature": 1.5, "seed": 1, "logprobs": 0}
    every = client.completions.create(**request, n=4, extra_body={"ignore_eos": True}).choices
    best = client.completions.create(**request, n=1, best_of=4, extra_body={"ignore_eos": True}).choices
    mean = {choice.text: sum(choice.logprobs.token_logprobs) / 6 for choice in every}
    assert [choice.text for choice in best] == [max(mean, key=lambda text: mean[text])]


def test_tokens(client: OpenAI) -> None:
    def post(path: str, **body: Any) -> Any:
        return client.post(f"/../{path}", body=body, cast_to=object)

    assert post("tokenize", prompt="ab", return_token_strs=True) == {
        "count": 2, "max_model_len": 1024, "tokens": [64, 65], "token_strs": ["a", "b"],
    }  # fmt: skip
    ids = post("tokenize", model=MODEL, messages=HELLO)["tokens"]
    assert len(ids) == chat(client, max_tokens=1).usage.prompt_tokens
    assert post("detokenize", tokens=ids)["prompt"].startswith("<|im_start|>user\nhello")
    for wrong in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": "a", "tools": TOOLS}, {"prompt": 3}):
        with pytest.raises(openai.BadRequestError):
            post("tokenize", **wrong)
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        post("detokenize", tokens=[10**6])


def test_embeddings(client: OpenAI) -> None:
    def embed(value: Any, **extra: Any) -> Any:
        return client.embeddings.create(model=MODEL, input=value, **extra)

    both = embed(["one", "two!"], encoding_format="float")
    assert [entry.index for entry in both.data] == [0, 1]
    assert both.usage.prompt_tokens == both.usage.total_tokens == 7
    one, two = (entry.embedding for entry in both.data)
    assert len(one) == len(two) == 64
    assert sum(value * value for value in one) == pytest.approx(1.0, abs=1e-4)
    assert one != two
    # OpenAI's client asks for base64 by itself, and decodes it.
    assert embed("one").data[0].embedding == pytest.approx(one, abs=1e-6)
    raw = embed("one", encoding_format="base64").data[0].embedding
    assert struct.unpack("<64f", base64.b64decode(raw)) == pytest.approx(one, abs=1e-6)
    ids = client.post("/../tokenize", body={"prompt": "one"}, cast_to=object)["tokens"]
    assert embed(ids, encoding_format="float").data[0].embedding == pytest.approx(one, abs=1e-6)
    assert len(embed([ids, ids], encoding_format="float").data) == 2
    assert len(embed("one", dimensions=64, encoding_format="float").data[0].embedding) == 64
    for value, extra, param in (
        ("one", {"dimensions": 8}, "dimensions"),
        ("", {}, "input"),
        ([], {}, "input"),
        ("x" * 1100, {}, "input"),
        ([1, 10**6], {}, "input"),
        ("one", {"extra_body": {"pooling": "max"}}, "pooling"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            embed(value, **extra)
        assert caught.value.param == param


def test_fields_that_order_and_separate(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": "a" * 100, "max_tokens": 2, "temperature": 0}

    def cached(**extra: Any) -> int:
        answer = client.completions.create(**request, user="me", extra_body=extra)
        return answer.usage.prompt_tokens_details.cached_tokens

    cached(cache_salt="mine", priority=-1)
    assert cached(cache_salt="mine", priority=3) > 0
    assert cached(cache_salt="another") == 0
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        cached(cache_salt="")


def test_adapters_are_models(client: OpenAI, server: ServerProcess) -> None:
    def complete(model: str) -> str:
        answer = client.completions.create(
            model=model, prompt="abc", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        base, _, name = answer.model.partition(":")
        assert base == f"{MODEL}@unregistered"
        assert name in ("", *ADAPTERS)
        return f"{name}: {answer.choices[0].text!r}"

    def post(path: str, **body: Any) -> Any:
        return client.post(path, body=body, cast_to=object)

    assert server.facts["models"][0]["adapters"] == ["first"]
    path = client.models.retrieve("first").root
    second = str(Path(path).with_name("second"))
    plain, first = complete(MODEL), complete("first")
    assert first.startswith("first: ")
    assert first.split(": ")[1] != plain.split(": ")[1]
    assert complete(f"{MODEL}:first") == first
    with pytest.raises(openai.NotFoundError):
        complete("second")
    post("/load_lora_adapter", lora_name="second", lora_path=second)
    assert len({text.split(": ")[1] for text in (plain, first, complete("second"))}) == 3
    parents = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert parents == {MODEL: None, "first": MODEL, "second": MODEL}
    post("/unload_lora_adapter", lora_name="second")
    with pytest.raises(openai.NotFoundError):
        complete("second")
    assert (complete(MODEL), complete("first")) == (plain, first)
    for name, where, param in (
        ("first", second, "lora_name"),
        ("a=b", second, "lora_name"),  # could not be told from its path when it is loaded again
        ("a?", second, "lora_name"),
        ("x", second + "/no", "lora_path"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            post("/load_lora_adapter", lora_name=name, lora_path=where)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        post("/unload_lora_adapter", lora_name="second")
    with pytest.raises(openai.BadRequestError, match="with an adapter"):
        client.embeddings.create(model="first", input="x")
