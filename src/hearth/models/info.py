"""Facts about a model directory, read from its headers without loading a weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hearth.models.loading import SAFETENSORS_DTYPES, load_config, read_safetensors_header, weight_files


@dataclass(frozen=True)
class ModelInfo:
    """What a model directory holds."""

    path: str
    architecture: str
    model_type: str
    num_parameters: int | None  # None when the weights are not safetensors
    dtype: str
    context_length: int | None
    vocab_size: int | None
    bytes: int
    has_tokenizer: bool
    has_chat_template: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def model_info(path: Path | str) -> ModelInfo:
    """Architecture, parameters (as stored, tied ones once), type and context length of a directory.

    Raises ``ModelError`` for a directory that is absent or whose files are damaged.
    """
    directory = Path(path)
    config = load_config(directory)
    text = config.get_text_config()
    entries = [entry for file in weight_files(directory) for entry in read_safetensors_header(file).values()]
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + math.prod(entry["shape"])
    stored = max(sizes, key=lambda name: sizes[name]) if sizes else ""
    dtype = SAFETENSORS_DTYPES.get(stored, stored.lower() or getattr(config, "dtype", "unknown"))
    architectures = getattr(config, "architectures", None) or [config.model_type]
    return ModelInfo(
        path=str(directory),
        architecture=str(architectures[0]),
        model_type=config.model_type,
        num_parameters=sum(sizes.values()) or None,
        dtype=str(dtype).removeprefix("torch."),
        context_length=getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None),
        vocab_size=getattr(text, "vocab_size", None),
        bytes=sum(file.stat().st_size for file in weight_files(directory)),
        has_tokenizer=(directory / "tokenizer.json").is_file(),
        has_chat_template=(directory / "chat_template.jinja").is_file(),
    )
