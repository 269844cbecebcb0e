"""Every error that Hearth raises on purpose.

A message says what went wrong, naming the key or file and the value; ``fix`` says what to do about it.

    HearthError                        exit 1: the work failed
    ├── InputError (ValueError)        exit 2: the input is wrong, nothing was started
    │   ├── ConfigError                a recipe, a setting or a command line
    │   ├── DataError                  a source file, a corpus, a dataset directory
    │   ├── ModelError                 a model directory that cannot be opened
    │   │   └── UnsupportedModelError  a model that the engine or trainer refuses, and why
    │   ├── RequestError               a generation request (HTTP 400)
    │   └── NotFoundError (LookupError)  no such run, model, version, alias, artifact
    ├── ConflictError                  the workspace is in a state that forbids this
    │   └── GateError                  a version that has not passed its gate
    ├── IntegrityError                 bytes that do not match their recorded hash
    ├── StorageError (OSError)         the disk or object store failed: full, read-only, gone
    ├── TrainingError                  training cannot go on
    │   ├── NonFiniteError             a loss or gradient is NaN or infinite
    │   └── LostProcessError           another process of the job is gone or silent
    ├── EngineError                    the inference engine failed
    │   └── EngineDeadError            the engine process is gone or stuck
    ├── ServingError                   a server could not start or a worker failed
    └── Interrupted                    exit 130: stopped by Ctrl-C after saving
"""

from __future__ import annotations

from typing import ClassVar


class HearthError(Exception):
    """Root of all Hearth errors; ``exit_code`` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default reduction; errors cross process borders.
        return (_rebuild, (type(self), self.message, self.fix))


def _rebuild(cls: type[HearthError], message: str, fix: str | None) -> HearthError:
    return cls(message, fix=fix)


class InputError(HearthError, ValueError):
    """What the user gave is wrong; nothing was started."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe, a setting or a command line is wrong."""


class DataError(InputError):
    """A source file, a corpus or a dataset directory is unusable."""


class ModelError(InputError):
    """A model directory cannot be opened."""


class UnsupportedModelError(ModelError):
    """The model is sound, but the engine or the trainer refuses it; the message says why."""


class RequestError(InputError):
    """A generation request is invalid (HTTP 400). ``param`` names the offending field."""

    def __init__(self, message: str, *, fix: str | None = None, param: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_request, (type(self), self.message, self.fix, self.param))


def _rebuild_request(
    cls: type[RequestError], message: str, fix: str | None, param: str | None
) -> RequestError:
    return cls(message, fix=fix, param=param)


class NotFoundError(InputError, LookupError):
    """No such run, model, version, alias, key or artifact."""


class ConflictError(HearthError):
    """The workspace is in a state that forbids the operation."""


class GateError(ConflictError):
    """A model version has not passed the gate that the operation requires."""


class IntegrityError(HearthError):
    """Stored bytes do not match the hash that was recorded for them."""


class StorageError(HearthError, OSError):
    """The disk or object store failed: full, read-only or gone."""


class TrainingError(HearthError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite; raised before the optimizer step."""


class LostProcessError(TrainingError):
    """Another process of a job is gone, or did not answer in time; this one can only end."""


class EngineError(HearthError):
    """The inference engine failed."""


class EngineDeadError(EngineError):
    """The engine process is gone or stuck."""


class ServingError(HearthError):
    """A server could not start, or a worker failed."""


class Interrupted(HearthError):
    """Stopped by Ctrl-C, after what can be saved was saved."""

    exit_code = 130
