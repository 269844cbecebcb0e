"""How long work tells whoever waits how far it is, without knowing whether anyone looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a job, one after the other. ``total`` and ``num_units`` are bytes of text."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins; ``total`` is None where the amount of work is not known."""

    def advance(self, num_units: int = 1) -> None:
        """So much more of the current stage is done."""

    def finish(self) -> None:
        """The current stage is over."""


class NullProgress:
    """Nobody looks."""

    def start(self, stage: str, total: int | None = None) -> None:
        """Do nothing."""

    def advance(self, num_units: int = 1) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
