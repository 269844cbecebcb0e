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

from hearth.engine.plan import Copies
from hearth.engine.request import Request
from hearth.engine.swap import HostPool


class BlockPool:
    """Gives out ``num_blocks`` blocks of ``block_size`` tokens each.

    window: the number of tokens that a query sees in the layer that sees most, itself included; 0 if one sees
        all. Blocks that every later query has out of sight go back to the pool.
    host: where the blocks of preempted sequences may be copied.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        window: int = 0,
        host: HostPool | None = None,
    ) -> None:
        assert num_blocks > 0
        assert block_size > 0
        assert prefix_cache or host is None, "the host pool finds blocks by the hashes of the prefix cache"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.window = window
        self.host = host
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; recently freed blocks are warm in cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._swap_out: list[tuple[int, int]] = []  # for the next plan
        self._swap_in: list[tuple[int, int]] = []
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

    def waste(self, running: Iterable[Request]) -> float:
        """The part of the used blocks' slots that hold no token: the ends of the sequences' last blocks."""
        empty = sum(len(r.block_ids) * self.block_size - r.num_computed for r in running)
        return empty / (self.num_used * self.block_size) if self.num_used else 0.0

    def count_released(self, request: Request, owners: Counter[int]) -> int:
        """Blocks that become available when ``request`` is released after those counted in ``owners``."""
        count = 0
        for block_id in request.live_block_ids:
            owners[block_id] += 1
            count += owners[block_id] == self._references[block_id]
        return count

    # -- giving out and taking back ----------------------------------------------------------------------
    def begin_step(self) -> None:
        """The copies of the last plan were made, or will never be. Blocks may have been taken since, for
        drafts; their copies go with the next plan."""
        if self.host is not None:
            self.host.begin_step()

    def take_copies(self) -> tuple[Copies, Copies]:
        """The copies out and in that the next plan must make before it computes."""
        copies = tuple(self._swap_out), tuple(self._swap_in)
        self._swap_out.clear()
        self._swap_in.clear()
        return copies

    def find(self, request: Request) -> list[int | None]:
        """The blocks with which ``request`` could begin; None for one that the host pool has.

        They hold at most ``len(tokens) - 1`` tokens: the last one must be computed to have something to
        sample.
        """
        if not self.prefix_cache or request.skip_prefix:
            return []
        limit = (len(request.tokens) - 1) // self.block_size
        self._extend_hashes(request, limit)
        found: list[int | None] = []
        for block_hash in request.block_hashes[:limit]:
            block_id = self._block_of.get(block_hash)
            if block_id is None and (self.host is None or block_hash not in self.host):
                break
            found.append(block_id)
        return found

    def num_missing(self, found: Sequence[int | None], num_tokens: int) -> int:
        """Available blocks that it takes to begin with ``found`` and go on up to ``num_tokens`` tokens."""
        in_use = sum(block_id is not None and self._references[block_id] > 0 for block_id in found)
        return self.blocks_for(num_tokens) - in_use

    def begin(self, request: Request, found: Sequence[int | None]) -> None:
        """Give ``request`` what `find` found just now; the caller has made sure that there is room."""
        assert not request.block_ids
        assert request.num_computed == 0
        for block_id in found:  # before anything is taken, which might take one of these
            if block_id is not None:
                if self._references[block_id] == 0:
                    del self._cached[block_id]
                self._references[block_id] += 1
        for i, found_id in enumerate(found):
            block_id = self._fetch(request.block_hashes[i]) if found_id is None else found_id
            request.block_ids.append(block_id)
        request.block_table = None
        request.num_committed = len(found)
        request.num_computed = len(found) * self.block_size
        self.unwant(request)

    def grow(self, request: Request, num_tokens: int, *, keep: int = 0) -> bool:
        """Give ``request`` blocks for ``num_tokens`` tokens, leaving ``keep`` available; all or nothing."""
        missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if missing <= 0:
            return True
        if missing + keep > self.num_available:
            return False
        request.block_ids.extend(self._take() for _ in range(missing))
        request.block_table = None
        return True

    def commit(self, request: Request) -> None:
        """Make the full blocks of computed tokens findable. A block that exists already stays private."""
        # Drafts are not committed: the next tokens may be others.
        num_full = min(request.num_computed, len(request.tokens)) // self.block_size
        if num_full <= request.num_committed or not self.prefix_cache:
            return
        self._extend_hashes(request, num_full)
        for i in range(request.num_committed, num_full):
            self._publish(request.block_ids[i], request.block_hashes[i])
        request.num_committed = num_full

    def slide(self, request: Request) -> None:
        """Give up the blocks that no token from ``num_computed`` on sees in any layer."""
        if not self.window:
            return
        num_passed = max(0, request.num_computed - self.window + 1) // self.block_size
        for i in range(request.num_dropped, num_passed):
            self._drop(request.block_ids[i])
            request.block_ids[i] = 0
            request.block_table = None
        request.num_dropped = max(request.num_dropped, num_passed)

    def trim(self, request: Request) -> None:
        """Take back blocks beyond the tokens of ``request``, which held drafts that were wrong."""
        while len(request.block_ids) > self.blocks_for(len(request.tokens)):
            block_id = request.block_ids.pop()
            assert self._references[block_id] == 1
            assert self._hash_of[block_id] is None
            self._drop(block_id)
            request.block_table = None

    def release(self, request: Request) -> None:
        """Take all blocks of ``request`` back, last first, so that a prefix outlives its continuations."""
        for block_id in reversed(request.live_block_ids):
            self._drop(block_id)
        request.block_ids.clear()
        request.block_table = None
        request.num_computed = request.num_committed = request.num_dropped = 0

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make these blocks unfindable: what they hold is wrong, or was never written."""
        for block_id in block_ids:
            self._unpublish(block_id)
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def reset_cache(self) -> None:
        """Forget every cached prefix."""
        self.forget(list(self._block_of.values()))

    # -- preemption by swapping --------------------------------------------------------------------------
    def count_lost(self, request: Request) -> int:
        """Findable blocks of ``request`` that nobody else holds: they would have to be computed anew."""
        committed = request.block_ids[request.num_dropped : request.num_committed]
        return sum(self._references[block_id] == 1 for block_id in committed)

    def want(self, request: Request) -> None:
        """Keep the blocks of ``request``, which is about to lose them, in host memory when they are taken.

        Without effect where the host pool has no room, or where windows have passed the first blocks: what
        is left of the chain could not be found.
        """
        assert self.host is not None
        assert not request.num_wanted
        hashes = request.block_hashes[: request.num_committed]
        if not request.num_dropped and not request.skip_prefix and self.host.want(hashes):
            request.num_wanted = len(hashes)

    def unwant(self, request: Request) -> None:
        """Let go of what the host pool keeps for ``request``."""
        if request.num_wanted:
            assert self.host is not None
            self.host.unwant(request.block_hashes[: request.num_wanted])
            request.num_wanted = 0

    def _fetch(self, block_hash: bytes) -> int:
        """A block into which the next step copies what the host pool has."""
        assert self.host is not None
        self._swap_in.append((self.host.fetch(block_hash), block_id := self._take()))
        self._publish(block_id, block_hash)
        return block_id

    # -- the inside --------------------------------------------------------------------------------------
    def _take(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            block_hash = self._hash_of[block_id]
            assert block_hash is not None
            slot = None if self.host is None else self.host.save(block_hash)
            if slot is not None:
                self._swap_out.append((block_id, slot))
            self._unpublish(block_id)
        assert self._references[block_id] == 0
        assert self._hash_of[block_id] is None
        self._references[block_id] = 1
        return block_id

    def _drop(self, block_id: int) -> None:
        """Take one reference away."""
        assert self._references[block_id] > 0, f"block {block_id} was released twice"
        self._references[block_id] -= 1
        if self._references[block_id] == 0:
            if self._hash_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

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
            hashes.append(hash_block(hashes[-1] if hashes else hash_root(request), chunk))

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
        assert all(r.block_table in (None, r.make_table()) for r in requests)
        owners = Counter(block_id for request in requests for block_id in request.live_block_ids)
        for block_id, count in enumerate(self._references):
            assert owners[block_id] == count, (
                f"block {block_id}: {owners[block_id]} owners, {count} references"
            )


def hash_root(request: Request) -> bytes:
    """Where the hash chain of a sequence begins: another adapter, salt or image, another chain."""
    parts = (request.adapter_hash, (request.params.cache_salt or "").encode(), request.extra)
    if not any(parts):
        return b""
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    # Personalised, so that no salt can be made that begins where the tokens of another tenant end.
    return hashlib.blake2b(message, digest_size=16, person=b"root").digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: its tokens and everything before them. Cryptographic, so that a tenant
    cannot construct a prompt that collides with another's."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest()
