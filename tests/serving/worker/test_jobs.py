"""From bodies to jobs: what a request's tools and the model's formats make of the sampling parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hearth.engine.parsing import Style
from hearth.models import load_tokenizer
from hearth.serving.http import HttpError
from hearth.serving.worker.adapters import Adapters
from hearth.serving.worker.jobs import JobMaker, ServedModel
from hearth.serving.worker.prompts import PromptMaker

TOOLS = [{"type": "function", "function": {"name": "now"}}]


class NoEngine:
    """Adapters are never loaded here."""

    async def load_adapter(self, name: str, path: str) -> None:
        raise NotImplementedError

    async def unload_adapter(self, name: str) -> None:
        raise NotImplementedError


def maker(path: Path, style: Style, *, special: str | None = None) -> JobMaker:
    tokenizer = load_tokenizer(path)
    if special is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    model = ServedModel("m", "m@1", ("m", "m@1"), path, 4096, style=style)
    return JobMaker(model, PromptMaker(tokenizer, "m@1"), Adapters(NoEngine(), ("m", "m@1"), {"kind": "x"}))


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


async def test_special_tokens_are_shown_where_markers_are_special(tiny_chat: Path) -> None:
    style = Style(tools="mistral")
    plain, hidden = maker(tiny_chat, style), maker(tiny_chat, style, special="[TOOL_CALLS]")
    assert (await plain.chat(body(tools=TOOLS))).params.skip_special_tokens
    assert not (await hidden.chat(body(tools=TOOLS))).params.skip_special_tokens
    assert (await hidden.chat(body())).params.skip_special_tokens  # nothing is parsed
    assert (await hidden.chat(body(tools=TOOLS, tool_choice="required"))).params.skip_special_tokens
    assert (await hidden.chat(body(tools=TOOLS, skip_special_tokens=True))).params.skip_special_tokens


async def test_tools_need_a_template_and_a_format_that_know_them(tiny_chat: Path) -> None:
    with pytest.raises(HttpError, match="knows no tools") as caught:
        await maker(tiny_chat, Style()).chat(body(tools=TOOLS))
    assert caught.value.param == "tools"
    job = await maker(tiny_chat, Style()).chat(body(tools=TOOLS, tool_choice="required"))
    assert job.params.guided is not None
    with pytest.raises(HttpError, match="both asked for"):
        await maker(tiny_chat, Style()).chat(
            body(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
        )


async def test_an_adapter_is_named_by_the_model(tiny_chat: Path) -> None:
    make = maker(tiny_chat, Style())
    for model, adapter, version in (
        (None, None, "m@1"),
        ("m", None, "m@1"),
        ("kind", "kind", "m@1:kind"),
        ("m:kind", "kind", "m@1:kind"),
        ("m@1:kind", "kind", "m@1:kind"),
    ):
        job = await make.chat(body(model=model))
        assert (job.params.adapter, job.version) == (adapter, version)
    for model in ("other", "other:kind", "m:", ":kind"):
        with pytest.raises(HttpError) as caught:
            await make.chat(body(model=model))
        assert caught.value.status == 404


async def test_what_cannot_be_streamed(tiny_chat: Path) -> None:
    make = maker(tiny_chat, Style())
    for fields, param in (
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "echo": True, "logprobs": 1}, "n"),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 2}, "prompt_logprobs"),
    ):
        with pytest.raises(HttpError) as caught:
            await make.completion(json.dumps({"prompt": "x", "stream": True, **fields}).encode())
        assert caught.value.param == param
