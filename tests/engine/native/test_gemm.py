"""The compiled linear layers against float64 products, for every form of weight and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hearth.engine import native
from hearth.engine import quantize as portable
from hearth.engine.native import gemm
from hearth.engine.native.gemm import NativeWeight

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "-")

ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 31, 33, 48, 70)
SHAPES = ((1, 1), (16, 32), (33, 64), (48, 40), (100, 129), (70, 1100))  # N, K
ISA_NUMBERS = {"avx512": 1, "amx": 2}


@pytest.fixture(params=sorted(ISA_NUMBERS))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with each form of the kernels that this CPU has."""
    library = native.library()
    assert library is not None
    if library.functions.hearth_init(ISA_NUMBERS[request.param]) != ISA_NUMBERS[request.param]:
        pytest.skip(f"no {request.param} here")
    yield request.param
    library.functions.hearth_init(ISA_NUMBERS[library.isa])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def forms(weight_NK: torch.Tensor, bias_N: torch.Tensor) -> dict[str, tuple[NativeWeight, np.ndarray]]:
    """Each packed form of a weight, and the exact matrix that it stands for."""
    int8 = portable.quantize_int8(weight_NK)
    result = {
        "bf16": (gemm.pack_bf16(weight_NK, bias_N), weight_NK.double().numpy()),
        "int8": (gemm.pack_int8(int8, bias_N), int8.dequantize(torch.float64).numpy()),
    }
    for group in portable.GROUPS:
        int4 = portable.quantize_int4(weight_NK, group)
        result[f"int4/{group}"] = (gemm.pack_int4(int4, bias_N), int4.dequantize(torch.float64).numpy())
    return result


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_products_are_those_of_float64(num_outputs: int, num_inputs: int) -> None:
    bias_N = torch.randn(num_outputs, generator=torch.Generator().manual_seed(2))
    for name, (packed, weight_NK) in forms(random(num_outputs, num_inputs), bias_N).items():
        for rows in ROWS:
            x_MK = random(rows, num_inputs, seed=rows)
            x = x_MK.double().numpy()
            expected = x @ weight_NK.T + bias_N.double().numpy()
            got = packed.multiply(x_MK, out_dtype=torch.float32).numpy()
            # Against the sum of the magnitudes that were added: rounding of sums, and 15 bits of an input.
            size = np.abs(x) @ np.abs(weight_NK).T + np.abs(bias_N.numpy())
            if name != "bf16":
                size += 32 * np.abs(x).max(1, keepdims=True) * np.abs(weight_NK).sum(1)
            assert (np.abs(got - expected) <= 2e-6 * size).all(), (name, rows)


@pytest.mark.usefixtures("isa")
def test_rows_apart_bfloat16_out_and_accumulation() -> None:
    weight_NK, bias_N = random(45, 70), torch.randn(45, generator=torch.Generator().manual_seed(1))
    for rows in (1, 3, 20):
        x_MK = random(rows, 200)[:, 100:170]
        for name, (packed, exact_NK) in forms(weight_NK, bias_N).items():
            expected = torch.from_numpy(x_MK.double().numpy() @ exact_NK.T) + bias_N
            area = torch.full((rows, 64), 7.0, dtype=torch.bfloat16)
            result = packed.multiply(x_MK, area[:, 3:48])
            torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=0.02, msg=name)
            assert (area[:, :3] == 7).all()
            assert (area[:, 48:] == 7).all()
            before = random(rows, 45, seed=9).float()
            total = packed.multiply(x_MK, before.clone(), accumulate=True)
            torch.testing.assert_close(total.double(), before + expected, rtol=1e-4, atol=0.01, msg=name)


@pytest.mark.usefixtures("isa", "threads")
def test_long_inputs_are_cut_in_pieces_and_shared_by_rows() -> None:
    weight_NK, x_MK = random(64, 1600), random(1100, 1600, seed=1)
    for name, (packed, exact_NK) in forms(weight_NK, torch.zeros(64)).items():
        expected = x_MK.double().numpy() @ exact_NK.T
        got = packed.multiply(x_MK, out_dtype=torch.float32).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-2, err_msg=name)


