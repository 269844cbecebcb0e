from __future__ import annotations

import io
import json
import shutil

import pytest

from hearth.workspace import Workspace


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "float32"}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def chat(hearth, workspace_dir, folder):
    """A registered version, chat@1."""
    assert hearth("models", "import", folder, "--name", "chat", "--tag", "note=[x]").code == 0
    return "chat@1"


def pass_the_gate(ref: str) -> None:
    with Workspace.open() as workspace:
        workspace.registry.attach_report(ref, "parity", {"passed": True})


def test_list_and_show(hearth, chat):
    (line,) = hearth("models", "list").out.splitlines()[1:]
    assert line.split()[:3] == ["chat@1", "not", "run"]
    (listed,) = hearth("models", "list", "chat", "--json").json
    assert (listed["ref"], listed["parity"], listed["tags"]) == ("chat@1", "not run", {"note": "[x]"})
    shown = hearth("models", "show", "chat")
    assert "architecture   LlamaForCausalLM" in shown.out
    assert "note=[x]" in shown.out
    assert "model.safetensors" in shown.out
    assert {f["path"] for f in hearth("models", "show", "chat", "--json").json["files"]} == {
        "config.json",
        "model.safetensors",
    }
    assert "no model 'other'" in hearth("models", "list", "other").err


def test_promotion_is_gated_and_force_is_remembered(hearth, chat):
    refused = hearth("models", "promote", "chat", "production")
    assert refused.code == 1
    assert "hearth parity chat@1" in refused.err
    assert hearth("models", "promote", "chat", "production", "--force").code == 2
    forced = hearth(
        "models", "promote", "chat", "production", "--force", "--reason", "why [not]", "--actor", "ann"
    )
    assert forced.out == "chat@production now means version 1\n"
    history = hearth("models", "history", "chat")
    assert "why [not]" in history.out
    last = hearth("models", "history", "chat", "--json").json[-1]
    assert (last["actor"], last["forced"], last["to_version"]) == ("ann", True, 1)


def test_promotion_after_the_gate(hearth, chat):
    pass_the_gate("chat@1")
    assert hearth("models", "promote", chat, "production", "--json").json["aliases"] == ["production"]
    assert "production" in hearth("models", "list").out
    assert "passed" in hearth("models", "show", "chat@production").out
    assert hearth("models", "unalias", "chat", "production").code == 0
    assert hearth("models", "show", "chat@production").code == 2


def test_verify(hearth, chat, workspace_dir):
    assert hearth("models", "verify", "chat").out == "chat@1: every file matches\n"
    assert hearth("models", "verify", "--all", "--json").json == [
        {"ref": "chat@1", "ok": True, "problem": None}
    ]
    weights = workspace_dir / "models" / "chat" / "1" / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"weightz")
    result = hearth("models", "verify", "--all")
    assert result.code == 1
    assert result.out == "chat@1: DAMAGED\n"
    assert "model.safetensors has the hash" in result.err
    assert hearth("models", "verify").code == 2
    assert hearth("models", "verify", "chat", "--all").code == 2


def test_delete(hearth, chat, workspace_dir, monkeypatch):
    hearth("models", "promote", "chat", "production", "--force", "--reason", "x")
    refused = hearth("models", "delete", "chat", "--yes")
    assert refused.code == 1
    assert "chat@1 is production" in refused.err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert hearth("models", "delete", "chat").code == 130, "nobody answered"
    assert hearth("models", "show", "chat").code == 0
    assert hearth("models", "delete", "chat", "--yes", "--force").out == "deleted chat@1\n"
    assert hearth("models", "list", "--json").json == []
    assert not (workspace_dir / "models" / "chat" / "1").exists()


def test_tags(hearth, chat):
    assert hearth("models", "tag", "chat", "a=1", "--remove", "note").out == "chat@1: a=1\n"
    assert hearth("models", "tag", "chat", "--remove", "a").out == "chat@1: no tags\n"
    assert hearth("models", "tag", "chat").code == 2
    assert hearth("models", "tag", "chat", "novalue").code == 2


def test_export_and_import(hearth, chat, tmp_path, workspace_dir):
    out = tmp_path / "out"
    assert hearth("models", "export", "chat", out).code == 0
    assert json.loads((out / "hearth.json").read_text())["name"] == "chat"
    shutil.rmtree(workspace_dir)
    assert hearth("models", "import", out).out.startswith("imported chat@1")
    assert hearth("models", "export", "chat", out).code == 1, "it is not overwritten"
    (out / "model.safetensors").write_bytes(b"altered")
    altered = hearth("models", "import", out)
    assert altered.code == 1
    assert "has the hash" in altered.err


def test_bad_imports(hearth, workspace_dir, tmp_path, folder):
    assert hearth("models", "import", tmp_path / "none").code == 2
    assert "--name" in hearth("models", "import", folder).err
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "x").write_text("x")
    result = hearth("models", "import", tmp_path / "junk", "--name", "junk")
    assert result.code == 2
    assert "no config.json" in result.err
    (tmp_path / "m.bin").write_bytes(b"x")
    assert "--tokenizer" in hearth("models", "import", tmp_path / "m.bin", "--name", "m").err
    assert hearth("models", "import", folder, "--name", "Not OK").code == 2


def test_import_of_llama2c_files(hearth, workspace_dir, shared_data):
    stories = shared_data / "stories260K"
    result = hearth(
        "models",
        "import",
        stories / "stories260K.bin",
        "--tokenizer",
        stories / "tok512.bin",
        "--name",
        "stories",
        "--json",
    )
    assert result.code == 0, result.err
    version = result.json
    assert (version["ref"], version["tags"]) == ("stories@1", {"format": "llama2.c"})
    assert version["facts"]["architecture"] == "LlamaForCausalLM"
    assert version["facts"]["tokenizer_sha256"]
    assert "imported: source:stories260K.bin" in hearth("lineage", "stories").out
    assert hearth("models", "verify", "stories").code == 0
    assert [path.name for path in workspace_dir.iterdir() if path.name.startswith(".import")] == []


def test_a_truncated_llama2c_file_leaves_nothing(hearth, workspace_dir, shared_data, tmp_path):
    stories = shared_data / "stories260K"
    (tmp_path / "cut.bin").write_bytes((stories / "stories260K.bin").read_bytes()[:5000])
    words = ("--tokenizer", stories / "tok512.bin", "--name", "cut")
    assert hearth("models", "import", tmp_path / "cut.bin", *words).code == 2
    assert hearth("models", "list", "--json").json == []
    assert [path.name for path in workspace_dir.iterdir() if path.name.startswith(".import")] == []


def test_nothing_yet(hearth, workspace_dir):
    result = hearth("models", "list")
    assert (result.code, result.out) == (0, "")
    assert "nothing here yet" in result.err
    assert hearth("models", "list", "--json").json == []
    for words in (
        ("show", "x"),
        ("verify", "x"),
        ("promote", "x", "y"),
        ("delete", "x", "--yes"),
        ("history", "x"),
        ("tag", "x", "a=b"),
        ("export", "x", "y"),
        ("unalias", "x", "y"),
    ):
        result = hearth("models", *words)
        assert result.code == 2, words
        assert "there is no workspace" in result.err
    assert not workspace_dir.exists()
    Workspace.open().close()
    assert "no models yet" in hearth("models", "list").err
