"""Write a model as a plain Hugging Face directory, all of it or nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hearth.errors import StorageError
from hearth.models.loading import quiet_transformers
from hearth.models.pieces import as_in_files

MAX_FILE_BYTES = 5_000_000_000
# End-of-turn tokens of the common chat formats; one counts only if the template itself writes it.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|return|>", "</s>")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the end of a turn in the chat template, then the tokenizer's own eos."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else " ".join((template or {}).values())
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in _TURN_ENDS if token in text and token in vocabulary]
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return list(dict.fromkeys(ids))


def default_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation defaults that follow from the tokenizer: where an answer stops, and how to pad."""
    ids = stop_token_ids(tokenizer)
    return GenerationConfig(
        eos_token_id=(ids if len(ids) > 1 else ids[0]) if ids else None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fsync_tree(directory: Path) -> None:
    """Flush every file and folder under ``directory`` to the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_directory(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``; at no time is a half-written directory there."""
    fsync_tree(temporary)
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path | str,
    generation_config: GenerationConfig | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config, safetensors, tokenizer, chat template and generation defaults to ``out_dir``.

    The directory appears by one rename and opens in ``AutoModelForCausalLM`` and ``AutoTokenizer``. Without
    ``generation_config`` the defaults follow from the tokenizer. ``weights``: of a model that has no memory
    for them, and of which `are_written_one_by_one`; no more are in memory at a time than fit in one file, and
    one. Raises ``StorageError`` when the disk is full or read-only; what was at ``out_dir`` before is then
    still there.
    """
    target = Path(out_dir)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        with quiet_transformers():
            _write(model, tokenizer, temporary, generation_config, weights)
        replace_directory(temporary, target)
    except OSError as error:
        raise StorageError(
            f"cannot write the model to {target}: {os.strerror(error.errno) if error.errno else error}",
            fix="free space on the disk" if error.errno == errno.ENOSPC else None,
        ) from error
    except Exception as error:
        # safetensors reports a full disk as its own error type with the system's text inside.
        if "os error" in str(error).lower() or "no space" in str(error).lower():
            raise StorageError(f"cannot write the model to {target}: {error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    generation_config: GenerationConfig | None,
    weights: Mapping[str, Tensor] | None,
) -> None:
    if weights is None:
        model.save_pretrained(directory)
    else:
        model.config.save_pretrained(directory)
        write_weights(
            weights,
            dict(saved_tensors(model)),
            directory,
            in_files=lambda name, weight: as_in_files(model, name, weight),
        )
    generation = generation_config
    if tokenizer is not None:
        if model.can_generate():
            generation = generation or default_generation_config(tokenizer)
        tokenizer.save_pretrained(directory)
        # transformers 5 writes a class name that readers built on transformers 4 do not know.
        _edit_json(directory / "tokenizer_config.json", {"TokenizersBackend": "PreTrainedTokenizerFast"})
        _complete_config(directory / "config.json", tokenizer)
    if generation is not None:
        generation.save_pretrained(directory)


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What files of a model hold: its weights, tied ones once, and the buffers that are state."""
    yield from model.named_parameters()
    state = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


def write_weights(
    weights: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    directory: Path,
    *,
    in_files: Callable[[str, Tensor], Mapping[str, Tensor]] = lambda name, weight: {name: weight},
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write weights as safetensors files of at most ``max_bytes``, with an index where they are several.

    ``like``: tensors, of the meta device as well, with the names, shapes and types of those to write;
    ``in_files``: what is written of one, by name. In memory are one file and one weight at a time; a single
    tensor that is larger than ``max_bytes`` is a file by itself.
    """
    sizes = {
        written: tensor.nbytes
        for name, each in like.items()
        for written, tensor in in_files(name, each).items()
    }
    file_of = _files_of(sizes, max_bytes)
    tensors = (pair for name in like for pair in in_files(name, weights[name]).items())
    for file, pairs in itertools.groupby(tensors, key=lambda pair: file_of[pair[0]]):
        save_file({name: each.contiguous() for name, each in pairs}, directory / file, {"format": "pt"})
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files_of(sizes: Mapping[str, int], max_bytes: int) -> dict[str, str]:
    """The file of each tensor; they fill one after the other."""
    number, room = 1, max_bytes
    numbers: dict[str, int] = {}
    for name, size in sizes.items():
        if size > room and numbers:
            number, room = number + 1, max_bytes
        numbers[name] = number
        room -= size
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{each:05}-of-{number:05}.safetensors" for name, each in numbers.items()}


def _edit_json(path: Path, class_names: dict[str, str]) -> None:
    if not path.is_file():
        return
    value = json.loads(path.read_text(encoding="utf-8"))
    name = value.get("tokenizer_class")
    value["tokenizer_class"] = class_names.get(name, name)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete_config(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill in token ids that the configuration leaves open; other engines read them from there."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if value.get(key) is None and getattr(tokenizer, key) is not None:
            value[key] = getattr(tokenizer, key)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
