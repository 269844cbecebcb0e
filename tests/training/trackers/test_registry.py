"""Trackers by name: unknown ones, missing libraries, options, and those of other packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from hearth.errors import ConfigError
from hearth.training.trackers import make_trackers, tracker_names


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"track\.trackers: no tracker 'wandbb'; did you mean wandb\?"
    ) as caught:
        make_trackers(["wandbb"])
    assert "comet, mlflow, tensorboard, wandb" in str(caught.value)
    with pytest.raises(ConfigError, match=r"track\.options\.tensorbord: no tracker"):
        make_trackers([], {"tensorbord": {}})
    with pytest.raises(ConfigError, match="given twice"):
        make_trackers(["wandb", "wandb"])


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "comet"])
def test_a_missing_library_is_refused_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="which is not installed") as caught:
        make_trackers([name])
    assert f"pip install 'hearth-lm[{name}]'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "mlflow",
            {"experimnt": "x"},
            r"track\.options\.mlflow\.experimnt: unknown key; did you mean experiment",
        ),
        (
            "mlflow",
            {"tracking_uri": "http://me:s3cret@host:5000"},
            r"^track\.options\.mlflow\.tracking_uri: holds a password, .*set \$MLFLOW_TRACKING_URI instead$",
        ),
        ("wandb", {"mode": "onlin"}, r"track\.options\.wandb\.mode: 'onlin' is not allowed"),
        ("comet", {"project": 3}, r"track\.options\.comet\.project: 3 is not text"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    with pytest.raises(ConfigError, match=match):
        make_trackers([name], {name: options})


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers a tracker, and one that is broken."""
    (tmp_path / "own_tracker.py").write_text(
        "from hearth.config.section import Section\n"
        "from hearth.training.trackers import Tracker\n"
        "class Options(Section):\n"
        "    path: str = 'x'\n"
        "class Own(Tracker):\n"
        "    name = 'own'\n"
        "    options_class = Options\n"
    )
    info = tmp_path / "own_tracker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-tracker\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hearth.trackers]\nown = own_tracker:Own\nbroken = own_tracker:Absent\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_tracker", None)


def test_trackers_of_other_packages(plugin: Path) -> None:
    assert "own" in tracker_names()
    (tracker,) = make_trackers(["own"], {"own": {"path": "y"}})
    assert type(tracker).__name__ == "Own"
    assert tracker.options.path == "y"
    with pytest.raises(ConfigError, match=r"tracker broken \(own_tracker:Absent\) cannot be loaded"):
        make_trackers(["broken"])
