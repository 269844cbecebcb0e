"""From a recipe to a dataset directory.

    resolve   find the files, hash them: the fingerprint; an equal dataset is returned as it is
    scan      decode, filter, hash every document; then duplicates and the split are decided
    tokenizer train a byte-level BPE on the train split, or take the one given
    tokenize  encode every kept document into shards
    manifest  written last, then the directory is renamed into place

Documents are read from the sources in each pass instead of being kept, so memory grows by some 40 bytes a
document and not with the text.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from hearth.config.recipe import Recipe
from hearth.data.chat import AuditReport, check_template
from hearth.data.corpus import SPLITS, Corpus, scan_corpus
from hearth.data.dataset import TOKENIZER_DIRECTORY, Dataset
from hearth.data.files import sha256_file
from hearth.data.fim import FIM_TOKENS
from hearth.data.job import Job, plan_job
from hearth.data.manifest import (
    MANIFEST,
    SAMPLE_PARTS,
    FileRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
)
from hearth.data.parse import ParseOptions
from hearth.data.process import DROP, ProcessOptions, TokenResult
from hearth.data.progress import NullProgress, Progress
from hearth.data.shards import HashedFile, SplitWriter, storage_errors
from hearth.data.sources import RawDocument, check_sources_unchanged, read_batches
from hearth.data.tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    DataTokenizer,
    tokenizers_version,
    train_bpe,
)
from hearth.data.workers import WorkerPool, num_cores
from hearth.errors import DataError, IntegrityError
from hearth.version import __version__

SMALL_INPUT_BYTES = 4 << 20  # below it, starting processes takes longer than the work


class _StageClock:
    """Passes progress on and keeps the bytes and seconds of every stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage, self._began, self._num_bytes = "", 0.0, 0
        self.timings: dict[str, tuple[int, float]] = {}

    def start(self, stage: str, total: int | None = None) -> None:
        self._stage, self._began, self._num_bytes = stage, time.perf_counter(), 0
        self._progress.start(stage, total)

    def advance(self, num_units: int = 1) -> None:
        self._num_bytes += num_units
        self._progress.advance(num_units)

    def finish(self) -> None:
        self.timings[self._stage] = (self._num_bytes, time.perf_counter() - self._began)
        self._progress.finish()


