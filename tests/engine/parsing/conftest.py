"""The functions that the parsed answers call."""

from __future__ import annotations

from typing import Any

import pytest

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "where": {"type": "object"},
        },
    },
    "now": {"type": "object", "properties": {}},
}


@pytest.fixture(scope="session")
def tools() -> dict[str, Any]:
    """Names and schemas of two functions."""
    return TOOLS
