"""Distillation: a student learns what a larger model would say.

By logits (Hinton et al. 2015; divergences after Agarwal et al. 2024, GKD): at every token that counts the
student's distribution is pulled towards the teacher's, beside the data's own loss. By sequences (Kim and Rush
2016): the teacher writes the answers before training, and the student is fine-tuned on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hearth.config.objectives import DistillSection
from hearth.errors import ConfigError
from hearth.training.batches import IGNORE, Batch
from hearth.training.divergence import Divergence, distilled_loss
from hearth.training.loss import nothing_of, token_loss_sum
from hearth.training.objectives.base import TOKENS, Losses, Objective
from hearth.training.teacher import Teacher, load_teacher, scorer_of
from hearth.training.written import WrittenDataset, write_answers

if TYPE_CHECKING:
    from hearth.config.recipe import Recipe
    from hearth.training.trainer import Trainer
    from hearth.workspace import Workspace

_ONLY_LOGITS = ("temperature", "weight", "divergence", "jsd_beta")
_ONLY_SEQUENCE = ("max_new_tokens", "sampling_temperature")


class Distillation(Objective):
    """``train.distill``. Every label of the data counts: of conversations the assistant's, of texts all.

    ``teacher`` may be given before training; else it is opened from ``train.distill.teacher``.
    """

    name = "distill"
    sections = frozenset({"distill"})

    def __init__(self, config: Recipe) -> None:
        super().__init__(config)
        self.settings: DistillSection = config.train.distill
        self.teacher: Teacher | None = None
        section = self.settings
        self._divergence = Divergence(
            section.divergence, section.temperature, section.weight, section.jsd_beta
        )

    @property
    def by_sequence(self) -> bool:
        """Whether the teacher writes instead of being compared with."""
        return self.settings.mode == "sequence"

    def check(self, dataset: Any) -> None:
        """Refuse settings without effect, and a dataset that the teacher should have rewritten."""
        self._check_settings()
        if not self.by_sequence:
            self.refuse("lets its teacher read whole sequences", "context")
        if self.by_sequence and not isinstance(dataset, WrittenDataset):
            raise ConfigError(
                "train.distill.mode is sequence, but these rows were not written by a teacher",
                fix="use Trainer.from_recipe, or hearth.training.written.write_answers",
            )

    def _check_settings(self) -> None:
        unread = _ONLY_LOGITS if self.by_sequence else _ONLY_SEQUENCE
        for key in unread:
            value = getattr(self.settings, key)
            if value != DistillSection.model_fields[key].default:
                raise ConfigError(
                    f"train.distill.{key} is {value}, but mode {self.settings.mode} does not read it",
                    fix="leave it out",
                )

    def _require_teacher(self) -> None:
        if self.settings.teacher is None:
            raise ConfigError(
                "train.objective is distill, but train.distill.teacher is missing",
                fix="name a model: name, name@version, a directory, or hf:org/name",
            )

    def adapt_dataset(self, dataset: Any, workspace: Workspace, *, progress: bool) -> Any:
        """By sequences, the conversations with their last answers written by the teacher."""
        self._check_settings()
        self._require_teacher()
        if not self.by_sequence:
            return dataset
        return write_answers(dataset, self.config, workspace, progress=progress)

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:  # noqa: ARG002
        """Open the teacher, unless one was given."""
        if self.by_sequence:
            return
        if self.teacher is None:
            self._require_teacher()
            self.teacher = load_teacher(trainer)
        trainer.stateful["teacher"] = self.teacher

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum over the labels that count of the teacher's term and the data's own."""
        if self.by_sequence:
            return Losses.of_tokens(*token_loss_sum(model, batch))
        assert self.teacher is not None, "start() has not been called"
        labels_N = batch.labels_BT.reshape(-1)
        index_N = (labels_N != IGNORE).nonzero()[:, 0]
        num = len(index_N)
        student = scorer_of(model, batch, index_N)
        names = (
            self.settings.divergence if self.settings.divergence == "jsd" else "kl",
            "ce",
            "top1_agreement",
        )
        if num == 0:
            zero = nothing_of(student.rows_ND, student.weight_VD)
            return Losses({TOKENS: zero}, {TOKENS: 0}, dict.fromkeys(names, (0.0, 0.0)))
        teacher = self.teacher.scorer(batch, index_N)
        loss, sums = distilled_loss(student, teacher, labels_N.index_select(0, index_N), self._divergence)
        metrics = {name: (value, float(num)) for name, value in zip(names, sums, strict=True)}
        return Losses({TOKENS: loss}, {TOKENS: num}, metrics)
