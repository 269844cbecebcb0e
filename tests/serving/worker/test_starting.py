"""What is settled when the engine has loaded: the formats of answers, and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from hearth.engine.parsing import Style
from hearth.errors import ConfigError, ModelError
from hearth.models import load_tokenizer
from hearth.serving.worker.starting import load_adapters, style_of


class Engine:
    """Loads what is not called gone."""

    async def load_adapter(self, name: str, path: str) -> None:
        if path == "gone":
            raise ModelError(f"no adapter at {path}")

    async def unload_adapter(self, name: str) -> None:
        raise NotImplementedError


def test_formats_come_from_the_template_or_from_the_operator(tiny_chat: Path, tiny_base: Path) -> None:
    chat, base = load_tokenizer(tiny_chat), load_tokenizer(tiny_base)
    assert style_of(chat, "auto", "auto") == Style(tools="hermes", reasoning="think")
    assert style_of(base, "auto", "auto") == Style()
    assert style_of(chat, "none", "none") == Style()
    assert style_of(chat, "mistral", "auto") == Style(tools="mistral", reasoning="think")
    with pytest.raises(ConfigError, match="no format of tools 'yaml'"):
        style_of(chat, "yaml", "auto")


async def test_adapters_given_at_the_start() -> None:
    assert await load_adapters(Engine(), ["a=x", "b=/y=z"], ["m"]) == {"a": "x", "b": "/y=z"}
    with pytest.raises(ModelError, match="no adapter at gone"):
        await load_adapters(Engine(), ["a=gone"], ["m"])
    assert await load_adapters(Engine(), ["a?=gone", "b?=x"], ["m"]) == {"b": "x"}
    for wrong in (["a"], ["a="], ["=x"], ["m=x"], ["a=x", "a=y"], ["a:b=x"], ["a?b=x"]):
        with pytest.raises(ConfigError, match="adapter"):
            await load_adapters(Engine(), wrong, ["m"])
