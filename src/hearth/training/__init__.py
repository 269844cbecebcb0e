"""Training: one loop, one normalisation of the loss, checkpoints that are verified and resume exactly."""

from hearth.training.batches import Batch
from hearth.training.callbacks import Callback
from hearth.training.checkpoint import CheckpointStore
from hearth.training.objectives import OBJECTIVES, Objective
from hearth.training.plan import TrainingPlan
from hearth.training.precision import choose_device, choose_precision
from hearth.training.schedule import learning_rate_at
from hearth.training.trainer import Trainer, measure_step_seconds

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Callback",
    "CheckpointStore",
    "Objective",
    "Trainer",
    "TrainingPlan",
    "choose_device",
    "choose_precision",
    "learning_rate_at",
    "measure_step_seconds",
]