@pytest.mark.usefixtures("isa")
def test_large_results_are_written_around_the_cache() -> None:
    weight_NK, x_MK, bias_N = random(1030, 40), random(1050, 40, seed=1), torch.arange(1030.0)
    for name, (packed, exact_NK) in forms(weight_NK, bias_N).items():
        expected = torch.from_numpy(x_MK.double().numpy() @ exact_NK.T) + bias_N
        aligned = torch.full((1050, 1056), 7.0, dtype=torch.bfloat16)
        assert aligned.data_ptr() % 64 == 0
        packed.multiply(x_MK, aligned[:, :1030])
        torch.testing.assert_close(aligned[:, :1030].double(), expected, rtol=2**-8, atol=0.02, msg=name)
        assert (aligned[:, 1030:] == 7).all()


@pytest.mark.usefixtures("isa")
def test_rows_are_independent_of_their_company() -> None:
    """The same row gives the same bits whatever else is in the batch, among rows of the same kernel."""
    for packed, _ in forms(random(40, 96), torch.zeros(40)).values():
        x_MK = random(50, 96)
        whole = packed.multiply(x_MK)
        assert torch.equal(whole[:7], packed.multiply(x_MK[:7]))
        assert torch.equal(packed.multiply(x_MK[:1]), packed.multiply(x_MK[:3])[:1])


def test_no_numbers_stay_no_numbers() -> None:
    x_MK = random(3, 64)
    x_MK[1, 5] = torch.nan
    x_MK[2, 7] = torch.inf
    for name, (packed, _) in forms(random(20, 64), torch.zeros(20)).items():
        out = packed.multiply(x_MK)
        assert out[0].isfinite().all(), name
        assert out[1].isnan().all(), name
        assert not out[2].isfinite().any(), name


def test_no_numbers_in_a_weight_are_not_lost_in_quantising() -> None:
    for value in (torch.nan, torch.inf):
        weight_NK = random(20, 100)
        weight_NK[4, 7] = value
        for packed in (
            gemm.pack_int8(gemm.quantize_int8(weight_NK)), gemm.pack_int4(gemm.quantize_int4(weight_NK))
        ):  # fmt: skip
            out = packed.multiply(random(6, 100))
            assert not out[:, 4].isfinite().any()
            assert out[:, [0, 3, 5, 19]].isfinite().all()


def test_empty_input_and_more_dimensions() -> None:
    packed = gemm.pack_bf16(random(8, 32))
    assert packed.multiply(random(0, 32)).shape == (0, 8)
    assert packed.multiply(random(2, 3, 32)).shape == (2, 3, 8)


@pytest.mark.parametrize("shape", [(5, 64), (33, 100), (64, 256)])
def test_compiled_quantisation_is_as_good_as_the_portable_one(shape: tuple[int, int]) -> None:
    weight_NK = random(*shape)
    weight_NK[3] = 0
    weight_NK[0, 0] = 40  # an outlier
    ours, theirs = gemm.quantize_int8(weight_NK), portable.quantize_int8(weight_NK)
    assert torch.equal(ours.scale_N, theirs.scale_N)
    assert (ours.codes_NK.int() - theirs.codes_NK.int()).abs().max() <= 1
    for group in portable.GROUPS:
        error = [
            (form.dequantize(torch.float32) - weight_NK.float()).square().mean().item()
            for form in (gemm.quantize_int4(weight_NK, group), portable.quantize_int4(weight_NK, group))
        ]
        assert error[0] == pytest.approx(error[1], rel=1e-3)


INTERLEAVED = """
import torch
from hearth.engine.native import gemm
torch.manual_seed(0)
w, x = torch.randn(256, 256).bfloat16(), torch.randn(64, 256).bfloat16()
packed, blocked = gemm.pack_bf16(w), torch.ops.mkldnn._reorder_linear_weight(w, None)
first = packed.multiply(x), torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
for _ in range(50):
    assert torch.equal(packed.multiply(x), first[0])
    assert torch.equal(torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], ""), first[1])
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
assert len(runtimes) == 1, runtimes
"""


def test_tile_registers_and_threads_are_shared_with_onednn() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", INTERLEAVED], env=environment, check=True)
