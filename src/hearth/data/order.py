"""The order of the rows as a pure function: nothing to save, nothing to replay.

``row_index`` is a keyed permutation of ``0 … num_rows - 1``, so the row at any position of any epoch is known
without a shuffled list: O(1) memory, random access, and the same order for any number of readers. It is a
balanced Feistel network over the smallest even-sized power of two that holds all rows; results that fall
outside are fed back in until one lies inside ("cycle walking", Black and Rogaway 2002), which keeps it a
bijection.
"""

from __future__ import annotations

import functools
import hashlib

NUM_ROUNDS = 6
_MASK64 = (1 << 64) - 1


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"hearth.order/{seed}/{epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(NUM_ROUNDS))


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def row_index(seed: int, epoch: int, position: int, num_rows: int) -> int:
    """Row to read at ``position`` (0 ≤ position < num_rows) of ``epoch``; a bijection for each key."""
    assert 0 <= position < num_rows, f"position {position} is not in [0, {num_rows})"
    half_bits = max(2, ((num_rows - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for key in keys:
            left, right = right, left ^ (_mix((right + key) & _MASK64) & half_mask)
        value = (left << half_bits) | right
        if value < num_rows:
            return value


def consumed_row_index(seed: int, num_consumed: int, num_rows: int) -> int:
    """Row that comes after ``num_consumed`` rows have been trained on, across epoch boundaries."""
    epoch, position = divmod(num_consumed, num_rows)
    return row_index(seed, epoch, position, num_rows)
