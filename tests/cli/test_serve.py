"""`hearth serve`: what it refuses before it loads anything, and what it prints."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hearth.errors import GateError, IntegrityError, NotFoundError
from hearth.serving import ServerProcess
from hearth.workspace import Workspace


def hearth(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hearth", "serve", *arguments], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Enough of a model to be resolved; never loaded."""
    directory = tmp_path / "some-model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (directory / "model.safetensors").write_bytes(b"not weights")
    return directory


def test_a_port_in_use_is_found_before_anything_is_loaded(model_dir: Path, workspace_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = hearth(str(model_dir), "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a MODEL"),
        (("nothing-of-that-name",), "no model 'nothing-of-that-name'"),
        (("./no/such/dir",), "no directory no/such/dir"),
        (("x", "--port", "99999"), "port"),
        (("x", "--dtype", "int3"), "dtype"),
        (("x", "--max-num-batched-tokens", "0"), "max_num_batched_tokens"),
        (("x", "--api-key", "short"), "fewer than 8 characters"),
        (("x", "y", "--max-models", "1"), "max_models is 1"),
        (("x", "--idle-unload-seconds", "-1"), "idle_unload_seconds"),
        (("--config", "absent.yaml"), "absent.yaml"),
        (("x", "--host", "203.0.113.7"), "cannot listen"),
    ],
)
def test_wrong_input_is_exit_code_2(
    arguments: tuple[str, ...],
    says: str,
    workspace_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = () if "--port" in arguments else ("--port", "0")
    done = hearth(*arguments, *extra)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_typo_in_the_file_is_named(tmp_path: Path, workspace_dir: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("models: [{model: x}]\nprot: 80\n")
    done = hearth("--config", str(config))
    assert done.returncode == 2
    assert "prot" in done.stderr
    assert "port" in done.stderr.replace("prot", "")


def test_a_directory_that_holds_no_sound_model_is_exit_code_2(model_dir: Path, workspace_dir: Path) -> None:
    done = hearth(str(model_dir), "--port", "0", timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "some-model" in done.stderr


def test_keys_that_nobody_has_are_refused(model_dir: Path, workspace_dir: Path) -> None:
    done = hearth(str(model_dir), "--require-api-keys", "--port", "0")
    assert done.returncode == 2
    assert "hearth keys create" in done.stderr


def test_two_models_of_one_name_are_refused(model_dir: Path, workspace_dir: Path) -> None:
    done = hearth(str(model_dir), str(model_dir), "--port", "0")
    assert done.returncode == 2
    assert "some-model" in done.stderr


@pytest.fixture
def resolve(workspace_dir: Path):
    from hearth.config import ServedModel
    from hearth.serving.resolve import resolve_models

    notes: list[str] = []

    def run(*references: str, workspace: Workspace, allow_ungated: bool = False, **settings: object):
        entries = [ServedModel(model=reference, **settings) for reference in references]
        notes.clear()
        return resolve_models(
            entries, allow_ungated=allow_ungated, note=notes.append, workspace=workspace
        ), notes

    return run


def report(passed: bool, dtype: str = "float32") -> dict[str, object]:
    return {"passed": passed, "dtype": dtype}


def test_only_gated_versions_are_served(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        version = workspace.registry.create_version("qa", model_dir)
        with pytest.raises(GateError, match="no parity report") as caught:
            resolve("qa", workspace=workspace)
        assert "hearth parity qa@1" in (caught.value.fix or "")
        assert "--allow-ungated" in (caught.value.fix or "")
        _, notes = resolve("qa", workspace=workspace, allow_ungated=True)
        assert any("WARNING" in note and "qa@1" in note for note in notes)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True))
        (model,), notes = resolve("qa", workspace=workspace)
        assert (model.name, model.version, model.path) == ("qa", "qa@1", version.path)
        assert model.aliases == ("qa@latest",)
        assert notes == []
        workspace.registry.attach_report("qa@1", "parity", report(passed=False))
        with pytest.raises(GateError, match="failed its last parity gate"):
            resolve("qa@1", workspace=workspace)


def test_names_that_a_version_answers_to(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        for number in (1, 2):
            (model_dir / "notes.txt").write_text(str(number))
            workspace.registry.create_version("qa", model_dir)
            workspace.registry.attach_report(f"qa@{number}", "parity", report(passed=True))
        workspace.registry.promote("qa@1", "production")
        (old,), _ = resolve("qa@production", workspace=workspace)
        assert (old.version, old.aliases) == ("qa@1", ("qa@production",))
        with pytest.raises(ValueError, match="would answer to 'qa'"):
            resolve("qa@1", "qa@2", workspace=workspace)
        (named,), _ = resolve("qa@2", workspace=workspace, name="canary")
        assert (named.name, named.version, named.aliases) == ("canary", "qa@2", ("qa@latest",))


def test_a_verdict_holds_for_the_dtype_that_was_tested(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        workspace.registry.create_version("qa", model_dir)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True))
        resolve("qa", workspace=workspace, dtype="float32")
        with pytest.raises(GateError, match="made in float32, and it would be served in bfloat16") as caught:
            resolve("qa", workspace=workspace, dtype="bfloat16")
        assert "hearth parity qa@1 --dtype bfloat16" in (caught.value.fix or "")
        _, notes = resolve("qa", workspace=workspace, dtype="bfloat16", allow_ungated=True)
        assert any("WARNING" in note and "bfloat16" in note for note in notes)
        # The verdicts of two dtypes stand side by side.
        workspace.registry.attach_report("qa@1", "parity", report(passed=False, dtype="bfloat16"))
        assert resolve("qa", workspace=workspace)[1] == []
        with pytest.raises(GateError, match="failed its last parity gate"):
            resolve("qa", workspace=workspace, dtype="bfloat16")
        workspace.registry.attach_report("qa@1", "parity", report(passed=True, dtype="bfloat16"))
        assert resolve("qa", workspace=workspace, dtype="bfloat16")[1] == []


def test_a_verdict_holds_for_the_compression_that_was_tested(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        workspace.registry.create_version("qa", model_dir)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True))
        for changes, command in (
            ({"weights": "int4"}, "hearth parity qa@1 --weights int4"),
            ({"kv_dtype": "int8"}, "hearth parity qa@1 --kv-dtype int8"),
        ):
            with pytest.raises(GateError, match="no parity report for") as caught:
                resolve("qa", workspace=workspace, **changes)
            assert command in (caught.value.fix or "")
            workspace.registry.attach_report("qa@1", "parity", {**report(passed=True), **changes})
            assert resolve("qa", workspace=workspace, **changes)[1] == []
        workspace.registry.attach_report("qa@1", "parity", {**report(passed=False), "weights": "int4"})
        with pytest.raises(GateError, match="failed its last parity gate"):
            resolve("qa", workspace=workspace, weights="int4")
        assert resolve("qa", workspace=workspace)[1] == []


def test_auto_means_the_stored_dtype(resolve, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with Workspace.open() as workspace:
        workspace.registry.create_version("qa", model_dir)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True))
        with pytest.raises(GateError, match="would be served in bfloat16"):
            resolve("qa", workspace=workspace)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True, dtype="bfloat16"))
        assert resolve("qa", workspace=workspace)[1] == []


