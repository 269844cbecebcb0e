"""The pool of KV blocks: reference counts, and a prefix cache by hash chain.

A block is in exactly one of three states, and ``free + cached + used = total`` always holds:
free (no content of value), cached (no owner, but its content can be found by hash; given out last, least
recently used first), used (one or more owners). Only full blocks of committed tokens are ever shared, so a
shared block is never written. Block ids are plain integers; the tensors live in
`hearth.engine.attention.layer`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from hearth.engine.request import Request


class BlockPool:
    """Gives out ``num_blocks`` blocks of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; recently freed blocks are warm in cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.query_tokens = 0
        self.hit_tokens = 0

    # -- counts ------------------------------------------------------------------------------------------
    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be given out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- giving out and taking back ----------------------------------------------------------------------
    def match(self, request: Request) -> int:
        """Give ``request`` the cached blocks that its tokens begin with; return how many tokens they hold.

        At most ``len(tokens) - 1`` tokens match: the last one must be computed to have something to sample.
        """
        assert not request.block_ids
        assert request.num_computed == 0
        if not self.prefix_cache:
            return 0
        limit = (len(request.tokens) - 1) // self.block_size
        self._extend_hashes(request, limit)
        for block_hash in request.block_hashes[:limit]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            if self._references[block_id] == 0:
                del self._cached[block_id]
            self._references[block_id] += 1
            request.block_ids.append(block_id)
        request.num_committed = len(request.block_ids)
        request.num_computed = request.num_committed * self.block_size
        return request.num_computed

    def grow(self, request: Request, num_tokens: int, *, keep: int = 0) -> bool:
        """Give ``request`` blocks for ``num_tokens`` tokens, leaving ``keep`` available; all or nothing."""
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        if missing + keep > self.num_available:
            return False
        request.block_ids.extend(self._take() for _ in range(missing))
        return True

    def commit(self, request: Request) -> None:
        """Make the full blocks of computed tokens findable. A block that exists already stays private."""
        if not self.prefix_cache:
            return
        # Drafts are not committed: the next tokens may be others.
        num_full = min(request.num_computed, len(request.tokens)) // self.block_size
        self._extend_hashes(request, num_full)
        for i in range(request.num_committed, num_full):
            self._publish(request.block_ids[i], request.block_hashes[i])
        request.num_committed = max(request.num_committed, num_full)

    def trim(self, request: Request) -> None:
        """Take back blocks beyond the tokens of ``request``, which held drafts that were wrong."""
        while len(request.block_ids) > self.blocks_for(len(request.tokens)):
            block_id = request.block_ids.pop()
            assert self._references[block_id] == 1
            assert self._hash_of[block_id] is None
            self._references[block_id] = 0
            self._free.append(block_id)

    def release(self, request: Request) -> None:
        """Take all blocks of ``request`` back, last first, so that a prefix outlives its continuations."""
        for block_id in reversed(request.block_ids):
            assert self._references[block_id] > 0, f"block {block_id} was released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if self._hash_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None
        request.block_ids.clear()
        request.num_computed = request.num_committed = 0

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make these blocks unfindable: a step that should have written them failed."""
        for block_id in block_ids:
            self._unpublish(block_id)
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def reset_cache(self) -> None:
        """Forget every cached prefix."""
        self.forget(list(self._block_of.values()))

    # -- the inside --------------------------------------------------------------------------------------
    def _take(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._unpublish(block_id)
        assert self._references[block_id] == 0
        assert self._hash_of[block_id] is None
        self._references[block_id] = 1
        return block_id

    def _publish(self, block_id: int, block_hash: bytes) -> None:
        if self._hash_of[block_id] is None and block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id

    def _unpublish(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            self._hash_of[block_id] = None
            del self._block_of[block_hash]

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes = request.block_hashes
        for i in range(len(hashes), num_blocks):
            chunk = request.tokens[i * self.block_size : (i + 1) * self.block_size]
            hashes.append(hash_block(hashes[-1] if hashes else b"", chunk))

    def check(self, requests: Sequence[Request] = ()) -> None:
        """Assert every invariant; with ``requests``, that they own exactly the used blocks."""
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached
        assert all(self._references[i] == 0 for i in free | cached)
        assert all(self._hash_of[i] is None for i in free)
        assert all(self._hash_of[i] is not None for i in cached)
        assert {i for i, h in enumerate(self._hash_of) if h is not None} == set(self._block_of.values())
        owners = Counter(block_id for request in requests for block_id in request.block_ids)
        for block_id, count in enumerate(self._references):
            assert owners[block_id] == count, (
                f"block {block_id}: {owners[block_id]} owners, {count} references"
            )


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: its tokens and everything before them. Cryptographic, so that a tenant
    cannot construct a prompt that collides with another's."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest()
