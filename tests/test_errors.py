"""Errors carry their fix, their exit code and survive the way to another process."""

from __future__ import annotations

import pickle

import pytest

from hearth.errors import ConfigError, HearthError, Interrupted, NotFoundError, RequestError, StorageError


def test_message_ends_with_the_fix() -> None:
    error = ConfigError("recipe.yaml: train.steps: 0 is too small", fix="give at least 1")
    assert str(error) == "recipe.yaml: train.steps: 0 is too small\n  fix: give at least 1"
    assert str(ConfigError("only this")) == "only this"


@pytest.mark.parametrize(
    ("error", "code", "builtin"),
    [
        (HearthError("x"), 1, Exception),
        (ConfigError("x"), 2, ValueError),
        (NotFoundError("x"), 2, LookupError),
        (StorageError("x"), 1, OSError),
        (Interrupted("x"), 130, Exception),
    ],
)
def test_exit_codes_and_builtin_parents(error: HearthError, code: int, builtin: type) -> None:
    assert error.exit_code == code
    assert isinstance(error, builtin)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(RequestError("too long", fix="shorten it", param="prompt")))
    assert (type(error), str(error), error.param) == (RequestError, "too long\n  fix: shorten it", "prompt")
