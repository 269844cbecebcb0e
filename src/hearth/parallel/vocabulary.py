"""The embedding and the output layer under tensor parallelism: every process has some of the words.

The probabilities of a position need three numbers of each process: its largest logit, the sum of its
exponentials, and the logit of the label if the label is one of its words (Shoeybi et al. 2019,
"Megatron-LM", section 3). Logits themselves stay where they are, unless someone asks the output layer for
them. Words need not divide: the last processes have fewer, or none.

Shape suffixes: P positions, D hidden size, V words of all processes, W those of this process, G processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hearth.parallel.exchange import Bound, Group, add_up, copy_to, own_weights


@dataclass(frozen=True)
class Words:
    """Which of ``vocab_size`` words this process has: ``num`` from ``first``. None has more than ``most``."""

    vocab_size: int
    group: Group

    @property
    def most(self) -> int:
        """Words of the first process."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    @property
    def first(self) -> int:
        """The first word."""
        return min(self.vocab_size, dist.get_rank(self.group) * self.most)

    @property
    def num(self) -> int:
        """How many there are."""
        return min(self.most, self.vocab_size - self.first)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of words within this process's part, 0 for those of others; and which are its own."""
        local = ids - self.first
        mine = (local >= 0) & (local < self.num)
        return local.masked_fill(~mine, 0), mine

    def picked(self, scores_PW: Tensor, labels_P: Tensor) -> Tensor:
        """The scores of the labels, [P]; 0 for labels of others."""
        if self.num == 0:
            return scores_PW.new_zeros(len(scores_PW))
        local_P, mine_P = self.own(labels_P)
        return scores_PW.gather(1, local_P[:, None])[:, 0].masked_fill_(~mine_P, 0.0)

    def add_at(self, scores_PW: Tensor, labels_P: Tensor, values_P: Tensor) -> None:
        """Add values at the labels that are this process's own."""
        if self.num > 0:
            local_P, mine_P = self.own(labels_P)
            scores_PW.scatter_add_(1, local_P[:, None], values_P.masked_fill(~mine_P, 0.0)[:, None])

    def everywhere(self, *values_P: Tensor) -> Tensor:
        """What each process has of each value, [values, G, P]."""
        own = torch.stack(values_P)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.stack(parts, dim=1)

    def cross_entropies(self, scores_PW: Tensor, labels_P: Tensor, *, grad: bool) -> Tensor:
        """Losses of all P positions, [P]. The scores are used up; with ``grad`` they become its gradients."""
        picked_P = self.picked(scores_PW, labels_P)
        none_P = torch.full_like(picked_P, -torch.inf)
        largest_P = scores_PW.amax(-1) if self.num > 0 else none_P
        sums_P = scores_PW.sub_(largest_P[:, None]).exp_().sum(-1)
        largest_GP, sums_GP, picked_GP = self.everywhere(largest_P, sums_P, picked_P)
        top_P = largest_GP.amax(0)
        total_P = (sums_GP * (largest_GP - top_P).exp()).sum(0)
        if grad:
            scores_PW.mul_(((largest_P - top_P).exp() / total_P)[:, None])
            self.add_at(scores_PW, labels_P, torch.full_like(picked_P, -1.0))
        losses_P: Tensor = total_P.log() + top_P - picked_GP.sum(0)
        return losses_P

    def normalised(self, scores_PW: Tensor, labels_P: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the sum of all exponentials, and the log-probability of the labels; both [P]."""
        sums_GP, picked_GP = self.everywhere(scores_PW.logsumexp(-1), self.picked(scores_PW, labels_P))
        normaliser_P = sums_GP.logsumexp(0)
        return normaliser_P, picked_GP.sum(0) - normaliser_P

    def total(self, values_P: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.everywhere(values_P)[0].sum(0)


def words_of(weight: Tensor) -> Words | None:
    """Which words of an output matrix are this process's; None where it has them all."""
    if not isinstance(weight, DTensor):
        return None
    assert weight.device_mesh.ndim == 1, "the weight is in use, so that it is whole but for its words"
    return Words(weight.shape[0], weight.device_mesh.get_group())


def own_part(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Words | None]:
    """What a product with an output matrix is made of here. The gradient of ``hidden`` is added up."""
    words = words_of(weight)
    if words is None:
        return hidden, weight, None
    return copy_to(hidden, words.group), cast(Any, weight).to_local(), words


class _GatherWords(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Words) -> Tensor:
        ctx.words = words
        padded = x.new_zeros(*x.shape[:-1], words.most)
        padded[..., : words.num] = x
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(words.group))]
        dist.all_gather(parts, padded, group=words.group)
        return torch.cat(parts, dim=-1)[..., : words.vocab_size]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        words = ctx.words
        return grads[0][..., words.first : words.first + words.num].contiguous(), None


def cut_vocabulary(model: Any, mesh: Any) -> None:
    """Give every process some of the words of the embedding and of the output layer, tied or not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts: list[nn.Embedding | nn.Linear] = []
    if isinstance(embedding, nn.Embedding):
        parts.append(embedding)
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        parts.append(head)
    tied = head is not None and getattr(embedding, "weight", None) is head.weight
    if tied and len(parts) < 2:
        return
    made: dict[int, nn.Parameter] = {}
    for module in parts:
        words = Words(module.weight.shape[0], mesh.get_group())
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = made.setdefault(id(weight), _cut(weight, mesh))
        run = _look_up if isinstance(module, nn.Embedding) else _all_logits
        wrapped: Any = module
        wrapped.forward = Bound(run, module, words)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            at = module.padding_idx - words.first
            module.padding_idx = at if 0 <= at < words.num else None


def _cut(weight: nn.Parameter, mesh: Any) -> nn.Parameter:
    cut = distribute_tensor(weight.data, mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(cut, requires_grad=weight.requires_grad)


def _look_up(module: nn.Module, forward: Callable[[Tensor], Tensor], words: Words, input: Tensor) -> Tensor:
    """Vectors of this process's words, added up: the others give zeros. ``input`` as torch calls it."""
    local, mine = words.own(input)
    with own_weights(module) as weights:
        if words.num == 0:
            weights["weight"] = F.pad(weights["weight"], (0, 0, 0, 1))
        found = forward(local)
    return add_up(found.masked_fill(~mine[..., None], 0.0), words.group)


def _all_logits(
    module: nn.Module, forward: Callable[[Tensor], Tensor], words: Words, input: Tensor
) -> Tensor:
    """Logits of all words. ``input`` as torch calls it."""
    with own_weights(module):
        own = forward(copy_to(input, words.group))
    return cast(Tensor, cast(Any, _GatherWords).apply(own, words))
