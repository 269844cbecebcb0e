"""Every way of attention against float64, over ragged batches with shuffled blocks."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hearth.engine.attention.layer import LayerSpec
from hearth.engine.native import library, why_not

SPECS = {
    "grouped": LayerSpec(4, 2, 128, 128, 0.09),
    "one head each": LayerSpec(3, 3, 32, 32, 0.2),
    "groups of 4, softcap": LayerSpec(4, 1, 96, 96, 0.3, softcap=2.0),
    "groups of 8, window": LayerSpec(8, 1, 64, 64, 0.12, window=37),
    "window of a block, sinks": LayerSpec(4, 2, 32, 32, 0.2, window=32, sinks=True),
    "wide, value dim differs": LayerSpec(2, 1, 256, 160, 0.06, window=300, sinks=True),
}
ODD_SPECS = {
    "odd sizes": LayerSpec(6, 3, 12, 20, 0.3),
    "odd sizes, every rule": LayerSpec(4, 2, 24, 40, 0.2, window=9, softcap=3.0, sinks=True),
}
# bfloat16: the output and each probability are rounded to 8 bits. int8 values are compared with float64 on
# the quantised ones, so what quantising costs is not in it (but for the ties of its rounding).
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
QUANTISED = 4e-2


@pytest.fixture(params=["amx", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both instruction sets of the compiled kernels, where the machine has them."""
    native = library()
    if native is None:
        pytest.skip(why_not())
    assert isinstance(native.functions, ctypes.CDLL)
    chosen = native.functions.hearth_init({"avx512": 1, "amx": 2}[request.param])
    if chosen != {"avx512": 1, "amx": 2}[request.param]:
        pytest.skip("no AMX here")
    yield request.param
    native.functions.hearth_init({"avx512": 1, "amx": 2}[native.isa])


def assert_right(batch: Any, tolerance: float) -> None:
    for part in (0, 1):
        errors = batch.errors(part)
        assert all(error <= tolerance for error in errors.values()), (part, errors)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", SPECS)
def test_native_equals_float64(name: str, kv_dtype: str, isa: str, batch_of: Any) -> None:
    block_size = 64 if name == "grouped" else 32
    batch = batch_of(SPECS[name], "native", torch.bfloat16, block_size=block_size, kv_dtype=kv_dtype)
    assert_right(batch, TOLERANCE[torch.bfloat16] if kv_dtype == "auto" else QUANTISED)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["numba", "torch"])
@pytest.mark.parametrize("name", [*ODD_SPECS, "groups of 8, window"])
def test_portable_paths_equal_float64(
    name: str, path: str, dtype: torch.dtype, kv_dtype: str, batch_of: Any
) -> None:
    spec = {**SPECS, **ODD_SPECS}[name]
    batch = batch_of(spec, path, dtype, block_size=8, kv_dtype=kv_dtype)
    assert_right(batch, TOLERANCE[dtype] if kv_dtype == "auto" else QUANTISED)


def test_native_result_depends_on_the_sequence_alone(isa: str, batch_of: Any) -> None:
    """Not on the number of threads, and not on what else is in the batch or in which order."""
    outs = []
    threads = torch.get_num_threads()
    try:
        for num_threads, order in (
            (1, list(range(16))),
            (2, list(range(16))),
            (3, list(range(15, -1, -1))),
            (2, [6]),
        ):
            torch.set_num_threads(num_threads)
            batch = batch_of(SPECS["grouped"], "native", torch.bfloat16)
            batch.run(0, order)
            batch.generator.manual_seed(5)
            first = order.index(6)
            queries = batch.lengths  # the query of sequence 6 must be the same in each run
            assert queries[6] == (1027, 3)
            outs.append(batch.run(1, [6, *(i for n, i in enumerate(order) if n != first)])[6])
    finally:
        torch.set_num_threads(threads)
    for query, out in outs[1:]:
        assert torch.equal(query, outs[0][0])
        assert torch.equal(out, outs[0][1])


@pytest.mark.parametrize("path", ["native", "numba", "torch"])
def test_nan_in_a_sequence_stays_in_it_and_stays_visible(path: str, batch_of: Any) -> None:
    if path == "native" and library() is None:
        pytest.skip(why_not())
    for kv_dtype, name in itertools.product(("auto", "int8"), ("one head each", "groups of 4, softcap")):
        batch = batch_of(SPECS[name], path, torch.bfloat16, kv_dtype=kv_dtype, lengths=[(5, 1), (40, 20)])
        batch.keys[0][2, 0, 3] = float("nan")  # not the last of its lane of 16
        batch.run(0, [0, 1])
        out = batch.run(1, [0, 1])
        assert out[0][1].isnan().any()
        assert out[1][1].isfinite().all()
