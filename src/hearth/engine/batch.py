"""Prompts in, completions out: what `Engine.generate` does around the steps."""

from __future__ import annotations

from collections.abc import Sequence

from hearth.engine.outputs import Completion, Embedding, RequestOutput
from hearth.engine.params import SamplingParams
from hearth.errors import EngineError, RequestError

Prompt = str | Sequence[int]


def params_for(
    batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """One `SamplingParams` a prompt; raises `RequestError` if their numbers differ."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise RequestError(f"{len(batch)} prompts but {len(params)} sampling parameters", param="params")
    return list(params)


def start_completion(prompt: Prompt, ids: list[int], index: int, params: SamplingParams) -> Completion:
    """A completion without tokens yet; its ``finish_reason`` is empty until it is finished."""
    return Completion(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=ids,
        text="",
        token_ids=[],
        finish_reason="",
        logprobs=None if params.logprobs is None else [],
        index=index,
    )


def embedding_of(output: RequestOutput) -> Embedding:
    """The result of an embedding request; raises `EngineError` if it failed or was aborted."""
    if output.embedding is None:
        raise EngineError(f"the embedding failed: {output.error or 'it was aborted'}")
    return Embedding(
        embedding=output.embedding,
        num_prompt_tokens=output.num_prompt_tokens,
        num_cached_tokens=output.num_cached_tokens,
    )


def extend_completion(completion: Completion, output: RequestOutput) -> None:
    """Add what one step gained."""
    completion.text += output.text
    completion.token_ids.extend(output.token_ids)
    if completion.logprobs is not None and output.logprobs:
        completion.logprobs.extend(output.logprobs)
    if output.prompt_logprobs is not None:
        completion.prompt_logprobs = output.prompt_logprobs
    completion.cumulative_logprob = output.cumulative_logprob
    completion.num_discarded_tokens += output.num_discarded_tokens
    completion.num_cached_tokens = output.num_cached_tokens
    completion.error = output.error
    completion.finish_reason = output.finish_reason or ""
