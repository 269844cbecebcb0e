"""DeepSpeed under Hearth's loop: against one process, and from one way of sharing to the other.

In float32, as DeepSpeed takes float64 nowhere. An epsilon of 1e-4 keeps AdamW's first steps, which are signs
of gradients, from making much of the last bits.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.deepspeed import DeepSpeedModule
from hearth.parallel.deepspeed_config import Sizes, deepspeed_config
from hearth.parallel.layout import Layout
from hearth.parallel.world import World
from hearth.training.deepspeed_updates import DeepSpeedUpdates
from hearth.workspace import Workspace

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# What is 1 MiB or more in every process goes to the disk.
LARGE = SMALL | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
STEPS = 5
SIZES = Sizes(hidden=32, total=40_000, largest=3_000, num_layers=4)

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs hearth-lm[deepspeed]"
)


def recipe_of(parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "parallel": parallel,
        "data": {"sequence_length": 24},
        "model": {"context_length": 64},
        "checkpoint": {"every": 2},
        "train": {
            "steps": STEPS,
            "batch_size": 16,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "epsilon": 1e-4,
            "precision": "fp32",
            "grad_clip": 0.5,
            **train,
        },
    }


def train(
    launch: Any,
    tmp_path: Path,
    num: int,
    parallel: dict[str, Any],
    *,
    model: dict[str, Any] = SMALL,
    program: dict[str, Any] | None = None,
    **train: Any,
) -> dict[str, torch.Tensor]:
    name = f"{num}-{len(list(tmp_path.iterdir()))}"
    settings, out = tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"
    recipe = recipe_of(parallel, **train)
    settings.write_text(json.dumps({"recipe": recipe, "model": model, "steps": STEPS, **(program or {})}))
    launch("zero_infinity", num, [str(settings), str(out)])
    return load_file(out)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    finite = expected["norms"].isfinite()
    assert torch.equal(found["norms"].isfinite(), finite)
    # torch's float32 norm of a million elements is 1e-5 off; with offload DeepSpeed's is float64.
    for key, bound in (("losses", 1e-5), ("norms", 5e-5)):
        torch.testing.assert_close(found.pop(key)[finite], expected.pop(key)[finite], rtol=bound, atol=0)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key].double(),
            value.double(),
            rtol=1e-4,
            atol=2e-6,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "parallel", "settings"),
    [
        (2, {"shard": 2}, {"activation_checkpointing": "full"}),
        (2, {"shard": 2, "offload": "cpu"}, {}),
        (1, {"offload": "cpu"}, {}),
    ],
    ids=["shared", "host", "alone"],
)
def test_as_one_process(
    launch: Any, tmp_path: Path, num: int, parallel: dict[str, Any], settings: dict[str, Any]
) -> None:
    expected = train(launch, tmp_path, 1, {})
    found = train(launch, tmp_path, num, {"engine": "deepspeed", **parallel}, **settings)
    assert_same(found, expected)


@needs_deepspeed
@pytest.mark.slow
def test_weights_and_states_rest_on_a_disk(launch: Any, tmp_path: Path) -> None:
    _require_libaio()
    folder = tmp_path / "disk"
    expected = train(launch, tmp_path, 1, {}, model=LARGE, learning_rate=1e-3)
    parallel = {"engine": "deepspeed", "shard": 2, "offload": "nvme", "offload_dir": str(folder)}
    found = train(launch, tmp_path, 2, parallel, model=LARGE, learning_rate=1e-3)
    num_weights = sum(value.numel() for name, value in expected.items() if name.startswith("model."))
    assert found.pop("disk_bytes") > 12 * num_weights  # most of the weights, twice, and of both moments
    assert_same(found, expected)
    assert list(folder.iterdir()) == []  # and nothing stays there


def _require_libaio() -> None:
    compiler = importlib.import_module("setuptools._distutils.ccompiler").new_compiler()
    if not compiler.has_function("io_submit", libraries=("aio",)):
        pytest.skip("needs libaio with its headers")


@needs_deepspeed
@pytest.mark.slow
def test_a_broken_step_changes_nothing_and_other_counts_are_made_good(launch: Any, tmp_path: Path) -> None:
    program = {"breaks_at": 2}
    expected = train(launch, tmp_path, 1, {}, program=program, on_non_finite="skip")
    assert expected["norms"].isfinite().tolist() == [True, True, False, True, True]
    parallel = {"engine": "deepspeed", "shard": 2, "offload": "cpu"}
    found = train(launch, tmp_path, 2, parallel, program=program, on_non_finite="skip")
    assert_same(found, expected)


def fit(launch: Any, tmp_path: Path, num: int, parallel: dict[str, Any], **settings: Any) -> dict[str, Any]:
    path = tmp_path / f"settings-{len(list(tmp_path.glob('settings-*')))}.json"
    recipe = recipe_of(parallel, steps=7, batch_size=8, evaluate_every=3)
    path.write_text(json.dumps({"recipe": recipe, "model": SMALL, "dtype": "float32", **settings}))
    (line,) = (line for line in launch("fit", num, [str(path)])[0].splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


@needs_deepspeed
@pytest.mark.slow
def test_a_run_of_deepspeed_goes_on_without_it(launch: Any, tmp_path: Path, workspace_dir: Path) -> None:
    straight = fit(launch, tmp_path, 1, {})
    parallel = {"engine": "deepspeed", "shard": 2, "offload": "cpu"}
    first = fit(launch, tmp_path, 2, parallel, stop=3)
    assert first["status"] == "interrupted"
    last = fit(launch, tmp_path, 1, {}, resume=first["run"])
    assert last == {"run": first["run"], "status": "finished"}
    with Workspace.open() as workspace:
        expected, got = workspace.runs.get(straight["run"]), workspace.runs.get(last["run"])
        for metric in ("loss", "grad_norm", "eval_loss"):
            pairs = [{point.step: point.value for point in each.metrics(metric)} for each in (expected, got)]
            assert pairs[1] == pytest.approx(pairs[0], rel=1e-5), metric
        weights = [load_file(each.dir / "model" / "model.safetensors") for each in (expected, got)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=2e-6)


@needs_deepspeed
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"offload": "cpu", "reduce": "bf16"},
        {"offload": "nvme", "offload_dir": "disk"},
    ],
)
def test_deepspeed_takes_the_configuration(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    classes = importlib.import_module("deepspeed.runtime.config")
    section = ParallelSection.model_validate({"engine": "deepspeed", **given})
    config = deepspeed_config(section, SIZES, num_processes=2, grad_clip=0.5, folder="disk")
    taken = classes.DeepSpeedConfig(config)
    assert int(taken.zero_config.stage) == 3
    assert taken.gradient_clipping == 0.5
    assert str(taken.communication_data_type) == f"torch.{'bfloat16' if 'reduce' in given else 'float32'}"
    if "offload" in given:
        assert taken.zero_config.offload_param.device == given["offload"]
        assert taken.zero_config.offload_optimizer.device == given["offload"]
    # What is written down is what there is: DeepSpeed refuses keys of ZeRO that it does not know.
    with pytest.raises(ValueError, match="sub_group_siz"):
        classes.DeepSpeedConfig({**config, "zero_optimization": {"stage": 3, "sub_group_siz": 1}})


def test_states_are_updated_about_a_layer_at_a_time() -> None:
    def size(num_processes: int, sizes: Sizes) -> int:
        section = ParallelSection.model_validate({"engine": "deepspeed", "offload": "cpu"})
        config = deepspeed_config(section, sizes, num_processes=num_processes, grad_clip=0.0)
        found: int = config["zero_optimization"]["sub_group_size"]
        return found

    assert size(1, SIZES) == 10_000
    assert size(2, SIZES) == 5_000
    assert size(1, Sizes(hidden=8192, total=70_000_000_000, largest=1_000_000_000, num_layers=80)) == 10**8


@pytest.mark.parametrize(
    ("layout", "given", "says"),
    [
        (Layout(data=2), {}, "parallel.shard: 2"),
        (Layout(shard=2, tensor=2), {}, "parallel.shard: 4"),
        (Layout(shard=2), {"zero": 2}, "zero: 3"),
        (Layout(shard=2), {"reduce": "powersgd"}, "fp32 or bf16"),
    ],
)
def test_what_deepspeed_cannot_share_is_refused(layout: Layout, given: dict[str, Any], says: str) -> None:
    section = ParallelSection.model_validate({"engine": "deepspeed", **given})
    world = World(layout, torch.device("cpu"))
    with pytest.raises(ConfigError) as error:
        DeepSpeedModule(_model(), world, section)
    assert says in str(error.value.fix)


def test_other_than_float32_is_refused() -> None:
    section = ParallelSection.model_validate({"engine": "deepspeed"})
    with pytest.raises(ConfigError, match="float64"):
        DeepSpeedModule(_model().double(), World.alone(torch.device("cpu")), section)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "cpu" if name == "DS_ACCELERATOR" else "1")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    section = ParallelSection.model_validate({"engine": "deepspeed"})
    with pytest.raises(ConfigError) as error:
        DeepSpeedModule(_model(), World.alone(torch.device("cpu")), section)
    assert "hearth-lm[deepspeed]" in str(error.value.fix)


@pytest.mark.parametrize(
    ("key", "value", "precision"),
    [
        ("optimizer", "lion", "fp32"),
        ("objective", "dpo", "fp32"),
        ("precision", "fp16", "fp16"),
        ("ema_decay", 0.5, "fp32"),
        ("compile", True, "fp32"),
    ],
)
def test_what_the_loop_cannot_do_with_deepspeed_is_refused(key: str, value: Any, precision: str) -> None:
    section = Recipe.model_validate({"train": {key: value}}).train
    with pytest.raises(ConfigError, match=rf"train\.{key}"):
        DeepSpeedUpdates(
            None,  # type: ignore[arg-type] # looked at later
            section,
            precision=precision,
            settings={},
            saved_weights=dict,
        )


def _model() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
