"""Rollouts as tensors: kept over the iterations of a round and in checkpoints, cut into micro-batches.

Shape suffixes: S answers, N tokens of all answers one after the other (or, in a batch, in row order).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hearth.training.batches import IGNORE, Batch
from hearth.training.samples import Sample, collate_samples

FIGURES = "figures"  # Batch.extras: figures of the whole step, in the order of Rollouts.figures


@dataclass
class Rollouts:
    """The answers to the prompts of a round; answer s belongs to prompt ``s // num_generations``.

    tokens: prompts and answers, one after the other. values: float tensors for every token of an answer
    ("N"), all answers one after the other. figures: what was measured of the whole round.
    """

    rows: tuple[int, ...]
    num_generations: int
    tokens: Tensor
    lengths_S: Tensor
    prompt_lengths_S: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rows: Sequence[int], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> Rollouts:
        """From token ids: of every prompt, and of each answer to it."""
        whole = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
        return cls(
            tuple(rows),
            len(answers[0]),
            torch.tensor([token for prompt, answer in whole for token in (*prompt, *answer)]),
            torch.tensor([len(prompt) + len(answer) for prompt, answer in whole]),
            torch.tensor([len(prompt) for prompt, _ in whole]),
        )

    @property
    def answer_lengths_S(self) -> Tensor:
        """Tokens of each answer, with its stop token."""
        return self.lengths_S - self.prompt_lengths_S

    def batches(self, prompts_at_once: int, places: range | None = None) -> Iterator[Batch]:
        """Micro-batches of so many prompts with all their answers: of those at ``places``, or of all."""
        asked = range(len(self.rows)) if places is None else places
        for first in range(0, len(asked), prompts_at_once):
            yield self.batch(asked[first : first + prompts_at_once])

    def batch(self, places: range) -> Batch:
        """The prompts at these places of the round, with all their answers."""
        here = range(places[0] * self.num_generations, (places[-1] + 1) * self.num_generations)
        ends = [0, *self.lengths_S.cumsum(0).tolist()]
        samples = []
        for s in here:
            tokens = self.tokens[ends[s] : ends[s + 1]].numpy()
            samples.append(Sample(((tokens, np.arange(len(tokens)) >= int(self.prompt_lengths_S[s])),)))
        batch = collate_samples(samples, self.rows[places[0] : places[-1] + 1])
        order_N, cut = label_order(batch), self.tokens_at(places)
        extras = {name: _spread(value_N[cut], order_N) for name, value_N in self.values.items()}
        figures = torch.tensor(list(self.figures.values()), dtype=torch.float64)
        return dataclasses.replace(batch, extras={**extras, FIGURES: figures})

    def tokens_at(self, places: range) -> slice:
        """Which of N are tokens of the answers to these prompts."""
        ends = [0, *self.answer_lengths_S.cumsum(0).tolist()]
        return slice(ends[places[0] * self.num_generations], ends[(places[-1] + 1) * self.num_generations])


def label_order(batch: Batch) -> Tensor:
    """For every token of the answers, one after the other, its place among the labels in row order."""
    return batch.segment_ids_BT[batch.labels_BT != IGNORE].argsort(stable=True)


def _spread(value_N: Tensor, order_N: Tensor) -> Tensor:
    found_N = torch.empty_like(value_N)
    found_N[order_N] = value_N
    return found_N


class KeptRollouts:
    """The rollouts of a round that is not over, as a part of a checkpoint."""

    def __init__(self) -> None:
        self.round = -1
        self.rollouts: Rollouts | None = None

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Tokens, lengths, and values of tokens."""
        if self.rollouts is None:
            return {}
        kept = self.rollouts
        values = {f"value.{name}": value_N for name, value_N in kept.values.items()}
        lengths = {"lengths": kept.lengths_S, "prompt_lengths": kept.prompt_lengths_S}
        return {"tokens": kept.tokens, **lengths, **values}

    def state_values(self) -> Mapping[str, Any]:
        """Which rows, and figures."""
        if self.rollouts is None:
            return {"round": -1}
        kept = self.rollouts
        return {
            "round": self.round,
            "rows": list(kept.rows),
            "num_generations": kept.num_generations,
            "figures": dict(kept.figures),
        }

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Kept until the tensors come."""
        self._values = values

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        """Go on with the rollouts of the checkpoint."""
        self.round, self.rollouts = self._values["round"], None
        if self.round >= 0:
            self.rollouts = Rollouts(
                tuple(self._values["rows"]),
                self._values["num_generations"],
                tensors["tokens"],
                tensors["lengths"],
                tensors["prompt_lengths"],
                {n.removeprefix("value."): t for n, t in tensors.items() if n.startswith("value.")},
                dict(self._values["figures"]),
            )
