"""The plain endpoints and those of the operator, on a real server."""

from __future__ import annotations

import json

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hearth.serving import ServerProcess
from hearth.telemetry import names

MODEL = "tiny-chat"


@pytest.fixture
async def session(server: ServerProcess):
    async with aiohttp.ClientSession(server.base_url, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def test_generate(session: aiohttp.ClientSession) -> None:
    request = {"prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    async with session.post("/generate", json=request, headers={"x-request-id": "r-7"}) as response:
        body = await response.json()
        assert response.status == 200
        assert response.headers["x-request-id"] == "r-7"
        assert response.headers["x-hearth-model"] == f"{MODEL}@unregistered"
    assert body["usage"]["completion_tokens"] == 5
    assert body["finish_reason"] == "length"
    async with session.post("/generate", json={**request, "stream": True}) as response:
        text = (await response.read()).decode()
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    parsed = list(map(json.loads, events))
    assert "".join(event.get("text", "") for event in parsed) == body["text"]
    assert parsed[-1]["usage"] == {
        **body["usage"],
        "prompt_tokens_details": parsed[-1]["usage"]["prompt_tokens_details"],
    }


async def test_the_three_forms_of_chat_agree(session: aiohttp.ClientSession) -> None:
    common = {"max_tokens": 6, "temperature": 0}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    forms = [
        {"messages": turns},
        {"message": "three", "system": "Be brief.", "history": turns[1:3]},
    ]
    texts = []
    for form in forms:
        async with session.post("/chat", json={**form, **common}) as response:
            assert response.status == 200
            texts.append((await response.json())["text"])
    async with session.post("/v1/chat/completions", json={"messages": turns, **common}) as response:
        texts.append((await response.json())["choices"][0]["message"]["content"])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {}, "prompt"),
        ("/generate", {"prompt": []}, "prompt"),
        ("/generate", {"prompt": 5}, "prompt"),
        ("/generate", {"prompt": "x", "message": "y"}, "message"),
        ("/chat", {}, "message"),
        ("/chat", {"message": "x", "messages": []}, "message"),
        ("/chat", {"messages": [{"role": "user", "content": "x"}], "system": "y"}, "system"),
        ("/chat", {"message": "x", "history": [{"role": "robot", "content": "y"}]}, "history[0].role"),
    ],
)
async def test_bad_plain_requests(session: aiohttp.ClientSession, path: str, body: dict, param: str) -> None:
    async with session.post(path, json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, param)


async def test_what_the_operator_sees(session: aiohttp.ClientSession) -> None:
    async with session.post(
        "/generate", json={"prompt": "abc", "max_tokens": 3, "ignore_eos": True}
    ) as response:
        assert response.status == 200
    pages = {}
    for path in ("/models", "/stats", "/health", "/livez", "/readyz"):
        async with session.get(path) as response:
            assert response.status == 200, path
            pages[path] = await response.json()
    (model,) = pages["/models"]["models"]
    assert (model["name"], model["state"], model["max_model_len"]) == (MODEL, "ready", 256)
    stats = pages["/stats"]["models"][MODEL]
    assert (stats["state"], stats["worker"]["status"], stats["in_flight"]) == ("ready", "ok", 0)
    engine = stats["worker"]["engine"]
    assert (
        engine["num_free_blocks"] + engine["num_cached_blocks"] + engine["num_used_blocks"]
        == engine["num_blocks"]
    )
    async with session.get("/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    found = {family.name for family in families}
    assert {name for name in names.metric_names() if name.startswith("hearth_engine_")} <= found
    assert len(found) == len(families)
    tokens = next(family for family in families if family.name == names.ENGINE_GENERATION_TOKENS)
    assert tokens.samples[0].value >= 3
    (info,) = next(family for family in families if family.name == names.ENGINE_INFO).samples
    assert (info.labels["dtype"], info.labels["weights"], info.labels["kv_dtype"]) == (
        *(model["info"]["dtype"], "auto", "auto"),
    )


async def test_what_the_engine_counts_moves_with_the_work(session: aiohttp.ClientSession) -> None:
    async def values() -> dict[str, float]:
        async with session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            return {sample.name: sample.value for family in families for sample in family.samples}

    before = await values()
    prompt = {"prompt": "the same beginning, " * 5, "max_tokens": 4, "ignore_eos": True}
    for path, body in (
        ("/generate", prompt), ("/generate", prompt), ("/v1/embeddings", {"input": ["a", "bc"]})
    ):  # fmt: skip
        async with session.post(path, json=body) as response:
            assert response.status == 200, await response.text()
    after = await values()

    def gained(name: str) -> float:
        return after[name + "_total"] - before[name + "_total"]

    assert gained(names.ENGINE_EMBEDDINGS) == 2
    assert gained(names.ENGINE_PROMPT_TOKENS) == 2 * 100 + 3
    assert gained(names.ENGINE_STEPS) >= 8
    assert gained(names.ENGINE_PREFIX_QUERIES) >= gained(names.ENGINE_PREFIX_HITS) > 0
    assert gained(names.ENGINE_FAILED_STEPS) == 0
