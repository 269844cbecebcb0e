"""What guesses tokens, and how many guesses a step has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hearth.engine.pool import BlockPool
from hearth.engine.request import Request


class Drafter(Protocol):
    """Fills ``draft_ids`` of requests before a step is planned, and hears afterwards which were right."""

    def propose(self, allowance: Mapping[Request, int], running: Sequence[Request]) -> bool:
        """Give each request of ``allowance`` at most so many drafts, or none.

        ``running``: all sequences under way, those that compute their prompts among them. Returns whether
        this took its usual time, and not that of catching up on tokens which went by without drafts.
        """

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Take note that of ``num_drafts`` drafts the first ``num_accepted`` were right."""


def grant(
    running: Sequence[Request], pool: BlockPool, max_num_batched_tokens: int, num_draft_tokens: int
) -> dict[Request, int]:
    """How many drafts each decoding sequence may have in the next step (sequences with none left out).

    Drafts are never the reason that another sequence waits or loses its blocks: they take at most half of
    the tokens that are left when every running sequence has one, and only blocks that are left when every
    running sequence has all that it could use in this step. They never pass the end of their own sequence:
    n accepted drafts give n + 1 tokens.
    """
    tokens = max(0, max_num_batched_tokens - len(running)) // 2
    blocks = pool.num_available
    for request in running:
        end = min(len(request.tokens), request.num_computed + max_num_batched_tokens)
        blocks -= max(0, pool.blocks_for(end) - len(request.block_ids))
    allowance: dict[Request, int] = {}
    if blocks < 0:  # somebody will lose blocks as it is
        return allowance
    for request in running:
        # Only a sequence that has an output: the last token of a prompt looks like a decode too.
        if not request.is_decoding or not request.num_output_tokens:
            continue
        length = len(request.tokens)
        count = min(num_draft_tokens, tokens, request.max_new_tokens - request.num_output_tokens - 1)
        room = (pool.blocks_for(length) + blocks) * pool.block_size - length
        count = min(count, room)
        if count > 0:
            allowance[request] = count
            tokens -= count
            blocks -= pool.blocks_for(length + count) - pool.blocks_for(length)
    return allowance
