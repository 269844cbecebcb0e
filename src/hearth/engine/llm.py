"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hearth.engine import support
from hearth.engine.config import EngineConfig
from hearth.engine.detokenize import Decode, Detokenizer, StopChecker, decoder_of
from hearth.engine.linear import can_pack, pack_linears
from hearth.engine.loading import LoadedModel, eos_token_ids, load
from hearth.engine.memory import DEFAULT_SHARE, available_memory
from hearth.engine.norm import fuse_norms
from hearth.engine.outputs import Completion, EngineStats, RequestOutput, TokenLogprob
from hearth.engine.params import SamplingParams, check_prompt
from hearth.engine.plan import Plan
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request
from hearth.engine.runner import Runner
from hearth.engine.sampler import SamplingState, sample
from hearth.engine.scheduler import Scheduler
from hearth.errors import ConfigError, EngineError, RequestError
from hearth.models import encode_text

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass
class _Sequence:
    """The side of a sequence that the scheduler does not see: its text and its dice."""

    request: Request
    sampling: SamplingState
    detokenizer: Detokenizer | None
    stops: StopChecker


class Engine:
    """Generates with a causal language model of transformers, many requests at a time.

    Not thread-safe: one thread adds requests and steps. `AsyncEngine` runs one in its own process.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        """Take over ``loaded.model``: its linears are packed and its attention is replaced, in place.

        Raises `UnsupportedModelError` if the model cannot run, `ConfigError` if the settings do not fit it,
        `EngineError` if the memory does not suffice.
        """
        started = time.perf_counter()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model = loaded.model.eval()
        self.config, self.tokenizer, self.path = config, loaded.tokenizer, loaded.path
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(text_config.vocab_size)
        self.eos_ids = eos_token_ids(model, loaded.tokenizer)
        self._decode: Decode | None = None if loaded.tokenizer is None else decoder_of(loaded.tokenizer)
        specs = support.examine(model)
        if config.prepack and can_pack(model.dtype, model.device):
            pack_linears(model)
        num_blocks, self.max_model_len = self._size_pool(model, text_config, specs)
        support.pin_rope(model, self.max_model_len)
        self.runner = _make_runner(model, specs, num_blocks, config)
        if self.runner.layers[0].use_numba:
            fuse_norms(model)
        self.runner.self_test(self.vocab_size, self.max_model_len)
        self.pool = BlockPool(num_blocks, config.block_size, prefix_cache=config.prefix_cache)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )
        self._sequences: dict[tuple[str, int], _Sequence] = {}
        self._seeds = np.random.Generator(np.random.Philox(config.seed))
        self._request_ids = (f"request-{i}" for i in itertools.count())
        self._finished: Counter[str] = Counter()
        self._num_prompt_tokens = self._num_generated = self._num_steps = self._num_failed_steps = 0
        self.load_seconds = time.perf_counter() - started
        self._closed = False

    @classmethod
    def load(cls, reference: str | Path, config: EngineConfig | None = None, **fields: Any) -> Engine:
        """Open a model (registry name, directory, ``hf:org/name``); ``fields`` are `EngineConfig`'s."""
        started = time.perf_counter()
        config = EngineConfig.of(**fields) if config is None else config.with_(**fields)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        engine = cls(load(reference, config), config)
        engine.load_seconds = time.perf_counter() - started
        return engine

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: Any = None, **fields: Any) -> Engine:
        """Run a model that is in memory already; the engine changes it and must be its only user."""
        return cls(LoadedModel(model, tokenizer), EngineConfig.of(**fields))

    def _size_pool(
        self, model: PreTrainedModel, text_config: Any, specs: Sequence[tuple[Any, Any]]
    ) -> tuple[int, int]:
        """Blocks of the pool and the longest sequence, from the model's limit and the free memory."""
        config = self.config
        limit = support.context_limit(text_config)
        wanted = config.max_model_len or limit or 4096
        hard = getattr(text_config, "max_position_embeddings", None) or limit
        if hard and wanted > hard:
            raise ConfigError(
                f"max_model_len is {wanted}, but the model was made for {hard} positions",
                fix=f"use max_model_len <= {hard}",
            )
        block_bytes = sum(spec.bytes_per_token(model.dtype) for _, spec in specs) * config.block_size
        blocks_per_sequence = -(-wanted // config.block_size)
        budget = config.kv_cache_memory
        if budget is None:
            budget = int(available_memory(model.device) * DEFAULT_SHARE)
        num_blocks = min(blocks_per_sequence * config.max_num_seqs, budget // block_bytes)
        if num_blocks >= blocks_per_sequence:
            return num_blocks, wanted
        fits = num_blocks * config.block_size
        if config.max_model_len is not None or fits < 2:
            raise ConfigError(
                f"the KV cache has {budget} bytes, room for {fits} tokens; one sequence of max_model_len "
                f"{wanted} needs {blocks_per_sequence * block_bytes} bytes",
                fix="lower max_model_len, raise kv_cache_memory, or free memory",
            )
        logger.warning("max_model_len is %d instead of %d: the KV cache holds no more", fits, wanted)
        return num_blocks, fits

    # -- requests ----------------------------------------------------------------------------------------
    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids are passed through."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer", fix="give the prompt as token ids", param="prompt"
            )
        return encode_text(self.tokenizer, prompt)

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request; raises `RequestError` and changes nothing if it is invalid or can never fit."""
        prompt = list(prompt_token_ids)
        if any(key[0] == request_id for key in self._sequences):
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        check_prompt(prompt, self.max_model_len, self.vocab_size)
        self._check_params(params)
        room = self.max_model_len - len(prompt)
        max_new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        fallback_seed = int(self._seeds.integers(2**63))
        for index in range(params.n):
            request = Request(request_id, index, prompt, params, max_new_tokens)
            self._sequences[request.key] = _Sequence(
                request,
                SamplingState(params, prompt, index, self.eos_ids, fallback_seed),
                Detokenizer(self._decode, prompt) if self._decode else None,
                StopChecker(params.stop),
            )
            self.scheduler.add(request)
        self._num_prompt_tokens += len(prompt)

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and self._decode is None:
            raise RequestError("stop texts need a tokenizer, and this engine has none", param="stop")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token_id for token_id in ids if token_id >= self.vocab_size]
            if outside:
                raise RequestError(
                    f"{name} has token id {outside[0]}, outside the vocabulary of {self.vocab_size}",
                    param=name,
                )

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End a request and free its blocks; unknown ids are ignored. Returns the final outputs."""
        keys = [key for key in self._sequences if key[0] == request_id]
        return [self._end(self._sequences[key], "abort") for key in keys]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """Compute one plan; what each of its sequences gained.

        An exception inside the model or the sampler ends the requests of the plan with finish_reason
        "error", and the engine goes on. So it does after a KeyboardInterrupt, which is passed on.
        """
        plan = self.scheduler.schedule()
        if not plan:
            return []
        self._num_steps += 1
        try:
            logits_RV = self.runner.execute(plan)
            sequences = [self._sequences[request.key] for request in plan.sampled]
            # A maximum that is NaN or infinite: there is nothing to choose from. Masked tokens may be -inf.
            sound = torch.isfinite(logits_RV.amax(dim=-1)).tolist() if sequences else []
            sampled = sample(logits_RV, [sequence.sampling for sequence in sequences]) if sequences else None
        except Exception as error:  # noqa: BLE001 - whatever broke, the other requests must live
            return self._fail(plan, error)
        except BaseException:  # Ctrl-C
            self._drop(plan, "abort")
            raise
        if sampled is None:
            return []
        return [
            self._append(sequence, token_id, logprob) if is_sound else self._reject(sequence)
            for sequence, token_id, logprob, is_sound in zip(
                sequences, sampled.token_ids, sampled.logprobs, sound, strict=True
            )
        ]

    def _append(self, sequence: _Sequence, token_id: int, logprob: TokenLogprob | None) -> RequestOutput:
        """Give a sequence its new token: text, stop conditions, and what to tell the caller."""
        request, params = sequence.request, sequence.request.params
        request.tokens.append(token_id)
        sequence.sampling.append(token_id)
        self._num_generated += 1
        ended = token_id in params.stop_token_ids or (token_id in self.eos_ids and not params.ignore_eos)
        reason = "stop" if ended else None
        text = ""
        if not ended and sequence.detokenizer is not None:
            text = sequence.detokenizer.push(token_id)
            if request.num_output_tokens >= params.min_tokens:
                text, stopped = sequence.stops.push(text)
                reason = "stop" if stopped else None
        if reason is None and request.num_output_tokens >= request.max_new_tokens:
            reason = "length"
        if reason is not None:
            return self._end(sequence, reason, text, [token_id], logprob, flush=ended or reason == "length")
        return RequestOutput(
            request_id=request.request_id,
            index=request.index,
            text=text,
            token_ids=[token_id],
            logprobs=None if logprob is None else [logprob],
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached,
        )

    def _end(
        self,
        sequence: _Sequence,
        reason: str,
        text: str = "",
        token_ids: Sequence[int] = (),
        logprob: TokenLogprob | None = None,
        *,
        flush: bool = False,
    ) -> RequestOutput:
        request = sequence.request
        if flush and sequence.detokenizer is not None:
            shown, stopped = sequence.stops.push(sequence.detokenizer.flush())
            text += shown if stopped else shown + sequence.stops.flush()
        if request.finish_reason is None:
            self.scheduler.finish(request, reason)
        self._finished[reason] += 1
        del self._sequences[request.key]
        return RequestOutput(
            request_id=request.request_id,
            index=request.index,
            text=text,
            token_ids=list(token_ids),
            logprobs=None if logprob is None else [logprob],
            finished=True,
            finish_reason=reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached,
        )

    def _reject(self, sequence: _Sequence) -> RequestOutput:
        """End a sequence for which the model computed NaN or infinity; nobody may reuse its blocks."""
        self.pool.forget(sequence.request.block_ids)
        output = self._end(sequence, "error")
        output.error = "the model computed NaN or infinite logits for this request"
        return output

    def _fail(self, plan: Plan, error: Exception) -> list[RequestOutput]:
        logger.error("an engine step failed; its %d requests end", len(plan.rows), exc_info=error)
        self._num_failed_steps += 1
        outputs = self._drop(plan, "error")
        for output in outputs:
            output.error = f"{type(error).__name__}: {error}"
        return outputs

    def _drop(self, plan: Plan, reason: str) -> list[RequestOutput]:
        """End the sequences of a plan that broke off, and forget the blocks that it may have half written."""
        self.scheduler.fail_step(plan, reason)
        return [self._end(self._sequences[row.request.key], reason) for row in plan.rows]

    # -- convenience -------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete every prompt; completions in the order of the prompts, and of ``index`` within one.

        Raises `RequestError` before anything is computed if one of them is invalid, and `EngineError` if
        the step of one failed.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        each = _params_for(batch, params)
        ids = [self.encode(prompt) for prompt in batch]
        names = [next(self._request_ids) for _ in batch]
        completions: dict[tuple[str, int], Completion] = {}
        try:
            for name, prompt, prompt_ids, param in zip(names, batch, ids, each, strict=True):
                self.add_request(name, prompt_ids, param)
                for index in range(param.n):
                    completions[name, index] = _start(prompt, prompt_ids, index, param)
            while any(not completion.finish_reason for completion in completions.values()):
                for output in self.step():
                    completion = completions.get((output.request_id, output.index))
                    if completion is not None:
                        _extend(completion, output)
        except BaseException:
            for name in names:
                self.abort(name)
            raise
        failed = [c for c in completions.values() if c.finish_reason == "error"]
        if failed:
            raise EngineError(f"generation failed: {failed[0].error}")
        return list(completions.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, step by step; closing the iterator aborts the request."""
        params = params or SamplingParams()
        name = next(self._request_ids)
        self.add_request(name, self.encode(prompt), params)
        unfinished = params.n
        try:
            while unfinished:
                for output in self.step():
                    if output.request_id != name:
                        continue
                    unfinished -= output.finished
                    if output.error:
                        raise EngineError(f"generation failed: {output.error}")
                    yield output
        finally:
            self.abort(name)

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        pool, size = self.pool, self.config.block_size
        allocated = sum(len(r.block_ids) for r in self.scheduler.running) * size
        stored = sum(r.num_computed for r in self.scheduler.running)
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=size,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_used_blocks=pool.num_used,
            kv_cache_usage=pool.num_used / pool.num_blocks,
            kv_cache_waste=1.0 - stored / allocated if allocated else 0.0,
            kv_cache_bytes=self.runner.num_bytes,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generated,
            prefix_query_tokens=pool.query_tokens,
            prefix_hit_tokens=pool.hit_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            finished=dict(self._finished),
            load_seconds=self.load_seconds,
        )

    @property
    def model_info(self) -> dict[str, Any]:
        """Facts about what is loaded, for people and for `/v1/models`."""
        model = self.runner.model
        return {
            "path": None if self.path is None else str(self.path),
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "vocab_size": self.vocab_size,
            "max_model_len": self.max_model_len,
            "num_layers": len(self.runner.layers),
            "eos_token_ids": list(self.eos_ids),
            "attention": "numba" if self.runner.layers[0].use_numba else "torch",
        }

    def close(self) -> None:
        """Abort what runs and let go of model and cache."""
        if self._closed:
            return
        self._closed = True
        for request_id in {key[0] for key in self._sequences}:
            self.abort(request_id)
        del self.runner

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_runner(
    model: PreTrainedModel, specs: list[tuple[torch.nn.Module, Any]], num_blocks: int, config: EngineConfig
) -> Runner:
    numba = config.attention != "torch" and model.device.type == "cpu"
    if numba:
        try:
            from hearth.engine.attention import numba_path
        except ImportError:
            if config.attention == "numba":
                raise ConfigError(
                    "attention is 'numba', but numba is not installed", fix="pip install numba"
                ) from None
            numba = False
        else:
            numba = numba_path.supports(model.dtype)
    if config.attention == "numba" and not numba:
        raise ConfigError(
            f"attention is 'numba', which does not run {model.dtype} on {model.device}",
            fix="use attention auto or torch",
        )
    try:
        return Runner(model, specs, num_blocks=num_blocks, block_size=config.block_size, numba=numba)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"not enough memory for the KV cache: {error}", fix="set kv_cache_memory"
        ) from error


def _params_for(
    batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise RequestError(f"{len(batch)} prompts but {len(params)} sampling parameters", param="params")
    return list(params)


def _start(prompt: Prompt, ids: list[int], index: int, params: SamplingParams) -> Completion:
    return Completion(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=ids,
        text="",
        token_ids=[],
        finish_reason="",
        logprobs=None if params.logprobs is None else [],
        index=index,
    )


def _extend(completion: Completion, output: RequestOutput) -> None:
    completion.text += output.text
    completion.token_ids.extend(output.token_ids)
    if completion.logprobs is not None and output.logprobs:
        completion.logprobs.extend(output.logprobs)
    completion.num_cached_tokens = output.num_cached_tokens
    completion.error = output.error
    completion.finish_reason = output.finish_reason or ""
