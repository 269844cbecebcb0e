"""Whether a model fits into the memory that is left, before a process is started for it.

An estimate from below, without loading torch: the bytes of the weights as they will be held, the smallest
key-value cache, and the processes themselves. What is refused here could not have run; the engine, which
sizes its cache by what it finds, has the last word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hearth.config import ServedModel
from hearth.engine.config import EngineConfig
from hearth.serving.http import HttpError
from hearth.serving.resolve import Resolved
from hearth.telemetry.hardware import available_host_memory

PROCESS_BYTES = 600 << 20  # worker and engine with torch, before any weight (measured: 619 MiB)
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_WEIGHT_BYTES = {"int8": 1.0, "int4": 0.5}
_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def claim(model: Resolved, claimed: int) -> int:
    """Bytes that ``model`` will take; HttpError 409 if they are not free beside ``claimed`` bytes.

    A model for an accelerator claims nothing: its weights only pass through this machine's memory.
    """
    if _on_accelerator(model.entry.device):
        return 0
    needed = PROCESS_BYTES + weight_bytes(model.path, model.entry) + kv_bytes(model.path, model.entry)
    free = available_host_memory()
    if needed + claimed > free:
        beside = f", and {_gib(claimed)} are claimed by models that load now" if claimed else ""
        raise HttpError(
            409, f"{model.version} takes at least {_gib(needed)} of memory; {_gib(free)} are available"
            f"{beside}: unload a model first",
            code="insufficient_memory",
        )  # fmt: skip
    return needed


def _on_accelerator(device: str | None) -> bool:
    if device in (None, "auto"):
        return any(path.exists() for path in _DEVICES)
    assert device is not None
    return not device.startswith("cpu")


def weight_bytes(path: Path, entry: ServedModel) -> int:
    """Bytes of the weights in memory: those of the files, in the dtype or compression asked for."""
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    stored = sum(file.stat().st_size for file in files)
    config = _config(path)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    each = _DTYPE_BYTES.get(dtype)
    if each is None or config.get("quantization_config"):
        return stored  # in a form of its own, which is kept
    held = _DTYPE_BYTES.get(entry.dtype, 4.0 if dtype == "float16" else each)  # a CPU takes no float16
    return int(stored / each * _WEIGHT_BYTES.get(entry.weights, held))


def kv_bytes(path: Path, entry: ServedModel) -> int:
    """Bytes of the smallest key-value cache that its settings allow: one sequence."""
    if entry.kv_cache_memory is not None:
        return entry.kv_cache_memory
    config = _config(path)
    text = config.get("text_config") or config
    try:
        heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
        size = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
        per_token = 2 * int(text["num_hidden_layers"]) * heads * size
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0  # an architecture of other words
    each = 1 if entry.kv_dtype != "auto" else 2
    return per_token * each * (entry.max_model_len or EngineConfig.block_size)


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
