"""Sweeps: many trials of one recipe, chosen by Optuna, run by processes that share one study."""

from hearth.training.sweep.coordinator import SweepResult, run_sweep
from hearth.training.sweep.study import Sweep

__all__ = ["Sweep", "SweepResult", "run_sweep"]
