"""The norm of all gradients over two processes, beside one process in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hearth.parallel.meeting import leave
from hearth.training.clipping import clip_by_norm, scale, total_norm

NORM = 3.5


def whole_gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "rows": draw(5, 3),  # 5 rows over 2 processes: uneven
        "columns": draw(4, 6),
        "replicated": draw(7),
        "partial": draw(3, 3),
        "other mesh": draw(6, 2),
        "strided": draw(4, 3),
        "plain": draw(11),
    }


def spread_gradients(whole: dict[str, Tensor], rank: int) -> list[Tensor]:
    """The same gradients on two meshes of both processes, and a plain tensor."""
    one, two = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)), init_device_mesh("cpu", (1, 2))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "tp"))
    part = whole["partial"] * (0.25 if rank == 0 else 0.75)
    return [
        distribute_tensor(whole["rows"], one, [Shard(0)]),
        distribute_tensor(whole["columns"], one, [Shard(1)]),
        distribute_tensor(whole["replicated"], one, [Replicate()]),
        DTensor.from_local(part, one, [Partial()]),
        distribute_tensor(whole["other mesh"], two, [Replicate(), Shard(0)]),
        # What FSDP2 makes of a weight that tensor parallelism has split by rows.
        distribute_tensor(whole["strided"], both, [_StridedShard(0, split_factor=1), Shard(0)]),
        whole["plain"].clone(),
    ]


def in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        whole = whole_gradients()
        gradients = spread_gradients(whole, rank)
        norm = total_norm(gradients)
        clip_by_norm(gradients, NORM, norm)
        partial = gradients.pop(3)
        assert isinstance(partial, DTensor)
        clipped = [g.full_tensor() if isinstance(g, DTensor) else g for g in [*gradients, partial]]
        torch.save({"norm": norm, "clipped": clipped}, f"{folder}/rank{rank}.pt")
    finally:
        leave()


@pytest.mark.slow
def test_two_meshes_and_plain_tensors_give_the_norm_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    whole = whole_gradients()
    expected = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
    whole["partial"] = whole.pop("partial")  # last, as in the processes
    assert expected > NORM
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["norm"].item() == pytest.approx(expected, rel=1e-14)
        for clipped, gradient in zip(found["clipped"], whole.values(), strict=True):
            torch.testing.assert_close(clipped, gradient * NORM / expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_process_as_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)]
    expected = torch.nn.utils.get_total_norm([g.double() for g in gradients])
    assert float(total_norm(gradients)) == pytest.approx(float(expected), rel=1e-6)


def test_half_precision_does_not_overflow() -> None:
    assert float(total_norm([torch.full((100,), 3e4, dtype=torch.float16)])) == pytest.approx(3e5, rel=1e-3)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    gradient = torch.tensor([0.3, 0.4])
    clip_by_norm([gradient], 1.0, total_norm([gradient]))
    assert gradient.tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_norm(bad: float) -> None:
    assert not math.isfinite(float(total_norm([torch.ones(3), torch.tensor([bad])])))


def test_nothing_has_norm_zero() -> None:
    assert float(total_norm([])) == 0.0
    scale([], 2.0)


def test_clipping_as_torch() -> None:
    torch.manual_seed(1)
    weights = [torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(6))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    ours = [weight.grad.clone() for weight in weights if weight.grad is not None]
    expected = torch.nn.utils.clip_grad_norm_(weights, 0.7)
    norm = total_norm(ours)
    clip_by_norm(ours, 0.7, norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for gradient, weight in zip(ours, weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad)
