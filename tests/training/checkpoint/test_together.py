"""What processes that do the same tell each other when one of them fails."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from hearth.errors import DataError, TrainingError
from hearth.training.checkpoint.together import in_all


class Two:
    """This process and one whose outcome is known."""

    rank, size = 0, 2

    def __init__(self, other: Any) -> None:
        self.other, self.told = other, None

    def gather(self, value: Any) -> list[Any]:
        self.told = pickle.loads(pickle.dumps(value))
        return [value, self.other]


class ForeignError(Exception):
    """Of another package, and with something that no other process can read."""

    def __init__(self) -> None:
        super().__init__("with a lock")
        self.lock = (each for each in ())


def fail(error: Exception) -> Any:
    raise error


def test_what_each_has() -> None:
    assert in_all(Two((2, None)), lambda: 1) == [1, 2]


@pytest.mark.parametrize("error", [DataError("as it is"), OSError(28, "No space left on device")])
def test_an_error_is_the_same_everywhere(error: Exception) -> None:
    pair = Two((2, None))
    with pytest.raises(type(error)) as caught:
        in_all(pair, lambda: fail(error))
    assert caught.value is error
    assert pair.told is not None
    assert type(pair.told[1]) is type(error)
    assert str(pair.told[1]) == str(error)
    with pytest.raises(type(error)) as other:
        in_all(Two((None, error)), lambda: 1)
    assert other.value.__notes__ == ["in process 1"]


def test_an_error_that_nobody_else_can_read_is_told_in_words() -> None:
    pair = Two((2, None))
    with pytest.raises(ForeignError):
        in_all(pair, lambda: fail(ForeignError()))
    assert pair.told is not None
    assert isinstance(pair.told[1], TrainingError)
    assert str(pair.told[1]) == "ForeignError: with a lock"
