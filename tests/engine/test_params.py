"""Sampling parameters and engine settings refuse what is wrong, naming it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from hearth.engine.config import EngineConfig
from hearth.engine.params import SamplingParams
from hearth.errors import ConfigError, RequestError

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("min_tokens", 17),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**63),
    ("temperature", 10**400),
    ("stop_token_ids", [2**64]),
    ("logit_bias", {2**70: 1}),
    ("min_p", 2.0),
    ("n", 0),
    ("seed", "x"),
    ("stop", ("",)),
    ("stop", 5),
    ("stop", ["a"] * 17),
    ("stop_token_ids", [-1]),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 3),
    ("frequency_penalty", float("inf")),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {1: 101}),
    ("logit_bias", [1]),
    ("logprobs", 21),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_convenient_spellings() -> None:
    params = SamplingParams(stop="END", top_k=-1, logit_bias={"5": 1}, stop_token_ids=[3])  # type: ignore[arg-type]
    assert (params.stop, params.top_k, params.logit_bias, params.stop_token_ids) == (
        ("END",),
        0,
        {5: 1},
        (3,),
    )


def test_params_survive_the_wire() -> None:
    params = SamplingParams(stop=("a",), logit_bias={3: -1.5}, seed=7, n=2, max_tokens=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int8"},
        {"max_num_seqs": 0},
        {"block_size": 1.5},
        {"max_model_len": 1},
        {"seed": -1},
        {"speed": 9},
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        EngineConfig.of(**fields)


def test_describing_a_request_imports_no_torch() -> None:
    code = (
        "import sys; from hearth.engine import SamplingParams, EngineConfig; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
