"""Open a Hugging Face model directory, and say exactly what is wrong with one that does not open."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from hearth.errors import ModelError, UnsupportedModelError

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors format

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
# By their names in the safetensors format, https://github.com/huggingface/safetensors (README, "Format").
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; Hearth says what matters itself."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype for its name; None for "auto", which keeps the type of the file."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown", fix=f"use auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist", fix="give a complete Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def check_model_directory(path: Path | str) -> Path:
    """The directory, once it exists and has a config.json; otherwise a ModelError says what is missing."""
    directory = Path(path)
    if not directory.exists():
        raise ModelError(
            f"no model directory at {directory}",
            fix="check the path, or see `hearth models list`; a model of the Hugging Face hub is hf:org/name",
        )
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file, not a model directory", fix="give the directory around it")
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"{directory} holds an adapter, not a model", fix="give the model that it was merged into"
            )
        raise ModelError(f"{directory} has no config.json", fix="give a Hugging Face model directory")
    return directory


def load_config(path: Path | str) -> PreTrainedConfig:
    """The configuration of a model directory; refuses architectures that transformers does not have."""
    directory = check_model_directory(path)
    raw = read_json(directory / "config.json")
    model_type = raw.get("model_type")
    if model_type is None:
        raise ModelError(f"{directory / 'config.json'} has no model_type")
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{directory} needs Python code of its own ({model_type!r}), which Hearth does not run",
                fix="use a model whose architecture is part of transformers",
            ) from error
        raise UnsupportedModelError(
            f"{directory}: transformers cannot read the configuration of model_type {model_type!r}: {error}",
            fix="use an architecture that the installed transformers knows, or upgrade it",
        ) from error


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Tensor name → dtype, shape and offsets; checks that the file holds every byte that it promises."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ModelError(f"{path} is no safetensors file (size {actual} bytes)", fix="fetch it again")
        raw = file.read(length)
    if len(raw) < length:
        raise ModelError(
            f"{path} is truncated: its header takes {length + 8} bytes, the file has {actual}",
            fix="fetch the file again",
        )
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged header: {error}", fix="fetch the file again") from error
    expected = 8 + length + end
    if actual != expected:
        what = "truncated" if actual < expected else "longer than its header says"
        raise ModelError(
            f"{path} is {what}: expected {expected} bytes, found {actual}", fix="fetch the file again"
        )
    return header


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, each verified to exist. Empty if it uses another format."""
    index = directory / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map")
        files = sorted({directory / str(name) for name in weight_map.values()})
        for file in files:
            if not file.is_file():
                raise ModelError(
                    f"shard {file} is missing ({len(files)} shards in {index.name})", fix="fetch the shard"
                )
        return files
    return [directory / _WEIGHTS] if (directory / _WEIGHTS).is_file() else []


def load_model(
    path: Path | str, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal language model in evaluation mode, every weight of it from the files.

    ``dtype``: "auto" keeps the type of the file. Raises ``ModelError`` for a directory that is absent or
    incomplete, a shard that is missing or truncated, weights that do not cover the model, and
    ``UnsupportedModelError`` for an architecture that transformers cannot build as a causal language model.
    """
    directory = check_model_directory(path)
    config = load_config(directory)
    _require_language_model(directory, config)
    torch_dtype = resolve_dtype(dtype)
    files = weight_files(directory)
    for file in files:
        read_safetensors_header(file)
    if not files and not list(directory.glob("pytorch_model*.bin*")):
        raise ModelError(
            f"{directory} has no weights: neither {_WEIGHTS} nor {_INDEX}", fix="fetch the whole directory"
        )
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype="auto" if torch_dtype is None else torch_dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by _check_coverage, with names
            )
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{directory} cannot be loaded: {error}") from error
    except (ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{directory} ({config.model_type}) cannot be opened: {error}") from error
    _check_coverage(directory, config, report)
    return cast(PreTrainedModel, model.to(device).eval())


def _require_language_model(directory: Path, config: PreTrainedConfig) -> None:
    """A reward model with tied embeddings would open, and write what it never learnt to write."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    if names and all(name.endswith("ForSequenceClassification") for name in names):
        raise UnsupportedModelError(
            f"{directory} is a {names[0]}: it scores texts and writes none",
            fix="name a language model; in train.reinforce.rewards a reward model is given as `model:`",
        )


def _check_coverage(directory: Path, config: PreTrainedConfig, report: dict[str, Any]) -> None:
    """Weights that transformers would silently initialise at random are an error here."""
    for kind, verb in (("missing_keys", "are not in the files"), ("mismatched_keys", "have another shape")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report.get(kind, ()))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{directory}: {len(names)} weights of the {config.model_type} model {verb}: {shown}",
                fix="the weights and config.json must belong together",
            )
    if report.get("error_msgs"):
        raise ModelError(f"{directory} cannot be loaded: {'; '.join(map(str, report['error_msgs']))}")


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model or tokenizer directory. Raises ``ModelError`` when there is none."""
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"no model directory at {directory}", fix="check the path, or see `hearth models list`"
        )
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{directory} has no tokenizer (tokenizer.json)",
            fix="copy tokenizer.json and tokenizer_config.json of the model into the directory",
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    # The Rust tokenizer reports damage as a bare Exception, so nothing narrower catches it.
    except Exception as error:
        raise ModelError(f"the tokenizer in {directory} cannot be opened: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"the tokenizer in {directory} ({type(tokenizer).__name__}) has no fast form",
            fix="convert it to tokenizer.json",
        )
    return cast(PreTrainedTokenizerFast, tokenizer)
