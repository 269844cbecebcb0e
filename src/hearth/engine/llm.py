"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hearth.engine.adapters import AdapterSet
from hearth.engine.assembly import assemble, make_scheduler
from hearth.engine.batch import Prompt, embedding_of, extend_completion, params_for, start_completion
from hearth.engine.best_of import BestOf
from hearth.engine.choose import Chosen, choose
from hearth.engine.config import EngineConfig
from hearth.engine.detokenize import Decode, Detokenizer, StopChecker, decoder_of
from hearth.engine.draft.loading import bytes_per_token, make_speculator, open_draft_model
from hearth.engine.embedding import EmbeddingSequence, pooling_of
from hearth.engine.grammar import GrammarCompiler
from hearth.engine.loading import LoadedModel, eos_token_ids, load
from hearth.engine.outputs import Completion, Embedding, EngineStats, RequestOutput
from hearth.engine.params import SamplingParams, check_prompt
from hearth.engine.plan import Plan
from hearth.engine.prompt_logprobs import max_positions, score_prompts
from hearth.engine.request import Request
from hearth.engine.sampler import SamplingState
from hearth.engine.sequences import Sequence
from hearth.engine.timeline import Timeline
from hearth.engine.update import update
from hearth.errors import ConfigError, EngineError, RequestError
from hearth.models import encode_text

logger = logging.getLogger(__name__)


