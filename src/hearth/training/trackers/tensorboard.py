"""TensorBoard: event files in the run's folder, or in ``log_dir/RUN``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from hearth.config.section import Section
from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker


class TensorBoardOptions(Section):
    """``track.options.tensorboard``."""

    log_dir: str | None = Field(
        None, description="Folder that gets one folder a run. Default: tensorboard in the run's own."
    )


class TensorBoardTracker(Tracker[TensorBoardOptions]):
    """One writer a process; a resumed run writes a further file that hides the steps it repeats."""

    name = "tensorboard"
    libraries = ("tensorboard",)
    extra = "tensorboard"
    options_class = TensorBoardOptions

    def start(self, facts: RunFacts) -> None:
        """Open the writer; recipe, hash and tags become texts."""
        from torch.utils.tensorboard import SummaryWriter

        parent = self.options.log_dir
        folder = facts.folder / "tensorboard" if parent is None else Path(parent).expanduser() / facts.run_id
        first = facts.first_step + 1
        self._last_step = facts.first_step
        # purge_step: readers drop what an earlier process wrote of this step and later ones.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first if facts.resumed else None)
        if not facts.resumed:
            self._writer.add_text("run", facts.run_id, 0)
            self._writer.add_text("recipe", f"```yaml\n{facts.recipe_yaml}\n```", 0)
            self._writer.add_text("recipe_hash", facts.recipe_hash, 0)
            for key, value in facts.tags.items():
                self._writer.add_text(f"tag/{key}", value, 0)
        self._writer.flush()

    def log(self, points: Sequence[Point]) -> None:
        """One scalar a value."""
        for point in points:
            self._last_step = max(self._last_step, point.step)
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.time)

    def artifact(self, artifact: Artifact) -> None:
        """A text with the reference."""
        self._writer.add_text(f"artifact/{artifact.kind}", artifact.uri, artifact.step)

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:  # noqa: ARG002
        """Status and error as texts."""
        self._writer.add_text("status", status if error is None else f"{status}: {error}", self._last_step)
        self._writer.close()
