"""What a model will take, compared with real files and with what the engine makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hearth.config import ServedModel
from hearth.serving.gateway import memory
from hearth.serving.gateway.memory import PROCESS_BYTES, claim, kv_bytes, weight_bytes
from hearth.serving.http import HttpError
from hearth.serving.resolve import Resolved


def model(path: Path, dtype: str = "bfloat16", num_params: int = 1000, **config: object) -> Path:
    size = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
    values = {
        "dtype": dtype, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "hidden_size": 64, **config,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values))
    (path / "model.safetensors").write_bytes(bytes(num_params * size))
    return path


@pytest.mark.parametrize(
    ("stored", "settings", "each"),
    [
        ("bfloat16", {}, 2),
        ("bfloat16", {"dtype": "float32"}, 4),
        ("float32", {"dtype": "bfloat16"}, 2),
        ("float16", {}, 4),  # a CPU computes it in float32
        ("bfloat16", {"weights": "int8"}, 1),
        ("float32", {"weights": "int4"}, 0.5),
    ],
)
def test_weights_count_as_they_will_be_held(tmp_path: Path, stored: str, settings: dict, each: float) -> None:
    path = model(tmp_path, stored)
    assert weight_bytes(path, ServedModel(model="x", **settings)) == 1000 * each


def test_the_smallest_cache(tmp_path: Path) -> None:
    path = model(tmp_path)
    per_token = 2 * 3 * 2 * 8  # keys and values, layers, heads, the size of one
    assert kv_bytes(path, ServedModel(model="x", max_model_len=100)) == per_token * 2 * 100
    assert kv_bytes(path, ServedModel(model="x", max_model_len=100, kv_dtype="int8")) == per_token * 100
    assert kv_bytes(path, ServedModel(model="x", kv_cache_memory=12345)) == 12345
    assert kv_bytes(path, ServedModel(model="x")) == per_token * 2 * 32  # a block of the engine
    nested = model(tmp_path, text_config={"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 4})
    assert kv_bytes(nested, ServedModel(model="x", max_model_len=10)) == 2 * 4 * 2 * 10


def test_what_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    entry = ServedModel(model="x")
    assert (weight_bytes(tmp_path, entry), kv_bytes(tmp_path, entry)) == (0, 0)
    (tmp_path / "config.json").write_text("[1, 2")
    assert kv_bytes(tmp_path, entry) == 0
    (tmp_path / "config.json").write_text('{"hidden_size": "many", "num_hidden_layers": null}')
    assert kv_bytes(tmp_path, entry) == 0


def test_a_model_that_does_not_fit_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_DEVICES", ())
    monkeypatch.setattr(memory, "available_host_memory", lambda: 4 << 30)
    resolved = Resolved("m", "m@1", (), model(tmp_path), ServedModel(model="m", kv_cache_memory=2 << 30))
    assert claim(resolved, 0) == pytest.approx(PROCESS_BYTES + (2 << 30), rel=1e-3)
    with pytest.raises(HttpError, match=r"m@1 takes at least 2\.59 GiB .* 4\.00 GiB are available") as caught:
        claim(resolved, 2 << 30)  # for what loads at the same time
    assert (caught.value.status, caught.value.code) == (409, "insufficient_memory")
    assert "2.00 GiB are claimed" in caught.value.message


def test_a_model_for_an_accelerator_claims_none_of_this_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: 0)
    path = model(tmp_path)

    def of(device: str | None) -> int:
        return claim(Resolved("m", "m@1", (), path, ServedModel(model="m", device=device)), 0)

    assert of("cuda:0") == 0
    with pytest.raises(HttpError):
        of("cpu")
    monkeypatch.setattr(memory, "_DEVICES", (path,))
    assert of(None) == of("auto") == 0
    monkeypatch.setattr(memory, "_DEVICES", (path / "absent",))
    with pytest.raises(HttpError):
        of("auto")
