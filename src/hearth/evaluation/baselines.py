"""What a text costs without a language model: `xz -9` and an order-0 model, in bits per byte."""

from __future__ import annotations

import lzma

import numpy as np


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of the .xz file that `xz -9` writes for ``data``."""
    assert data, "xz_bits_per_byte needs data"
    return 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9)) / len(data)


def order0_bits_per_byte(data: bytes) -> float:
    """Entropy of the byte frequencies of ``data`` itself.

    It flatters the order-0 model a little: its table of frequencies is taken as known.
    """
    assert data, "order0_bits_per_byte needs data"
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum())
