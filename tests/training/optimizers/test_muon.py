"""Orthogonalisation, of matrices and of stacks of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hearth.parallel.meeting import leave
from hearth.training.optimizers.muon import MuonWithAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    # The iteration is tuned for speed: Jordan 2024 gives 0.7 to 1.2 for all but tiny values.
    assert values.max() < 1.3
    assert values[: len(values) * 3 // 4].min() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ orthogonalize(matrix).float() @ right.T
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 0.05


def test_torchs_iteration_gives_the_same() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrix = torch.randn(24, 40)
    expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(orthogonalize(matrix).float(), expected.float(), rtol=0, atol=0.03)


def test_a_stack_of_experts_is_orthogonalised_one_by_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    together = orthogonalize(stack)
    for index in range(3):
        torch.testing.assert_close(together[index], orthogonalize(stack[index]), rtol=0, atol=0.02)


def test_the_size_of_an_update_is_that_of_adamw() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn_like(weight)
    group = {"params": [weight], "hidden": True, "weight_decay": 0.0}
    MuonWithAdamW([group], lr=1.0, betas=(0.9, 0.95), eps=1e-8).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        matrix, embedding, gradients = start()
        spread = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in (matrix, embedding)]
        for weight, gradient in zip(spread, gradients, strict=True):
            weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        updated = step(spread)
        whole = [weight.full_tensor() for weight in updated if isinstance(weight, DTensor)]
        if rank == 0:
            torch.save(whole, f"{folder}/whole.pt")
    finally:
        leave()


def start() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A hidden matrix, an embedding, and their gradients; rows that two processes cannot share evenly."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(9, 6, generator=generator) for _ in range(4)]
    return tensors[0], tensors[1], tensors[2:]


def step(weights: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    groups = [
        {"params": [weights[0]], "hidden": True, "weight_decay": 0.1},
        {"params": [weights[1]], "hidden": False, "weight_decay": 0.1},
    ]
    MuonWithAdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8).step()
    return [weight.detach() for weight in weights]


@pytest.mark.slow
def test_spread_over_two_processes_it_does_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    matrix, embedding, gradients = start()
    weights = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(embedding.clone())]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    expected = step(weights)
    found = torch.load(tmp_path / "whole.pt")
    assert not torch.equal(expected[0], matrix)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference)