def test_a_damaged_version_is_not_served(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        version = workspace.registry.create_version("qa", model_dir)
        workspace.registry.attach_report("qa@1", "parity", report(passed=True))
        weights = version.path / "model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(b"something else")
        with pytest.raises(IntegrityError):
            resolve("qa", workspace=workspace)


def test_a_plain_directory_is_served_with_a_note(resolve, model_dir: Path) -> None:
    with Workspace.open() as workspace:
        (model,), notes = resolve(str(model_dir), workspace=workspace)
        assert (model.name, model.version) == ("some-model", "some-model@unregistered")
        assert "no parity gate" in notes[0]
        with pytest.raises(NotFoundError):
            resolve("nobody", workspace=workspace)


def test_the_json_line(shared_data: Path, tmp_path: Path, workspace_dir: Path) -> None:
    from hearth.models import import_llama2c

    folder = shared_data / "stories260K"
    model = tmp_path / "stories260k"
    import_llama2c(folder / "stories260K.bin", folder / "tok512.bin", model)
    options = ("--num-threads", "1", "--log-level", "warning")
    with ServerProcess.start([f"stories={model}"], options=options, timeout=120) as server:
        facts = server.facts
        assert facts["url"].startswith("http://127.0.0.1:")
        assert facts["models"][0]["name"] == "stories"
        assert set(facts["timeline"]) == {"resolve", "imports", "engine process", "model", "server"}
        request = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
        body = json.loads(_post(server.base_url + "/generate", request))
        assert body["text"].startswith(", there was a little girl named Lily")
        assert body["model"] == "stories@unregistered"
        with pytest.raises(urllib.error.HTTPError) as caught:
            _post(server.base_url + "/chat", {"message": "hello"})
        assert "no chat template" in caught.value.read().decode()
        caught.value.close()
        assert server.stop() == 0


def _post(url: str, body: dict[str, object]) -> str:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()
