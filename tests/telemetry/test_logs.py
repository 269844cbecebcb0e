"""Structured logs: machine-readable lines, request ids, nothing private."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import pytest

from hearth.telemetry import logs


@pytest.fixture
def stream() -> io.StringIO:
    target = io.StringIO()
    yield target
    logger = logging.getLogger(logs.ROOT)
    logger.handlers.clear()
    logger.propagate = True


def test_json_lines_carry_fields_and_the_request_id(stream: io.StringIO) -> None:
    logs.configure("json", stream=stream, static={"process": "gateway"})
    log = logs.get_logger("gateway")
    with logs.request_context("req-1"):
        log.info("request", extra=logs.fields(route="/chat", status=200, seconds=0.5))
    log.warning("later")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["event"] == "request"
    assert first["request_id"] == "req-1"
    assert (first["route"], first["status"], first["seconds"]) == ("/chat", 200, 0.5)
    assert first["process"] == "gateway"
    assert first["time"].endswith("Z")
    assert second["level"] == "warning"
    assert "request_id" not in second


def test_text_and_secrets_are_masked(stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    logs.get_logger("x").info("request", extra=logs.fields(prompt="my diary", authorization="Bearer hk-1"))
    assert "diary" not in stream.getvalue()
    assert "hk-1" not in stream.getvalue()


def test_an_exception_stays_one_line(stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logs.get_logger("x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "boom" in json.loads(line)["exception"]


def test_plain_lines_are_for_people(stream: io.StringIO) -> None:
    logs.configure("plain", stream=stream)
    logs.get_logger("gateway").warning("worker died", extra=logs.fields(model="tiny", code=-9, skipped=None))
    assert "warning gateway: worker died  model=tiny code=-9\n" in stream.getvalue()


def test_configuring_twice_does_not_double_the_lines(stream: io.StringIO) -> None:
    logs.configure("plain", stream=stream)
    logs.configure("plain", stream=stream)
    logs.get_logger("x").info("once")
    assert stream.getvalue().count("once") == 1


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="one of auto, json, plain"):
        logs.configure("xml")


async def test_request_ids_do_not_leak_between_tasks() -> None:
    async def one(name: str) -> str | None:
        with logs.request_context(name):
            await asyncio.sleep(0)
            return logs.current_request_id()

    assert await asyncio.gather(one("a"), one("b")) == ["a", "b"]
    assert logs.current_request_id() is None