def prepare_dataset(
    recipe: Recipe,
    out_dir: Path | str,
    *,
    tokenizer_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Make the dataset that ``recipe`` describes in ``out_dir``, or return the one there when it is that.

    ``tokenizer_dir`` names the tokenizer to use; without it, ``tokenizer.base`` or ``model.base`` is used
    where it is a directory, and else a byte-level BPE is trained. ``dataset.reused`` tells whether anything
    was done. With ``data.dataset`` the named directory is opened. Raises DataError for what is wrong with
    the input, StorageError when the disk fails; then nothing half-written is left.
    """
    if recipe.data.dataset is not None:
        return _opened(Path(recipe.data.dataset))
    clock = _StageClock(progress or NullProgress())
    job = plan_job(recipe, tokenizer_dir=tokenizer_dir, progress=clock)
    return _prepare(job, Path(out_dir), clock)


def prepare_in_folder(
    recipe: Recipe,
    folder: Path | str,
    *,
    tokenizer_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """``prepare_dataset`` in a directory of ``folder`` named by the first 16 digits of the fingerprint."""
    if recipe.data.dataset is not None:
        return _opened(Path(recipe.data.dataset))
    clock = _StageClock(progress or NullProgress())
    job = plan_job(recipe, tokenizer_dir=tokenizer_dir, progress=clock)
    return _prepare(job, Path(folder) / job.fingerprint[:16], clock)


def _opened(path: Path) -> Dataset:
    dataset = Dataset.open(path)
    dataset.reused = True
    return dataset


def _prepare(job: Job, out_dir: Path, clock: _StageClock) -> Dataset:
    existing = _reusable(out_dir, job.fingerprint)
    if existing is not None:
        return existing
    if job.tokenizer is not None and job.kind not in ("text", "prompts"):
        check_template(job.tokenizer)
    staging = out_dir.parent / f".{out_dir.name}.{os.getpid()}.tmp"
    with storage_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out_dir)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            _build(job, staging, clock)
            _move_into_place(staging, out_dir, job.fingerprint)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    dataset = Dataset.open(out_dir)
    dataset.timings = clock.timings
    return dataset


def _reusable(out_dir: Path, fingerprint: str) -> Dataset | None:
    """The dataset in ``out_dir`` when it is whole and has this fingerprint."""
    if not out_dir.exists():
        return None
    if not out_dir.is_dir() or (any(out_dir.iterdir()) and not _looks_like_ours(out_dir)):
        raise DataError(
            f"{out_dir} exists and is not a dataset; it is left as it is", fix="choose another directory"
        )
    try:
        dataset = Dataset.open(out_dir)
    except (DataError, IntegrityError):
        return None  # damaged: made again
    if dataset.fingerprint != fingerprint:
        return None
    dataset.reused = True
    return dataset


def _looks_like_ours(directory: Path) -> bool:
    """Whether it was once a dataset, so that it may be replaced; folders of a user may be called train."""
    ours = [f"{split}/{name}" for split in SPLITS for name in ("offsets.bin", "lines.bin", "ids.bin")]
    return any((directory / name).is_file() for name in ours)


def _remove_abandoned(out_dir: Path) -> None:
    """Remove what a killed process left behind."""
    for path in out_dir.parent.glob(f".{out_dir.name}.*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition(".")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move_into_place(staging: Path, out_dir: Path, fingerprint: str) -> None:
    if out_dir.exists():
        old = out_dir.parent / f".{out_dir.name}.old.{os.getpid()}.tmp"
        out_dir.rename(old)
        staging.rename(out_dir)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        staging.rename(out_dir)
    except OSError as error:
        # Another process made the same dataset in the meantime; its copy is as good.
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST} or _reusable(out_dir, fingerprint) is None:
            raise


def _build(job: Job, staging: Path, clock: _StageClock) -> None:
    trained = (*SPECIAL_TOKENS, *(FIM_TOKENS if job.recipe.data.fim else ()))
    control = trained if job.tokenizer is None else tuple(sorted(job.tokenizer.special_ids))
    options = ProcessOptions(
        sources=tuple(ParseOptions.of(section) for section in job.recipe.data.sources),
        filters=job.recipe.data.filters,
        fail_on_bad_file=job.recipe.data.on_bad_file == "fail",
        seed=job.recipe.data.seed,
        control_tokens=control,
    )
    with WorkerPool(_num_workers(job), options) as pool:
        corpus = scan_corpus(job, pool, clock)
        tokenizer, trained_on = job.tokenizer, 0
        directory = staging / TOKENIZER_DIRECTORY
        if tokenizer is None:
            tokenizer, trained_on = _train_tokenizer(job, pool, corpus, clock)
        _save_tokenizer(tokenizer, directory, job)
        pool.broadcast("load_tokenizer", str(directory))
        _tokenize(job, pool, corpus, DataTokenizer.open(directory), trained_on, staging, clock)


def _num_workers(job: Job) -> int:
    if job.recipe.data.num_workers:
        return job.recipe.data.num_workers
    return 1 if sum(source.num_bytes for source in job.sources) < SMALL_INPUT_BYTES else num_cores()


def _batches(job: Job, corpus: Corpus) -> Iterator[tuple[list[RawDocument], slice]]:
    """The batches again, each with the place of its documents in the corpus."""
    slices = corpus.batches()
    for batch in read_batches(job.sources):
        documents = next(slices, None)
        if documents is None:
            break
        yield batch, documents
    check_sources_unchanged(job.sources)


def _train_tokenizer(
    job: Job, pool: WorkerPool, corpus: Corpus, clock: _StageClock
) -> tuple[DataTokenizer, int]:
    """Train on the train split; above ``tokenizer.sample_mb``, on a random part of its groups."""
    train = corpus.decisions == SPLITS.index("train")
    total, budget = int(corpus.num_bytes[train].sum()), job.recipe.tokenizer.sample_mb * 1e6
    if total > budget:
        # Multiplying by an odd number gives an order that has nothing to do with that of the split.
        order = corpus.split_hashes * np.uint64(0x9E3779B97F4A7C15)
        train &= order < np.uint64(min(int(budget / total * 2.0**64), 2**64 - 1))
        if not train.any():
            train = (corpus.decisions == SPLITS.index("train")) & (order == order[train].min(initial=0))
    sampled = int(corpus.num_bytes[train].sum())
    clock.start("tokenizer", sampled)
    tasks = (
        (batch, train[documents]) for batch, documents in _batches(job, corpus) if train[documents].any()
    )

    def texts() -> Iterator[str]:
        for part in pool.map("texts", tasks):
            for text in part:
                yield text
                clock.advance(len(text.encode()))

    fim_tokens = FIM_TOKENS if job.recipe.data.fim else ()
    tokenizer = train_bpe(texts(), job.recipe.tokenizer.vocab_size, more_special_tokens=fim_tokens)
    clock.finish()
    return tokenizer, sampled


def _save_tokenizer(tokenizer: DataTokenizer, directory: Path, job: Job) -> None:
    """Write the trained tokenizer; of a given one, copy its files as they are."""
    source = tokenizer.directory
    if source is None or not (source / "tokenizer.json").is_file():
        tokenizer.save(directory, model_max_length=job.recipe.model.context_length)
        return
    directory.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _tokenize(
    job: Job,
    pool: WorkerPool,
    corpus: Corpus,
    tokenizer: DataTokenizer,
    trained_on: int,
    staging: Path,
    clock: _StageClock,
) -> None:
    dtype = _dtype(tokenizer)
    files: dict[str, FileRecord] = {}
    writers = [
        SplitWriter(
            staging / name,
            dtype=dtype,
            with_mask=job.kind != "text",
            num_parts=len(SAMPLE_PARTS.get(job.kind, ("document",))),
            files=files,
        )
        for name in SPLITS
    ]
    seen = TokenResult()
    kept_bytes = [
        int(corpus.num_bytes[documents][corpus.decisions[documents] != DROP].sum())
        for documents in corpus.batches()
    ]
    tasks = ((batch, corpus.decisions[documents], len(SPLITS)) for batch, documents in _batches(job, corpus))
    clock.start("tokenize", sum(kept_bytes))
    try:
        for done, results in zip(kept_bytes, pool.map("tokenize", tasks), strict=True):
            for writer, result in zip(writers, results, strict=True):
                writer.add(result)
                seen.add_counts(result)
            clock.advance(done)
        splits = dict(zip(SPLITS, (writer.close() for writer in writers), strict=True))
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    clock.finish()
    audit = _audit(splits, seen) if job.kind != "text" else None
    _write_manifest(job, corpus, tokenizer, trained_on, staging, files, splits, seen, audit)


def _write_manifest(
    job: Job,
    corpus: Corpus,
    tokenizer: DataTokenizer,
    trained_on: int,
    staging: Path,
    files: dict[str, FileRecord],
    splits: dict[str, SplitRecord],
    seen: TokenResult,
    audit: dict[str, int] | None,
) -> None:
    for path in sorted((staging / TOKENIZER_DIRECTORY).iterdir()):
        name = f"{TOKENIZER_DIRECTORY}/{path.name}"
        files[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))
    manifest = Manifest(
        fingerprint=job.fingerprint,
        kind=job.kind,
        dtype=_dtype(tokenizer),
        inputs=job.inputs,
        versions={
            "hearth": __version__,
            "tokenizers": tokenizers_version(),
            "python": platform.python_version(),
        },
        sources=corpus.records,
        tokenizer=TokenizerRecord(
            sha256=tokenizer.content_hash(),
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            trained=job.tokenizer is None,
            trained_on_bytes=trained_on,
            round_trips_checked=seen.num_round_trips,
            round_trips_lossy=seen.num_lossy,
        ),
        split_fallback=corpus.split_fallback,
        splits=splits,
        audit=audit,
        files=files,
    )
    file = HashedFile(staging / MANIFEST)
    file.write(manifest.model_dump_json(indent=2).encode() + b"\n")
    file.close()


def _dtype(tokenizer: DataTokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.bytes_per_token_id == 2 else "uint32"


def _audit(splits: dict[str, SplitRecord], seen: TokenResult) -> dict[str, int]:
    """Every conversation was audited while it was tokenised; this is the sum."""
    return AuditReport(
        num_conversations=sum(split.documents for split in splits.values()),
        num_tokens=sum(split.tokens for split in splits.values()),
        num_supervised_tokens=sum(split.supervised_tokens for split in splits.values()),
        num_turns=seen.num_turns,
        num_prefix_mismatches=seen.num_prefix_mismatches,
        num_empty_thoughts=seen.num_empty_thoughts,
    ).as_dict()


__all__ = ["Job", "plan_job", "prepare_dataset", "prepare_in_folder"]
