"""The parity gate and the evaluation of a model reference, with their reports kept in the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hearth.errors import DataError, InputError
from hearth.evaluation.baselines import order0_bits_per_byte, xz_bits_per_byte
from hearth.evaluation.parity import ParityReport, check_continuations, continue_greedily
from hearth.evaluation.prompts import make_prompts
from hearth.evaluation.scoring import score_documents
from hearth.workspace import Workspace

if TYPE_CHECKING:
    from hearth.data import Dataset
    from hearth.workspace import ModelVersion

Advance = Callable[[int], None]
MIN_TOKENS = 8  # of a gate: the first comes of the prompt alone, and only later ones show the cache at work


def find_version(reference: str | Path, directory: Path, workspace: Workspace) -> ModelVersion | None:
    """The registered version that ``reference`` led to ``directory`` by; None for paths and hub names."""
    try:
        version = workspace.registry.get(str(reference))
    except InputError:  # no name of the registry, nor one that could be
        return None
    return version if version.path == directory else None


def find_dataset(version: ModelVersion | None, workspace: Workspace) -> Dataset | None:
    """The prepared dataset that ``version`` was trained on, or None where it is not (or no longer) here."""
    from hearth.data import Dataset

    if version is None or version.dataset_fingerprint is None:
        return None
    for manifest in sorted(workspace.root.glob("datasets/*/manifest.json")):
        try:
            dataset = Dataset.open(manifest.parent)
        except DataError:
            continue  # a damaged dataset is not the one we look for; `hearth data stats` tells about it
        if dataset.fingerprint == version.dataset_fingerprint:
            return dataset
    return None


def run_gate(
    reference: str | Path,
    *,
    workspace: Workspace,
    dtype: str = "auto",
    weights: str = "auto",
    kv_dtype: str = "auto",
    num_prompts: int = 16,
    max_tokens: int = 32,
    advance: Advance | None = None,
) -> ParityReport:
    """Run the parity gate on a model reference; the report of a registered version is kept with it.

    ``dtype`` is the precision of serving; ``auto`` is the one that the engine chooses by itself, and the
    report names it. ``weights`` and ``kv_dtype`` compress the engine's side as `EngineConfig` says. The
    engine is closed before the training-side model is opened, so that both need not fit into memory together.
    Raises InputError for fewer than 8 tokens, which would let pass what goes wrong from the second on.
    """
    if max_tokens < MIN_TOKENS:
        raise InputError(
            f"a parity gate of {max_tokens} token(s) is none", fix=f"compare at least {MIN_TOKENS}"
        )
    from hearth.data.tokenizer import DataTokenizer
    from hearth.engine import Engine
    from hearth.models import load_model, resolve_reference
    from hearth.training import choose_device

    directory = resolve_reference(reference, workspace)
    version = find_version(reference, directory, workspace)
    documents, conversations = _held_out(find_dataset(version, workspace), num_prompts)
    tokenizer = DataTokenizer.open(directory)
    with Engine.load(directory, dtype=dtype, weights=weights, kv_dtype=kv_dtype) as engine:
        dtype = engine.model_info["dtype"]
        prompts = make_prompts(
            tokenizer,
            engine.tokenizer,
            documents=documents,
            conversations=conversations,
            num_prompts=num_prompts,
            max_prompt_tokens=max(1, engine.max_model_len - max_tokens),
            vocab_size=engine.vocab_size,
        )
        completions = continue_greedily(engine, prompts, max_tokens=max_tokens)
    model = load_model(directory, dtype=dtype, device=choose_device())
    report = check_continuations(
        model,
        prompts,
        completions,
        dtype=dtype,
        stop_ids=generation_stop_ids(model, tokenizer.eos_id),
        max_tokens=max_tokens,
        weights=weights,
        kv_dtype=kv_dtype,
        advance=advance,
    )
    if version is not None:
        workspace.registry.attach_report(version.ref, "parity", report.to_dict())
    return report


def generation_stop_ids(model: Any, eos_id: int | None = None) -> frozenset[int]:
    """The ids at which a generation ends on the training side.

    Those of transformers' own ``generate``; for a model that states none, the end token of its data.
    """
    for source in (model.generation_config, model.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset([] if eos_id is None else [eos_id])


def _held_out(dataset: Dataset | None, count: int) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Up to ``count`` held-out texts, or as many held-out conversations up to their last answer."""
    if dataset is None:
        return [], []
    split = dataset.split("validation")
    # Spread over the split, so that the prompts come from different sources and lengths.
    indices = np.linspace(0, split.num_documents - 1, num=min(count, split.num_documents)).astype(int)
    if not split.is_chat:
        return [split.text(int(index)) for index in indices], []
    questions = [_question(split.messages(int(index))) for index in indices]
    return [], [question for question in questions if question]


