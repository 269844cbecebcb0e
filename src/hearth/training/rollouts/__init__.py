"""Rollouts for reinforcement learning: answers drawn by Hearth's engine, judged, and made into batches."""

from hearth.training.rollouts.answers import Answer
from hearth.training.rollouts.rewards import Rewards
from hearth.training.rollouts.source import RolloutSource

__all__ = ["Answer", "Rewards", "RolloutSource"]
