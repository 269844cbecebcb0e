"""Structured logs: one JSON object a line for machines, a short line for a terminal.

    log = get_logger("gateway")
    with request_context("req-1"):
        log.info("request", extra=fields(route="/v1/completions", status=200, seconds=0.12))

A record is an event name and fields. Fields hold numbers and names, never prompts, answers or secrets; keys
that would be refused wholesale (``prompt``, ``messages``, ``authorization`` …) are masked if one slips in.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

ROOT = "hearth"
_FIELDS = "hearth_fields"
_FORBIDDEN = frozenset(
    (
        *("prompt", "messages", "message", "content", "text", "completion", "answer"),
        *("authorization", "api_key", "secret", "password", "token"),
    )
)

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def get_logger(name: str) -> logging.Logger:
    """The logger of one part of Hearth, under the root ``hearth``."""
    return logging.getLogger(f"{ROOT}.{name}")


def fields(**values: Any) -> dict[str, Any]:
    """The ``extra`` of a log call, with text and secrets masked."""
    return {_FIELDS: {key: "[masked]" if key in _FORBIDDEN else value for key, value in values.items()}}


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Every record of this task inside the block carries ``request_id``."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request_id() -> str | None:
    """The request id of this task, if any."""
    return _request_id.get()


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, request_id, then the fields."""

    def __init__(self, static: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._static = dict(static or {})

    def format(self, record: logging.LogRecord) -> str:
        """Render ``record``; what JSON cannot hold becomes its repr."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **self._static,
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        line.update(getattr(record, _FIELDS, {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """``12:30:01 warning gateway: worker died  model=tiny code=-9``."""

    def format(self, record: logging.LogRecord) -> str:
        """Render ``record`` for a person."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} "
        name = record.name.removeprefix(f"{ROOT}.")
        pairs = dict(getattr(record, _FIELDS, {}))
        if request_id := getattr(record, "request_id", None):
            pairs["request_id"] = request_id
        tail = " ".join(f"{key}={_short(value)}" for key, value in pairs.items() if value is not None)
        text = f"{clock} {level}{name}: {record.getMessage()}" + (f"  {tail}" if tail else "")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def configure(
    style: str = "auto",
    *,
    level: str = "info",
    stream: TextIO | None = None,
    static: Mapping[str, Any] | None = None,
) -> None:
    """Send the records of ``hearth.*`` to ``stream`` (standard error), replacing an earlier configuration.

    ``style``: ``json``, ``plain``, or ``auto`` (plain on a terminal). Every JSON line gets the
    ``static`` fields.
    Only Hearth's own logger is touched: the root logger belongs to the program that imports us.
    """
    target = stream if stream is not None else sys.stderr
    if style not in ("auto", "json", "plain"):
        raise ValueError(f"log style {style!r}: one of auto, json, plain")
    plain = style == "plain" or (style == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter(static))
    handler.addFilter(_RequestIdFilter())
    logger = logging.getLogger(ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