def _question(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return messages[:last]


def evaluate_model(
    reference: str | Path,
    *,
    workspace: Workspace,
    dataset: str | Path | None = None,
    split: str = "validation",
    texts: Sequence[Path] = (),
    max_documents: int | None = None,
    dtype: str = "auto",
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Score a model on text files, on a dataset, or on the dataset that it was trained on.

    Returns loss, perplexity and, for text, bits per byte beside the baselines on the same bytes. The report
    of a registered version is kept with it. Raises DataError when there is nothing to evaluate on.
    """
    from hearth.data import Dataset
    from hearth.models import load_model, model_info, resolve_reference
    from hearth.training import choose_device

    directory = resolve_reference(reference, workspace)
    version = find_version(reference, directory, workspace)
    if texts:
        documents, data, source = _encode_files(directory, texts[:max_documents])
    else:
        opened_dataset = Dataset.open(Path(dataset)) if dataset else find_dataset(version, workspace)
        if opened_dataset is None:
            raise DataError(
                f"there is nothing to evaluate {reference} on: no dataset is known for it",
                fix="give --text FILE or --dataset DIRECTORY",
            )
        documents, data, source = _read_split(opened_dataset, split, max_documents)
    score = score_documents(
        load_model(directory, dtype=dtype, device=choose_device()),
        documents,
        num_bytes=len(data),
        context_length=model_info(directory).context_length,
        advance=advance,
    )
    report = {"model": version.ref if version else str(reference), "data": source} | score.to_dict()
    if data:
        report |= {
            "xz_bits_per_byte": xz_bits_per_byte(data),
            "order0_bits_per_byte": order0_bits_per_byte(data),
        }
    if version is not None:
        workspace.registry.attach_report(version.ref, "evaluation", report)
    return report


Documents = list[tuple[np.ndarray, np.ndarray | None]]


def _read_split(dataset: Dataset, name: str, max_documents: int | None) -> tuple[Documents, bytes, str]:
    """Documents of a split, and their text as bytes (empty for chat data, whose masks leave bytes out)."""
    split = dataset.split(name)
    indices = range(min(split.num_documents, max_documents or split.num_documents))
    documents = [(split.tokens(index), split.loss_mask(index)) for index in indices]
    data = b"" if split.is_chat else "".join(split.text(index) for index in indices).encode()
    return documents, data, f"{dataset.path.name}/{name}"


def _encode_files(directory: Path, paths: Sequence[Path]) -> tuple[Documents, bytes, str]:
    from hearth.data.tokenizer import DataTokenizer

    tokenizer = DataTokenizer.open(directory)
    documents: Documents = []
    for text in read_texts(paths):
        ids = tokenizer.encode_prompt(text)
        if tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
        documents.append((np.asarray(ids), None))
    data = b"".join(path.read_bytes() for path in paths)
    return documents, data, ", ".join(path.name for path in paths)


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The text of each file. Raises DataError for a missing or empty file and for invalid UTF-8."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file", fix="give a text file")
        raw = path.read_bytes()
        if not raw:
            raise DataError(f"{path}: the file is empty", fix="give a text file with content")
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})",
                fix="convert the file to UTF-8",
            ) from error
