"""One sequence on its way through the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from hearth.engine.params import SamplingParams


class RequestState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """Tokens, how many of them are computed, and the blocks that hold their keys and values.

    A request for n sequences becomes n of these, with the same ``request_id`` and different ``index``.
    There are no phases: prefill, a chunk of it, decode and recomputation after a preemption are all
    "``num_computed`` catches up with ``len(tokens)``".

    adapter_hash, extra: what else than tokens and salt the keys and values depend on: the content of a LoRA
        adapter, and of images or the like. Only sequences that agree in all of them share blocks.
    skip_prefix: compute every position, because more than the last one is wanted (log-probabilities of the
        prompt, mean pooling). Such a sequence begins at 0 again after a preemption.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_new_tokens: int  # max_tokens, cut at the context length
    adapter_hash: bytes = b""
    extra: bytes = b""
    skip_prefix: bool = False
    pooling: str | None = None  # of an embedding request, which samples nothing
    num_scored: int = 0  # prompt positions whose log-probabilities are known, where they are wanted
    arrival: int = 0
    is_promoted: bool = False  # others went first too often: from now on nobody does
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_committed: int = 0  # full blocks that the prefix cache has seen
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    draft_ids: list[int] = field(default_factory=list)  # guesses that the next step shall verify
    block_ids: list[int] = field(default_factory=list)
    num_dropped: int = 0  # leading blocks that the windows have passed; block_ids has 0 in their places
    block_hashes: list[bytes] = field(default_factory=list)
    block_table: tuple[int, ...] | None = None  # block_ids for plans, while they have not changed
    num_wanted: int = 0  # leading block_hashes that the host pool keeps for the return from a preemption
    state: RequestState = RequestState.WAITING
    num_preemptions: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        assert self.prompt_token_ids, "an empty prompt must be refused before a request is made"
        self.tokens = list(self.prompt_token_ids)

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.index)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Smaller goes first."""
        if self.is_promoted:
            return (False, 0, self.arrival)
        return (True, self.params.priority, self.arrival)

    @property
    def live_block_ids(self) -> list[int]:
        return self.block_ids[self.num_dropped :]

    def make_table(self) -> tuple[int, ...]:
        """``block_ids`` for a plan. Kernels that gather before they mask read the places of dropped blocks
        too; there they find a block of the sequence's own, as others' may hold NaN."""
        live = self.live_block_ids
        return (*live[:1] * self.num_dropped, *live)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not all known; sequence 0 has them."""
        if self.params.prompt_logprobs is None or self.index > 0:
            return False
        return self.num_scored < self.num_prompt_tokens - 1

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next step could compute, drafts among them."""
        return len(self.tokens) + len(self.draft_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all tokens but the one sampled last are computed."""
        return len(self.tokens) - self.num_computed == 1
