"""Trackers: TensorBoard, MLflow, W&B, Comet and others, beside the workspace. No library is imported here."""

from hearth.training.trackers.base import Artifact, NoOptions, Point, RunFacts, Tracker
from hearth.training.trackers.registry import make_trackers, tracker_names
from hearth.training.trackers.tracking import Tracking, run_facts

__all__ = [
    "Artifact",
    "NoOptions",
    "Point",
    "RunFacts",
    "Tracker",
    "Tracking",
    "make_trackers",
    "run_facts",
    "tracker_names",
]
