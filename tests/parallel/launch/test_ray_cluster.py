"""Jobs on a real Ray cluster of this machine, where Ray is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.launch.backend import Submitted, Watch
from hearth.parallel.launch.jobs import JobStore
from hearth.parallel.launch.ray_cluster import RayBackend, _visible_gpus
from hearth.parallel.launch.spec import JobSpec, Resources

PROCESS = str(Path(__file__).with_name("job_process.py"))


def test_what_ray_is_asked_for(make_spec: Callable[..., JobSpec]) -> None:
    spec = make_spec(nodes=2, processes=4, resources=Resources(4, 16, 1024))
    wanted = yaml.safe_load(RayBackend().render(spec).files["ray.yaml"])
    bundle = {"CPU": 16.0, "GPU": 4.0, "memory": 2.0**30}
    assert wanted["placement_group"] == {"bundles": [bundle, bundle], "strategy": "STRICT_SPREAD"}
    assert wanted["actors"] == {"count": 8, "per_bundle": 4, "cpus": 4.0, "gpus": 1.0}


def test_every_rank_sees_the_gpus_of_its_node(make_spec: Callable[..., JobSpec]) -> None:
    spec = make_spec(nodes=2, processes=2)
    gpus = {0: ["3"], 1: ["5"], 2: ["0"], 3: ["1"]}
    seen = [each["CUDA_VISIBLE_DEVICES"] for _, each in sorted(_visible_gpus(spec, gpus).items())]
    assert seen == ["3,5", "3,5", "0,1", "0,1"]
    assert _visible_gpus(spec, {0: [], 1: []}) == {0: {}, 1: {}}


def test_without_ray_the_extra_is_named(make_spec: Callable[..., JobSpec]) -> None:
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed here")
    spec = make_spec()
    with pytest.raises(ConfigError, match="--on ray needs ray") as caught:
        RayBackend().submit(spec, RayBackend().render(spec), Watch())
    assert caught.value.fix == "pip install 'hearth-lm[ray]'"


@pytest.fixture
def launch(make_spec: Callable[..., JobSpec], told: Any) -> Callable[..., Submitted]:
    pytest.importorskip("ray", reason="install the extra ray")

    def run(*orders: str, **changes: Any) -> Submitted:
        spec = make_spec(*orders, **changes)
        backend = RayBackend((sys.executable, PROCESS))
        rendered = backend.render(spec)
        JobStore(Path(spec.workspace)).create("ray", spec, rendered)
        return backend.submit(spec, rendered, told.watch)

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own, of sockets and processes that it leaves to the end
def test_a_dead_rank_is_named_and_all_go_on_from_the_checkpoint(
    launch: Callable[..., Submitted], told: Any
) -> None:
    done = launch("kill:1:12")
    assert (done.state, done.facts["restarts"]) == ("finished", 1)
    assert done.facts["failures"][0]["why"].startswith("killed by SIGKILL")
    assert "[rank 0] rank 0 of 2 begins at step 10" in told.lines


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_hang_is_found_with_stacks_through_the_actors(launch: Callable[..., Submitted], told: Any) -> None:
    done = launch("stop:1:12", options={"hang-seconds": "4"})
    assert (done.state, done.facts["restarts"]) == ("finished", 1)
    assert done.facts["failures"][0]["rank"] == 1
    assert "stopped (SIGSTOP)" in done.facts["failures"][0]["why"]
    assert "in together" in told.notes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nodes_that_are_not_there_are_told_with_the_time(launch: Callable[..., Submitted]) -> None:
    with pytest.raises(TrainingError, match=r"gave no 2 nodes .* within 5 s \(--join-timeout\).* on 1 nodes"):
        launch(nodes=2, join_timeout=5)
