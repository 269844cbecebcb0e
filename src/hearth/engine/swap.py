"""The host pool: ordinary memory to which blocks of preempted sequences are copied, if that is cheaper than
computing them anew. Bookkeeping only; `hearth.engine.hostcopy` holds and copies the bytes.

A preempted sequence leaves its blocks in the prefix cache and *wants* them back. As long as nobody takes
them, nothing is copied. A wanted block that is taken is copied out first, and copied in when the sequence
returns; so a sequence of which half was overwritten costs half the copies. Slots are named by the same hashes
as blocks, and a slot lives exactly as long as somebody wants it. Every wanted block has a slot in reserve,
so a sequence is never saved in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hearth.engine.plan import Plan

_MIN_TOKENS = 16  # a step of fewer takes the time of reading the weights, whatever their number


@dataclass
class Costs:
    """What copying and computing cost here, measured; None while nothing was measured."""

    bytes_per_second: float | None = None  # between a block and a slot
    seconds_per_token: float | None = None  # of a prompt

    def observe(self, plan: Plan, seconds: float) -> None:
        """Take note of an executed step, if it mostly computed prompts. A moving average, so that a first
        step, which compiles kernels, is soon forgotten."""
        num_tokens = plan.num_tokens
        if num_tokens < _MIN_TOKENS or num_tokens < 2 * len(plan.rows):
            return
        cost = seconds / num_tokens
        known = self.seconds_per_token
        self.seconds_per_token = cost if known is None else 0.7 * known + 0.3 * cost


def swapping_is_cheaper(num_bytes: int, num_tokens: int, costs: Costs) -> bool:
    """Whether copying ``num_bytes`` out and in again takes less time than computing ``num_tokens``.

    As long as one of them was not measured, it counts as free.
    """
    copying = 2 * num_bytes / costs.bytes_per_second if costs.bytes_per_second else 0.0
    return copying < num_tokens * (costs.seconds_per_token or 0.0)


class HostPool:
    """``num_slots`` slots, each as large as a block in all layers: free + stored + draining = total."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._wanted: dict[bytes, int] = {}  # how many sequences want this block back
        self._draining: list[int] = []  # read by the step under way; free when the next one is planned
        self.num_copied_out = 0
        self.num_copied_in = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_stored(self) -> int:
        return len(self._slot_of)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def begin_step(self) -> None:
        self._free.extend(self._draining)
        self._draining.clear()

    def want(self, hashes: Sequence[bytes]) -> bool:
        """Keep these blocks from now on; all of them, or none if there are not slots enough."""
        missing = sum(block_hash not in self._wanted for block_hash in hashes)
        if len(self._wanted) + len(self._draining) + missing > self.num_slots:
            return False
        for block_hash in hashes:
            self._wanted[block_hash] = self._wanted.get(block_hash, 0) + 1
        return True

    def unwant(self, hashes: Iterable[bytes]) -> None:
        """One sequence needs these no more. Slots without a taker are free after the step under way."""
        for block_hash in hashes:
            self._wanted[block_hash] -= 1
            if self._wanted[block_hash] == 0:
                del self._wanted[block_hash]
                slot = self._slot_of.pop(block_hash, None)
                if slot is not None:
                    self._draining.append(slot)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slot_of

    def save(self, block_hash: bytes) -> int | None:
        """A slot for a block that is about to be overwritten; None if nobody wants it or it is saved."""
        if block_hash not in self._wanted or block_hash in self._slot_of:
            return None
        slot = self._slot_of[block_hash] = self._free.pop()
        self.num_copied_out += 1
        return slot

    def fetch(self, block_hash: bytes) -> int:
        """The slot to copy this block in from."""
        self.num_copied_in += 1
        return self._slot_of[block_hash]

    def forget(self, slots: Iterable[int]) -> None:
        """The step that should have filled these slots failed."""
        gone = set(slots)
        for block_hash in [h for h, slot in self._slot_of.items() if slot in gone]:
            self._free.append(self._slot_of.pop(block_hash))

    def check(self, wanting: Iterable[Sequence[bytes]] = ()) -> None:
        """Assert every invariant; ``wanting``: for each waiting sequence the hashes that it wants."""
        slots = [*self._free, *self._slot_of.values(), *self._draining]
        assert sorted(slots) == list(range(self.num_slots)), "a slot was lost or is in two places"
        assert set(self._slot_of) <= set(self._wanted)
        assert len(self._wanted) + len(self._draining) <= self.num_slots
        counts: dict[bytes, int] = {}
        for hashes in wanting:
            for block_hash in hashes:
                counts[block_hash] = counts.get(block_hash, 0) + 1
        assert counts == self._wanted
