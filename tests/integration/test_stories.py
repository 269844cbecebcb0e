"""A real pretrained model, offline: imported from llama2.c files, gated, promoted, served, known by heart."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hearth.serving import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Greedy text from BOS alone: 256 tokens, as the model's own card prints it.
GOLDEN_SHA256 = "30b2ffb07967"


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        assert response.headers["x-hearth-model"] == "stories@1"
        return json.load(response)


def test_stories_from_file_to_endpoint(shell: Any, shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    shell.run(
        *("models", "import", str(folder / "stories260K.bin")),
        *("--tokenizer", str(folder / "tok512.bin"), "--name", "stories"),
    )
    shell.run("models", "promote", "stories@1", "production", code=1)
    assert shell.json("parity", "stories@1", "--tokens", "24")["passed"] is True
    shell.run("models", "promote", "stories@1", "production")
    with ServerProcess.start(models=["stories@production"], workspace_dir=shell.home) as server:
        answer = post(
            f"{server.base_url}/v1/completions", {"prompt": [1], "max_tokens": 256, "temperature": 0}
        )
        text = answer["choices"][0]["text"]
        assert hashlib.sha256(text.encode()).hexdigest().startswith(GOLDEN_SHA256), text
        # The same through the plain endpoint, from a text prompt: the tokenizer adds BOS by itself.
        plain = post(f"{server.base_url}/generate", {"prompt": "Once", "max_tokens": 30, "temperature": 0})
        assert text.startswith(f"Once{plain['text']}")
