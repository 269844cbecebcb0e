"""What an engine gives back. Torch-free; the same types cross the process border as MessagePack."""

from __future__ import annotations

import msgspec


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one token, and the most likely tokens at its position, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = msgspec.field(default_factory=list)


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one sequence of a request gained in one step.

    text: the new text; it never ends inside a character or inside the beginning of a stop text.
    token_ids: the new tokens; a token that ended the sequence is among them, its text is not in ``text``.
    finish_reason: "stop", "length", "abort" or "error" once ``finished``.
    prompt_logprobs: on the first output of sequence 0, if asked for: one entry a token of the prompt, None
        for the first, which nothing precedes.
    cumulative_logprob: the sum over all tokens, once ``finished``, if logprobs or best_of are asked for.
    num_discarded_tokens: tokens of the sequences that best_of left out; on the best one's output.
    embedding: of an embedding request, once ``finished``.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finished: bool = False
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cumulative_logprob: float | None = None
    num_discarded_tokens: int = 0
    embedding: list[float] | None = None


class Completion(msgspec.Struct, kw_only=True):
    """One finished sequence; with n > 1 a prompt has several, told apart by ``index``."""

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    index: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cumulative_logprob: float | None = None
    num_discarded_tokens: int = 0


class Embedding(msgspec.Struct, kw_only=True):
    """The pooled hidden states of one prompt."""

    embedding: list[float]
    num_prompt_tokens: int
    num_cached_tokens: int = 0


class EngineStats(msgspec.Struct, kw_only=True):
    """A snapshot of an engine: gauges now, counters since it was loaded.

    Blocks are counted so that free + cached + used = total; cached blocks hold reusable prefixes, and are
    given out when free ones run out.

    kv_cache_usage: the part of the blocks that is used. kv_cache_waste: the part of their slots that holds no
    token. Host blocks hold what preempted sequences will copy back.
    num_drafts: times that a sequence had drafts to verify; num_draft_tokens: drafts in all;
    num_accepted_tokens: those of them that were right.
    """

    num_running: int
    num_waiting: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    kv_cache_usage: float
    kv_cache_waste: float
    kv_cache_bytes: int
    prompt_tokens: int
    generation_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    num_preemptions: int
    num_host_blocks: int = 0
    num_used_host_blocks: int = 0
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    num_steps: int
    num_failed_steps: int
    finished: dict[str, int]
    load_seconds: float
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
