"""A LoRA adapter from a directory in PEFT's format, checked against the model that it shall change.

Legend: N outputs and K inputs of a linear layer, R rank of the adapter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hearth.errors import ModelError
from hearth.models.loading import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Ways of PEFT that change more than x -> x + scale * B A x.
_UNSUPPORTED = ("use_dora", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices")
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of linear layers, by the layers' names: out += (x A^T) B^T, the scale within B."""

    name: str
    path: Path
    digest: bytes  # of the content: cached keys and values belong to it
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]  # A [R, K] and B [N, R], float32

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())


def read_adapter(name: str, path: Path | str, linears: Mapping[str, nn.Module]) -> Adapter:
    """The adapter in ``path``, for a model with these linear layers.

    Raises `ModelError` if it is absent, damaged, of a kind that the engine cannot apply, or made for another
    model.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"adapter {name!r}: no directory at {directory}", fix="check the path")
    config = read_json(directory / _CONFIG)
    _check_config(name, config)
    file = directory / _WEIGHTS
    if not file.is_file():
        raise ModelError(f"adapter {name!r}: {file} does not exist", fix="save the adapter as safetensors")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"adapter {name!r}: {file} cannot be read: {error}", fix="copy it anew") from error
    weights = {}
    for module, (a, b) in sorted(_pairs(name, tensors).items()):
        _check_shapes(name, module, a, b, linears)
        weights[module] = (a.float().contiguous(), (b.float() * _scale(config, module, len(a))).contiguous())
    if not weights:
        raise ModelError(f"adapter {name!r}: {file} holds no LoRA weights")
    digest = hashlib.blake2b(digest_size=16)
    for module, (a, b) in weights.items():
        digest.update(module.encode())
        digest.update(a.numpy().tobytes())
        digest.update(b.numpy().tobytes())
    return Adapter(name, directory, digest.digest(), weights)


def _check_config(name: str, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"adapter {name!r} is of type {config.get('peft_type')!r}; the engine applies LORA",
            fix="merge it into the model: `hearth train` does, and so does PEFT's merge_and_unload",
        )
    for field in _UNSUPPORTED:
        if config.get(field):
            raise ModelError(
                f"adapter {name!r} has {field} {config[field]!r}, which cannot be applied to some requests",
                fix="merge the adapter into the model and serve that",
            )
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"adapter {name!r} trains biases (bias {config['bias']!r}), which are shared by all requests",
            fix="merge the adapter into the model and serve that",
        )


def _pairs(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ModelError(
                f"adapter {name!r} has the tensor {key!r}, which is no LoRA weight of a linear layer",
                fix="merge the adapter into the model and serve that",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(
                f"adapter {name!r}: {module} has lora_{next(iter(pair))} only", fix="copy it anew"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_shapes(
    name: str, module: str, a: torch.Tensor, b: torch.Tensor, linears: Mapping[str, nn.Module]
) -> None:
    linear = linears.get(module)
    if linear is None:
        raise ModelError(
            f"adapter {name!r} changes {module}, and the model has no linear layer of that name",
            fix="use the model that the adapter was trained on",
        )
    outputs, inputs = num_features(linear)
    wanted = ((len(a), inputs), (outputs, len(a)))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise ModelError(
            f"adapter {name!r}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, the model's layer "
            f"takes {inputs} inputs to {outputs} outputs",
            fix="use the model that the adapter was trained on",
        )


def num_features(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, packed or not, or of a Conv1D."""
    if hasattr(linear, "out_features"):
        return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1], weight.shape[0]


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of this layer (LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732)."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
