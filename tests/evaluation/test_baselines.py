"""The baselines against the real `xz` program and scipy's entropy."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from scipy.stats import entropy

from hearth.evaluation.baselines import order0_bits_per_byte, xz_bits_per_byte

TEXT = ("def area(width, height):\n    return width * height\n\n" * 40).encode() + bytes(range(256))


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz program is not installed")
def test_xz_matches_the_program() -> None:
    packed = subprocess.run(["xz", "-9", "--stdout"], input=TEXT, capture_output=True, check=True).stdout
    # The program and liblzma may choose different integrity checks; that is a few bytes.
    assert xz_bits_per_byte(TEXT) == pytest.approx(8 * len(packed) / len(TEXT), abs=8 * 64 / len(TEXT))


def test_order0_is_the_entropy_of_the_bytes() -> None:
    counts = np.bincount(np.frombuffer(TEXT, dtype=np.uint8), minlength=256)
    assert order0_bits_per_byte(TEXT) == pytest.approx(entropy(counts, base=2))
    assert order0_bits_per_byte(b"aaaa") == 0.0
    assert order0_bits_per_byte(bytes(range(256))) == pytest.approx(8.0)
