"""The demo's plan is pure: same machine and minutes, same work."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from hearth.demo.plan import (
    CPU_SCALE,
    GPU_SCALE,
    chat_recipe,
    choose_scale,
    pretrain_recipe,
    reuse_key,
    steps_within,
)
from hearth.models import parse_size


def test_a_gpu_gets_a_larger_model() -> None:
    assert parse_size(choose_scale("cuda").size) > parse_size(choose_scale("cpu").size)


@given(
    seconds=st.floats(0, 1e5), rate=st.floats(1e-3, 1e3), rows=st.integers(1, 10**6), epochs=st.floats(0.5, 9)
)
def test_steps_fit_the_time_and_the_data(seconds: float, rate: float, rows: int, epochs: float) -> None:
    steps = steps_within(seconds, rate, rows=rows, batch_size=32, epochs=epochs)
    assert steps >= 2
    assert steps == 2 or (steps * rate <= seconds and steps * 32 <= epochs * rows)


@given(steps=st.integers(2, 10**5), gpu=st.booleans())
def test_every_number_of_steps_makes_valid_recipes(steps: int, gpu: bool) -> None:
    scale = GPU_SCALE if gpu else CPU_SCALE
    assert pretrain_recipe(scale, steps=steps).train.steps == steps
    assert chat_recipe(scale, steps=steps, base="m", tokenizer="t").model.base == "m"


def test_reuse_key_changes_with_what_decides_the_result() -> None:
    facts = {"minutes": 1.0, "scale": CPU_SCALE, "dataset": "abc"}
    key = reuse_key("pretrain", **facts)
    assert key == reuse_key("pretrain", **facts)
    others = [
        reuse_key("chat", **facts),
        reuse_key("pretrain", **facts | {"minutes": 2.0}),
        reuse_key("pretrain", **facts | {"dataset": "abd"}),
        reuse_key("pretrain", **facts | {"scale": dataclasses.replace(CPU_SCALE, learning_rate=1e-3)}),
        reuse_key("pretrain", **facts, base="run"),
    ]
    assert len({key, *others}) == len(others) + 1