class Engine:
    """Generates with a causal language model of transformers, many requests at a time.

    Not thread-safe: one thread adds requests and steps. `AsyncEngine` runs one in its own process.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, timeline: Timeline | None = None) -> None:
        """Take over ``loaded.model``: its linears are packed and its attention is replaced, in place.

        Raises `UnsupportedModelError` if the model cannot run, `ConfigError` if the settings do not fit it,
        `EngineError` if the memory does not suffice.
        """
        started, self.timeline = time.perf_counter(), timeline or Timeline()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.tensor_parallel > 1 and loaded.leader is None:
            raise ConfigError(
                f"tensor_parallel is {config.tensor_parallel}, but the model is in memory as a whole",
                fix="use Engine.load, whose processes each read their part of the files",
            )
        model = loaded.model.eval()
        self.config, self.tokenizer, self.path = config, loaded.tokenizer, loaded.path
        self.vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self.eos_ids = eos_token_ids(model, loaded.tokenizer)
        self.grammars = GrammarCompiler(loaded.tokenizer, self.vocab_size, self.eos_ids)
        self._decode: Decode | None = None if loaded.tokenizer is None else decoder_of(loaded.tokenizer)
        draft = open_draft_model(loaded, config)
        self.runner, num_blocks, self.max_model_len = assemble(
            model,
            config,
            shared_token_bytes=bytes_per_token(draft, config),
            group=loaded.group,
            timeline=self.timeline,
        )
        # A draft model shares the blocks, and its windows may be others.
        self.scheduler = make_scheduler(self.runner, num_blocks, config, allow_window=draft is None)
        self.pool = self.scheduler.pool
        self.leader = self.runner.leader = loaded.leader
        if self.leader is not None:
            self.leader.begin(0 if self.pool.host is None else self.pool.host.num_slots)
        self.speculator = make_speculator(
            draft, config, self.scheduler, self.max_model_len, self._count_valid_drafts
        )
        self.scheduler.max_num_scores = max_positions(self.vocab_size)
        self._sequences: dict[tuple[str, int], Sequence | EmbeddingSequence] = {}
        self._num_open: Counter[str] = Counter()  # of them, by request id
        self._selections: dict[str, BestOf] = {}
        self._late: list[RequestOutput] = []  # the last of sequences that an interrupt ended
        self.adapters = AdapterSet(model, config.max_adapters)
        self._seeds = np.random.Generator(np.random.Philox(config.seed))
        self._request_ids = (f"request-{i}" for i in itertools.count())
        self._finished: Counter[str] = Counter()
        self._num_prompt_tokens = self._num_generated = self._num_steps = self._num_failed_steps = 0
        self.load_seconds = time.perf_counter() - started
        self._closed = False

    @classmethod
    def load(cls, reference: str | Path, config: EngineConfig | None = None, **fields: Any) -> Engine:
        """Open a model (registry name, directory, ``hf:org/name``); ``fields`` are `EngineConfig`'s."""
        started, timeline = time.perf_counter(), Timeline()
        config = EngineConfig.of(**fields) if config is None else config.with_(**fields)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        loaded = load(reference, config, timeline)
        try:
            engine = cls(loaded, config, timeline)
        except BaseException:
            if loaded.leader is not None:
                loaded.leader.close()
            raise
        engine.load_seconds = time.perf_counter() - started
        logger.info("loaded %s in %.1f s: %s", reference, engine.load_seconds, timeline)
        return engine

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: Any = None, **fields: Any) -> Engine:
        """Run a model that is in memory already; the engine changes it and must be its only user."""
        return cls(LoadedModel(model, tokenizer), EngineConfig.of(**fields))

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

    def add_request(self, request_id: str, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Queue a request; raises `RequestError` and changes nothing if it is invalid or can never fit."""
        prompt = list(prompt_token_ids)
        self._check_id(request_id)
        check_prompt(prompt, self.max_model_len, self.vocab_size)
        self._check_params(params)
        adapter_hash = b"" if params.adapter is None else self.adapters.get(params.adapter).digest
        self.prepare(params)
        room = self.max_model_len - len(prompt)
        max_new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        fallback_seed = int(self._seeds.integers(2**63))
        decode = self._decode
        if decode is not None and not params.skip_special_tokens:
            decode = decoder_of(self.tokenizer, skip_special_tokens=False)
        if params.selects:
            self._selections[request_id] = BestOf(params)
        for index in range(params.num_sequences):
            grammar = None
            if params.guided is not None:
                grammar = self.grammars.start(params.guided, params.stop_token_ids)
            request = Request(request_id, index, prompt, params, max_new_tokens, adapter_hash=adapter_hash)
            request.skip_prefix = request.wants_scores
            self._num_open[request_id] += 1
            self._sequences[request.key] = Sequence(
                request,
                SamplingState(params, prompt, index, self.eos_ids, fallback_seed, grammar),
                Detokenizer(decode, prompt) if decode else None,
                StopChecker(params.stop, None if grammar is None else grammar.accepts),
                self.eos_ids,
            )
            self.scheduler.add(request)
        self._num_prompt_tokens += len(prompt)

    def add_embedding(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        pooling: str | None = None,
        *,
        normalize: bool = True,
    ) -> None:
        """Queue a prompt to be embedded; its one output has ``embedding``. Raises `RequestError`."""
        prompt = list(prompt_token_ids)
        self._check_id(request_id)
        check_prompt(prompt, self.max_model_len, self.vocab_size, num_answer=0)
        pooling = pooling_of(self.path, pooling)
        request = Request(request_id, 0, prompt, SamplingParams(), 0, pooling=pooling)
        request.skip_prefix = pooling != "last"
        self._num_open[request_id] += 1
        self._sequences[request.key] = EmbeddingSequence(request, normalize=normalize)
        self.scheduler.add(request)
        self._num_prompt_tokens += len(prompt)

    def _check_id(self, request_id: str) -> None:
        if self._num_open[request_id]:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")

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

    def prepare(self, params: SamplingParams) -> None:
        """Do now, in any thread, what `add_request` may take long for: compile the grammar of the output.

        Raises `RequestError` if it cannot be compiled.
        """
        if params.guided is not None:
            self.grammars.compile(params.guided)

    # -- adapters ----------------------------------------------------------------------------------------
    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter in PEFT's format under ``name``, or replace the one of that name.

        Requests that run keep what they began with. Raises `ModelError` if it does not fit the model,
        `RequestError` if there are too many, `ConfigError` with tensor parallelism.
        """
        if self.config.tensor_parallel > 1:
            raise ConfigError(
                "adapters and tensor_parallel do not go together", fix="merge the adapter into the model"
            )
        self.adapters.load(name, path)
        self.runner.adapters = self.adapters
        self._collect_adapters()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; its weights go with the last request that uses it. Raises `RequestError`."""
        self.adapters.unload(name)
        self._collect_adapters()

    def _collect_adapters(self) -> None:
        self.adapters.collect(request.adapter_hash for request in self.scheduler.requests)

    # -- weights -----------------------------------------------------------------------------------------
    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on with other weights of the same model, such as those of the next training step.

        weights: tensors by the names of the model's ``named_parameters()``; what is not named stays. Packed
        and quantised layers are packed anew, and cached prefixes are forgotten. Adapters and a draft model
        stay. Raises, before anything changes, `EngineError` while requests run, `ConfigError` with tensor
        parallelism, `ModelError` for weights that are not the model's.
        """
        self._require_idle("go on with other weights")
        if self.config.tensor_parallel > 1:
            raise ConfigError(
                "the weights of an engine with tensor_parallel cannot be replaced: other processes hold them",
                fix="use tensor_parallel 1, or load the new weights from a directory",
            )
        update(self.runner, weights, self.max_model_len, self.config.max_num_seqs)
        self.pool.reset_cache()

    def release_cache(self) -> None:
        """Give the memory of the KV cache back until it is needed again. On a GPU nothing happens: captured
        steps hold its address. Raises `EngineError` while requests run.
        """
        self._require_idle("lose their keys and values")
        if self.runner.device.type != "cpu":
            return
        self.pool.reset_cache()
        for layer in self.runner.layers:
            layer.renew()
        if self.runner.stack is not None:
            self.runner.stack.read_weights()

    def _require_idle(self, otherwise: str) -> None:
        if self._sequences:
            raise EngineError(
                f"{len(self._sequences)} requests run, which would {otherwise}",
                fix="finish or abort them first",
            )

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End a request and free its blocks; unknown ids are ignored. Returns the final outputs."""
        keys = [key for key in self._sequences if key[0] == request_id]
        late = [output for output in self._late if output.request_id == request_id]
        self._late = [output for output in self._late if output.request_id != request_id]
        return late + self._select([self._end(self._sequences[key], "abort") for key in keys])

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to tell."""
        return self.scheduler.has_work or bool(self._late)

    def step(self) -> list[RequestOutput]:
        """Compute one plan; what each of its sequences gained.

        An exception inside the model or the sampler ends the requests of the plan with finish_reason
        "error", and the engine goes on. So it does after a KeyboardInterrupt there, which is passed on; the
        next call tells what became of the requests that it hit. (Between plans a KeyboardInterrupt may leave
        requests half told: close the engine then. An engine process ignores it.)
        """
        if self._late:
            late, self._late = self._late, []
            return late
        if self.leader is not None:
            self.leader.check()
        if self.speculator is not None:
            self.speculator.propose()
        plan = self.scheduler.schedule()
        if not plan:
            return []
        self._num_steps += 1
        started = time.perf_counter()
        try:
            logits_RV = self.runner.execute(plan)
            score_prompts(plan, logits_RV, lambda r, got: self._sequence(r).prompt_logprobs.extend(got))
            chosen = choose(plan, logits_RV, self._sequence)
            embedded = self._pool(plan)
        except Exception as error:  # noqa: BLE001 - whatever broke, the other requests must live
            return self._select(self._fail(plan, error))
        except BaseException:  # Ctrl-C
            self._late = self._select(self._drop(plan, "abort"))
            raise
        self.scheduler.costs.observe(plan, time.perf_counter() - started)
        if self.speculator is not None:
            self.speculator.observe(plan, chosen)
        outputs = [self._settle(each) for each in chosen] + [self._end_embedding(each) for each in embedded]
        return self._select(outputs)

    def _sequence(self, request: Request) -> Sequence:
        sequence = self._sequences[request.key]
        assert isinstance(sequence, Sequence)
        return sequence

    def _pool(self, plan: Plan) -> list[EmbeddingSequence]:
        """Hand the hidden states of a step to the prompts that are embedded; those that are done."""
        done, first = [], 0
        for row in plan.rows:
            sequence = self._sequences.get(row.request.key)
            if isinstance(sequence, EmbeddingSequence):
                assert self.runner.hidden_TD is not None
                sequence.take(row.start, self.runner.hidden_TD[first : first + row.num_tokens])
                if sequence.is_complete:
                    done.append(sequence)
            first += row.num_tokens
        return done

    def _select(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Hold back the outputs of requests with best_of until the best ones are known."""
        if not self._selections:
            return outputs
        result = []
        for output in outputs:
            selection = self._selections.get(output.request_id)
            result += [output] if selection is None else selection.take(output)
            if selection is not None and selection.is_done:
                del self._selections[output.request_id]
        return result

    def _count_valid_drafts(self, request: Request) -> int:
        """How many of the drafts the grammar of the request would allow, one after the other."""
        grammar = self._sequence(request).sampling.grammar
        return len(request.draft_ids) if grammar is None else grammar.validate(request.draft_ids)

    def _settle(self, chosen: Chosen) -> RequestOutput:
        """Tell the scheduler what became of a row, and the caller what the sequence gained."""
        sequence = chosen.sequence
        if chosen.error is not None:
            return self._reject(sequence, chosen.error)
        if sequence.reason is None:
            self.scheduler.settle(sequence.request)
        output = self._end(sequence, sequence.reason) if sequence.reason else sequence.flush_output()
        self._num_generated += len(output.token_ids)
        return output

    def _end(self, sequence: Sequence | EmbeddingSequence, reason: str) -> RequestOutput:
        request = sequence.request
        if request.finish_reason is None:
            self.scheduler.finish(request, reason)
        sequence.reason = reason
        self._finished[reason] += 1
        if request.adapter_hash:
            self._collect_adapters()
        del self._sequences[request.key]
        self._num_open[request.request_id] -= 1
        if not self._num_open[request.request_id]:
            del self._num_open[request.request_id]
        return sequence.flush_output()

    def _end_embedding(self, sequence: EmbeddingSequence) -> RequestOutput:
        if sequence.is_finite:
            return self._end(sequence, "stop")
        return self._reject(sequence, "the model computed NaN or infinity for this text")

    def _reject(self, sequence: Sequence | EmbeddingSequence, error: str) -> RequestOutput:
        """End a sequence that the model computed no numbers for; nobody may reuse its blocks."""
        self.pool.forget(sequence.request.live_block_ids)
        output = self._end(sequence, "error")
        output.error = error
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
        prompts: str | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete every prompt; completions in the order of the prompts, and of ``index`` within one.

        Raises `RequestError` before anything is computed if one of them is invalid, and `EngineError` if
        the step of one failed.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        each = params_for(batch, params)
        ids = [self.encode(prompt) for prompt in batch]
        names = [next(self._request_ids) for _ in batch]
        completions: dict[tuple[str, int], Completion] = {}
        try:
            for name, prompt, prompt_ids, param in zip(names, batch, ids, each, strict=True):
                self.add_request(name, prompt_ids, param)
                for index in range(param.n):
                    completions[name, index] = start_completion(prompt, prompt_ids, index, param)
            unfinished = len(completions)
            while unfinished:
                for output in self.step():
                    completion = completions.get((output.request_id, output.index))
                    if completion is not None:
                        extend_completion(completion, output)
                        unfinished -= output.finished
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
        if params.selects:
            raise RequestError(
                f"best_of is {params.best_of} with n {params.n}: what is best is known only at the end",
                fix="use generate, or best_of = n",
                param="best_of",
            )
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

    def embed(
        self, prompts: str | SequenceOf[Prompt], pooling: str | None = None, *, normalize: bool = True
    ) -> list[Embedding]:
        """The pooled last hidden state of every prompt, in the order of the prompts.

        pooling: "mean", "last" or "cls" (the first token); None is what the model directory says, or "last".
        Raises `RequestError` before anything is computed, and `EngineError` if a step failed.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(prompt) for prompt in batch]
        done: dict[str, RequestOutput | None] = {}
        try:
            for prompt_ids in ids:
                name = next(self._request_ids)
                self.add_embedding(name, prompt_ids, pooling, normalize=normalize)
                done[name] = None
            while None in done.values():
                done.update({o.request_id: o for o in self.step() if o.request_id in done})
        except BaseException:
            for name in done:
                self.abort(name)
            raise
        return [embedding_of(output) for output in done.values() if output is not None]

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        pool, host = self.pool, self.pool.host
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_used_blocks=pool.num_used,
            kv_cache_usage=pool.num_used / pool.num_blocks,
            kv_cache_waste=pool.waste(self.scheduler.running),
            kv_cache_bytes=self.runner.num_bytes,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generated,
            prefix_query_tokens=pool.query_tokens,
            prefix_hit_tokens=pool.hit_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_host_blocks=0 if host is None else host.num_slots,
            num_used_host_blocks=0 if host is None else host.num_used,
            num_blocks_swapped_out=0 if host is None else host.num_copied_out,
            num_blocks_swapped_in=0 if host is None else host.num_copied_in,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            finished=dict(self._finished),
            load_seconds=self.load_seconds,
            num_drafts=0 if self.speculator is None else self.speculator.num_drafts,
            num_draft_tokens=0 if self.speculator is None else self.speculator.num_tokens,
            num_accepted_tokens=0 if self.speculator is None else self.speculator.num_accepted,
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
            "attention": self.runner.layers[0].attention_name,
            "layers": "module by module" if self.runner.stack is None else "compiled",
            "weights": self.config.weights,
            "kv_dtype": self.config.kv_dtype,
            "startup_seconds": dict(self.timeline.seconds),
        }

    def close(self) -> None:
        """Abort what runs and let go of model and cache."""
        if self._closed:
            return
        self._closed = True
        for request_id in {key[0] for key in self._sequences}:
            self.abort(request_id)
        if self.leader is not None:
            self.leader.close()
        del self.runner, self.speculator

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
