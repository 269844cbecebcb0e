from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from hearth.errors import ConfigError
from hearth.workspace import Workspace


def test_the_folder_is_the_argument_the_variable_or_dot_hearth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEARTH_HOME", raising=False)
    monkeypatch.delenv("HEARTH_DATABASE_URL", raising=False)
    with Workspace.open() as workspace:
        assert workspace.root == tmp_path / ".hearth"
    monkeypatch.setenv("HEARTH_HOME", str(tmp_path / "home"))
    with Workspace.open() as workspace:
        assert workspace.root == tmp_path / "home"
    with Workspace.open("given") as workspace:
        assert workspace.root == tmp_path / "given"


def test_a_new_workspace_keeps_out_of_git(tmp_path):
    with Workspace.open(tmp_path / "w", environ={}):
        assert (tmp_path / "w" / ".gitignore").read_text() == "*\n"


def test_asking_whether_there_is_one_makes_none(tmp_path):
    assert not Workspace.exists(tmp_path / "w", environ={})
    assert list(tmp_path.iterdir()) == []
    Workspace.open(tmp_path / "w", environ={}).close()
    assert Workspace.exists(tmp_path / "w", environ={})


def test_everything_is_there_when_it_is_opened_again(tmp_path, make_model_folder):
    with Workspace.open(tmp_path / "w", environ={}) as workspace:
        run = workspace.runs.create("train", name="x")
        run.log_metrics({"loss": 1}, step=1)
        workspace.registry.create_version("chat", make_model_folder, run_id=run.id)
        _, secret = workspace.keys.create("k")
        run.finish()
    with Workspace.open(tmp_path / "w", environ={}) as workspace:
        assert workspace.runs.get(run.id).status == "finished"
        assert len(workspace.runs.metrics(run.id)) == 1
        assert workspace.registry.get("chat").run_id == run.id
        assert workspace.keys.verify(secret) is not None
        assert workspace.lineage.up("model:chat@1").refs() == ["model:chat@1", f"run:{run.id}"]


@pytest.fixture
def make_model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_store_may_be_any_fsspec_url(tmp_path, make_model_folder):
    environ = {"HEARTH_ARTIFACTS_URL": f"memory://{uuid.uuid4().hex}"}
    with Workspace.open(tmp_path / "w", environ=environ) as workspace:
        version = workspace.registry.create_version("chat", make_model_folder)
        assert (version.path / "config.json").read_text() == "{}"
        workspace.registry.verify("chat")
        assert not (tmp_path / "w" / "artifacts").exists()
        workspace.registry.delete("chat")
        assert workspace.artifacts._fs.find(workspace.artifacts._root) == []


def test_a_bad_store_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="HEARTH_ARTIFACTS_URL nonsense://x"):
        Workspace.open(tmp_path / "w", environ={"HEARTH_ARTIFACTS_URL": "nonsense://x"})


def test_the_database_may_be_elsewhere(tmp_path):
    environ = {"HEARTH_DATABASE_URL": f"sqlite:///{tmp_path / 'db' / 'x.db'}"}
    with Workspace.open(tmp_path / "w", environ=environ) as workspace:
        workspace.keys.create("k")
    assert (tmp_path / "db" / "x.db").exists()
    assert not (tmp_path / "w" / "hearth.db").exists()
    assert Workspace.exists(tmp_path / "w", environ=environ)


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, hearth.workspace, hearth.config; "
        "sys.exit(any(m in sys.modules for m in ('torch','transformers','numpy','alembic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
