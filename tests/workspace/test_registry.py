from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hearth.errors import (
    ConflictError,
    GateError,
    InputError,
    IntegrityError,
    ModelError,
    NotFoundError,
    StorageError,
)
from hearth.workspace import Workspace


@pytest.fixture
def registry(workspace):
    return workspace.registry


def card_of(version):
    return json.loads((version.path / "hearth.json").read_text())


def objects(workspace):
    root = workspace.artifacts.local_root
    return {path.parent.name + path.name for path in (root / "sha256").rglob("*") if path.is_file()}


# ── versions ─────────────────────────────────────────────────────────────────────────────────────────────


def test_versions_count_up_and_are_directories(registry, make_model):
    first = registry.create_version("chat", make_model("one"), tags={"lang": "en"}, actor="ann")
    second = registry.create_version("chat", make_model("two"))
    assert (first.ref, second.ref) == ("chat@1", "chat@2")
    assert (first.path / "model.safetensors").read_text() == "one"
    assert first.created_by == "ann"
    assert first.tags == {"lang": "en"}
    assert [version.ref for version in registry.list("chat")] == ["chat@1", "chat@2"]
    assert registry.list("other") == []


def test_the_same_content_is_the_same_version(registry, make_model):
    source = make_model("one")
    first = registry.create_version("chat", source)
    registry.create_version("chat", make_model("two"))
    assert registry.create_version("chat", source).ref == first.ref
    (source / "hearth.json").write_text('{"old": true}')
    assert registry.create_version("chat", source).ref == first.ref, "hearth.json is not content"
    assert registry.create_version("other", source).ref == "other@1"


def test_a_version_does_not_follow_its_source(registry, make_model):
    source = make_model("one")
    version = registry.create_version("chat", source)
    (source / "model.safetensors").write_text("changed")
    assert (version.path / "model.safetensors").read_text() == "one"
    registry.verify(version.ref)


def test_numbers_are_never_given_again(registry, make_model):
    source = make_model("one")
    registry.create_version("chat", source)
    second = registry.create_version("chat", make_model("two"))
    registry.delete(second.ref)
    assert registry.create_version("chat", make_model("three")).version == 3
    registry.delete("chat@1")
    assert registry.create_version("chat", source).version == 4, "also for content that was deleted"


@pytest.mark.parametrize("name", ["Chat", "", ".hidden", "-x", "a/b", "a b", "..", "ä", "a@b", "x" * 129])
def test_bad_names_are_refused(registry, make_model, name):
    with pytest.raises(InputError, match="is not a model name") as caught:
        registry.create_version(name, make_model())
    assert "lowercase letters" in (caught.value.fix or "")


def test_a_folder_that_is_no_model_is_refused(registry, tmp_path, workspace):
    with pytest.raises(NotFoundError, match="no folder"):
        registry.create_version("chat", tmp_path / "missing")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        registry.create_version("chat", tmp_path / "junk")
    (tmp_path / "junk" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        registry.create_version("chat", tmp_path / "junk")
    assert registry.list() == []
    assert not workspace.artifacts.local_root.exists()


def test_references(registry, make_model):
    for content in "abc":
        registry.create_version("chat", make_model(content))
    registry.promote("chat@2", "stable", force=True, reason="test")
    assert registry.get("chat").version == 3
    assert registry.get("chat@latest").version == 3
    assert registry.get("chat@1").version == 1
    assert registry.get("chat@stable").version == 2
    assert registry.resolve("chat@stable") == registry.get("chat@2").path
    for bad, message in {
        "nope": "no model 'nope'",
        "chat@9": "has no version 9",
        "chat@beta": "has no alias 'beta'",
    }.items():
        with pytest.raises(NotFoundError, match=message):
            registry.get(bad)
    for bad in ("chat@", "chat@a@b", "CHAT"):
        with pytest.raises(InputError):
            registry.get(bad)


def test_a_directory_resolves_to_itself(registry, make_model):
    source = make_model()
    assert registry.resolve(source) == source


def test_facts_are_read_from_the_files(registry, make_model):
    source = make_model(
        tokenizer__json="{}", chat_template__jinja="{{ x }}", README__md="---\nlicense: mit\n---\n# hi\n"
    )
    version = registry.create_version("chat", source)
    assert version.licence == "mit"
    assert version.facts["architecture"] == "LlamaForCausalLM"
    assert version.facts["dtype"] == "float32"
    inline = make_model("x", tokenizer_config__json=json.dumps({"chat_template": "{{ x }}"}))
    other = registry.create_version("chat", inline)
    assert other.facts["chat_template_sha256"] == version.facts["chat_template_sha256"]
    assert other.facts["tokenizer_sha256"] is None


def test_hearth_json_tells_the_whole_story(registry, make_model):
    version = registry.create_version(
        "chat",
        make_model("one", tokenizer__json="{}"),
        run_id="r1",
        recipe={"train": {"steps": 3}},
        recipe_hash="abc",
        dataset_fingerprint="fp",
        parent="base@2",
        licence="apache-2.0",
        actor="ann",
    )
    registry.attach_report("chat@1", "evaluation", {"bits_per_byte": 1.5})
    card = card_of(version)
    assert card["name"] == "chat"
    assert card["version"] == 1
    assert card["digest"] == version.digest
    assert set(card["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert card["files"]["tokenizer.json"]["sha256"] == card["tokenizer_sha256"]
    assert (card["run"], card["recipe"], card["recipe_hash"]) == ("r1", {"train": {"steps": 3}}, "abc")
    assert (card["dataset_fingerprint"], card["parent"]) == ("fp", "base@2")
    assert (card["licence"], card["created_by"], card["dtype"]) == ("apache-2.0", "ann", "float32")
    assert card["chat_template_sha256"] is None
    assert card["reports"][0]["report"] == {"bits_per_byte": 1.5}


def test_lineage_is_recorded(workspace, registry, make_model):
    registry.create_version("base", make_model("b"), dataset_fingerprint="fp0")
    registry.create_version("chat", make_model("c"), run_id="r1", dataset_fingerprint="fp1", parent="base@1")
    assert workspace.lineage.up("model:chat@1").refs() == [
        "model:chat@1",
        "model:base@1",
        "dataset:fp0",
        "run:r1",
        "dataset:fp1",
    ]
    assert workspace.lineage.down("dataset:fp0").refs() == ["dataset:fp0", "model:base@1", "model:chat@1"]


def test_a_lost_directory_is_made_again(registry, make_model):
    version = registry.create_version("chat", make_model("one"))
    shutil.rmtree(version.path)
    again = registry.get("chat")
    assert (again.path / "model.safetensors").read_text() == "one"
    (version.path / "hearth.json").unlink()  # as after a crash between files and hearth.json
    registry.get("chat")
    assert card_of(version)["version"] == 1


def test_a_full_disk_leaves_no_version(registry, workspace, make_model, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            registry.create_version("chat", make_model())
    assert registry.list() == []
    assert objects(workspace) == set()
    assert registry.create_version("chat", make_model()).version == 1


# ── gate, aliases, history ───────────────────────────────────────────────────────────────────────────────


def test_promotion_needs_a_passed_parity_report(registry, make_model):
    registry.create_version("chat", make_model())
    with pytest.raises(GateError, match="chat@1 has no passed parity report") as caught:
        registry.promote("chat", "production")
    assert "`hearth parity chat@1`" in (caught.value.fix or "")
    registry.attach_report("chat", "evaluation", {"passed": True})
    with pytest.raises(GateError):
        registry.promote("chat", "production")
    registry.attach_report("chat", "parity", {"passed": True})
    version = registry.promote("chat", "production")
    assert version.aliases == ("production",)
    assert card_of(version)["aliases"] == ["production"]
    registry.attach_report("chat", "parity", {"passed": False})
    with pytest.raises(GateError, match="failed its last parity gate"):
        registry.promote("chat", "beta")


def test_a_failed_compression_does_not_speak_against_a_version(registry, make_model):
    registry.create_version("chat", make_model())
    registry.attach_report("chat", "parity", {"passed": True})
    registry.attach_report("chat", "parity", {"passed": False, "weights": "int4"})
    assert registry.promote("chat", "production").aliases == ("production",)


def test_force_needs_a_reason_and_is_remembered(registry, make_model):
    registry.create_version("chat", make_model())
    for reason in (None, "  "):
        with pytest.raises(InputError, match="needs a reason"):
            registry.promote("chat", "production", force=True, reason=reason)
    registry.promote("chat", "production", actor="ann", force=True, reason="the customer waits")
    entry = registry.history("chat")[-1]
    assert (entry.event, entry.actor, entry.forced, entry.reason) == (
        "alias",
        "ann",
        True,
        "the customer waits",
    )
    registry.attach_report("chat", "parity", {"passed": True})
    registry.promote("chat", "beta", force=True, reason="no need")
    assert not registry.history("chat")[-1].forced, "nothing was overridden"


def test_an_alias_moves_and_its_way_is_kept(registry, make_model):
    versions = [registry.create_version("chat", make_model(content)) for content in "abc"]
    for version in versions:
        registry.attach_report(version.ref, "parity", {"passed": True})
    registry.promote("chat@1", "production", actor="ann")
    registry.promote("chat@3", "production", actor="bob", reason="better")
    registry.promote("chat@1", "production", actor="ann", reason="rollback")
    moves = [(e.actor, e.from_version, e.to_version, e.reason) for e in registry.history("chat") if e.alias]
    assert moves == [("ann", None, 1, None), ("bob", 1, 3, "better"), ("ann", 3, 1, "rollback")]
    assert card_of(versions[2])["aliases"] == []
    assert card_of(versions[0])["aliases"] == ["production"]
    registry.remove_alias("chat", "production", actor="ann")
    assert registry.get("chat@1").aliases == ()
    assert registry.history("chat")[-1].event == "alias-removed"
    with pytest.raises(NotFoundError, match="no alias 'production'"):
        registry.remove_alias("chat", "production")


@pytest.mark.parametrize("alias", ["latest", "3", "Production", "a b", ""])
def test_bad_aliases_are_refused(registry, make_model, alias):
    registry.create_version("chat", make_model())
    with pytest.raises(InputError, match="alias"):
        registry.promote("chat", alias, force=True, reason="x")


def test_reports_are_checked_and_kept_in_order(registry, make_model):
    registry.create_version("chat", make_model())
    with pytest.raises(InputError, match="no report kind 'vibes'"):
        registry.attach_report("chat", "vibes", {})
    for passed in (None, "yes", 1):
        with pytest.raises(InputError, match="passed"):
            registry.attach_report("chat", "parity", {"passed": passed})
    registry.attach_report("chat", "evaluation", {"x": 1}, actor="ann")
    registry.attach_report("chat", "parity", {"passed": False})
    assert [(r.kind, r.passed) for r in registry.reports("chat")] == [
        ("evaluation", None),
        ("parity", False),
    ]
    assert [r.created_by for r in registry.reports("chat", "evaluation")] == ["ann"]


def test_tags_are_set_and_removed(registry, make_model):
    version = registry.create_version("chat", make_model(), tags={"a": "1", "b": "2"})
    assert registry.tag("chat", {"a": None, "c": "3"}, actor="ann").tags == {"b": "2", "c": "3"}
    assert card_of(version)["tags"] == {"b": "2", "c": "3"}
    assert registry.history("chat")[-1].event == "tagged"


def test_the_history_of_nothing(registry):
    with pytest.raises(NotFoundError, match="no model 'chat'"):
        registry.history("chat")


# ── deletion ─────────────────────────────────────────────────────────────────────────────────────────────


def test_deletion_frees_what_nothing_else_needs(workspace, registry, make_model):
    shared = make_model("one")
    first = registry.create_version("chat", shared)
    kept = objects(workspace)
    second = registry.create_version("chat", make_model("two"))  # the same config.json
    registry.delete(second.ref, "ann", reason="bad")
    assert objects(workspace) == kept
    assert not second.path.exists()
    assert [v.ref for v in registry.list()] == ["chat@1"]
    registry.verify(first.ref)
    with pytest.raises(NotFoundError, match="has no version 2"):
        registry.get("chat@2")
    entry = registry.history("chat")[-1]
    assert (entry.event, entry.version, entry.actor, entry.reason) == ("deleted", 2, "ann", "bad")
    registry.delete("chat@1")
    assert objects(workspace) == set()
    with pytest.raises(NotFoundError, match="no model 'chat'"):
        registry.get("chat")


def test_content_that_somebody_stored_directly_stays(workspace, registry, make_model):
    source = make_model("one")
    digest = workspace.artifacts.put_file(source / "model.safetensors")
    tree = workspace.artifacts.put_tree(make_model("tree"))
    registry.create_version("chat", source)
    registry.delete("chat@1")
    assert workspace.artifacts.read_bytes(digest) == b"one"
    workspace.artifacts.verify(tree)


def test_an_alias_protects_its_version(registry, make_model):
    version = registry.create_version("chat", make_model())
    registry.promote("chat", "production", force=True, reason="x")
    with pytest.raises(ConflictError, match="chat@1 is production") as caught:
        registry.delete("chat@1")
    assert "--force" in (caught.value.fix or "")
    assert version.path.exists()
    registry.delete("chat@1", force=True, reason="gone")
    events = [(e.event, e.forced) for e in registry.history("chat")][-2:]
    assert events == [("alias-removed", True), ("deleted", True)]


# ── integrity ────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_finds_every_kind_of_damage(registry, make_model):
    version = registry.create_version("chat", make_model("one"))
    weights = version.path / "model.safetensors"
    registry.verify("chat")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"chat@1 is damaged: .*model\.safetensors is missing"):
        registry.verify("chat")
    weights.write_text("onE")
    with pytest.raises(IntegrityError, match=r"model\.safetensors has the hash"):
        registry.verify("chat")
    shutil.rmtree(version.path)  # the fix that the message names
    registry.verify("chat")
    (version.path / "extra.py").write_text("import os")
    with pytest.raises(IntegrityError, match=r"extra\.py does not belong to it"):
        registry.verify("chat")


def test_verify_finds_damage_in_the_store_alone(workspace, registry, make_model):
    registry.create_version("chat", make_model("one"))
    file = next(f for f in registry.files("chat") if f.path == "model.safetensors")
    path = workspace.artifacts.local_root / "sha256" / file.sha256[:2] / file.sha256[2:]
    path.unlink()
    path.write_text("onE")
    with pytest.raises(IntegrityError, match=f"sha256:{file.sha256} is damaged"):
        registry.verify("chat")


# ── export and import ────────────────────────────────────────────────────────────────────────────────────


def test_export_and_import_round_trip(tmp_path, registry, make_model):
    registry.create_version(
        "chat",
        make_model("one", tokenizer__json="{}"),
        recipe={"a": 1},
        recipe_hash="h",
        dataset_fingerprint="fp",
        tags={"t": "1"},
        licence="mit",
    )
    registry.attach_report("chat", "parity", {"passed": True, "prompts": 3})
    registry.attach_report("chat", "evaluation", {"ppl": 2.5})
    folder = registry.export("chat", tmp_path / "out")
    assert (folder / "model.safetensors").stat().st_nlink == 1, "an export is independent of the store"
    with Workspace.open(tmp_path / "other", environ={}) as other:
        version = other.registry.import_(folder)
        assert version.ref == "chat@1"
        assert version.digest == registry.get("chat").digest
        assert (version.recipe, version.recipe_hash, version.tags) == ({"a": 1}, "h", {"t": "1"})
        assert (version.dataset_fingerprint, version.licence) == ("fp", "mit")
        assert [(r.kind, r.report, r.imported) for r in other.registry.reports("chat")] == [
            ("parity", {"passed": True, "prompts": 3}, True),
            ("evaluation", {"ppl": 2.5}, True),
        ]
        with pytest.raises(GateError, match="only an imported parity report"):
            other.registry.promote("chat", "production")
        other.registry.import_(folder)
        assert len(other.registry.reports("chat")) == 2, "importing again adds nothing"
        assert other.registry.import_(folder, "renamed").ref == "renamed@1"
        other.registry.export("chat", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_text() == "one"


def test_export_overwrites_nothing(tmp_path, registry, make_model):
    registry.create_version("chat", make_model())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConflictError, match="exists already"):
        registry.export("chat", tmp_path / "out")


def test_a_plain_directory_needs_a_name(registry, make_model):
    source = make_model()
    with pytest.raises(InputError, match=r"has no hearth\.json that names it"):
        registry.import_(source)
    version = registry.import_(source, "plain", tags={"x": "1"}, actor="ann")
    assert (version.ref, version.tags, version.created_by) == ("plain@1", {"x": "1"}, "ann")
    assert registry.history("plain")[0].event == "imported"


def test_an_altered_export_is_refused(tmp_path, registry, make_model):
    registry.create_version("chat", make_model("one"))
    folder = registry.export("chat", tmp_path / "out")
    (folder / "model.safetensors").write_text("two")
    with pytest.raises(IntegrityError, match=r"model\.safetensors has the hash"):
        registry.import_(folder)
    (folder / "model.safetensors").write_text("one")
    (folder / "extra").write_text("x")
    with pytest.raises(IntegrityError, match=r"extra is not listed"):
        registry.import_(folder)
    (folder / "extra").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors, which is missing"):
        registry.import_(folder)


def test_a_card_of_another_format_is_refused(registry, make_model):
    source = make_model(hearth__json='{"format": 99, "files": {}}')
    with pytest.raises(ModelError, match="has the format 99"):
        registry.import_(source, "chat")


# ── several processes ────────────────────────────────────────────────────────────────────────────────────


def test_two_processes_get_different_numbers(workspace, registry, make_model, child, outcome):
    processes = [
        child("create_versions", "chat", *(make_model(f"{i}-{j}") for j in range(5))) for i in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [int(word) for process in processes for word in outcome(process).split()]
    assert sorted(numbers) == list(range(1, 16))
    for version in registry.list("chat"):
        registry.verify(version.ref)


def test_two_processes_with_one_content_get_one_version(registry, make_model, child, outcome):
    source = make_model("same")
    processes = [child("create_versions", "chat", source) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [outcome(process).split() for process in processes] == [["1"]] * 3
    assert [entry.event for entry in registry.history("chat")] == ["created"]


def test_a_workspace_on_another_machine_makes_its_own_directory(
    tmp_path, database_url, make_model, workspace
):
    """Two folders share one database and one store: the second one makes the files when it needs them."""
    shared = str(tmp_path / "bucket")

    def machine(name: str) -> Workspace:
        return Workspace.open(tmp_path / name, database_url=database_url, artifacts_url=shared, environ={})

    with machine("one") as one, machine("two") as two:
        one.registry.create_version("chat", make_model("weights"))
        path = two.registry.get("chat").path
        assert path.is_relative_to(tmp_path / "two")
        assert (path / "model.safetensors").read_text() == "weights"
        assert Path(path / "hearth.json").is_file()


def test_a_process_killed_while_it_stores_leaves_nothing_in_the_way(
    workspace, registry, make_model, child, outcome
):
    big = make_model("x" * 50_000_000)
    process = child("create_versions", "chat", big)
    process.stdin.write("go\n")
    process.stdin.flush()
    staging = workspace.artifacts.local_root / "tmp"
    for _ in range(3000):
        if process.poll() is not None or any(staging.glob("*")):
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert all(version.path.is_dir() for version in map(registry.get, (v.ref for v in registry.list())))
    other = registry.create_version("chat", make_model("small"))
    again = registry.create_version("chat", big)
    assert {other.version, again.version} == {1, 2}
    for version in (other, again):
        registry.verify(version.ref)


def test_promotion_and_deletion_at_once_leave_no_alias_to_nowhere(registry, make_model, open_workspace):
    """Whoever comes second sees what the first one did."""
    for i in range(5):
        version = registry.create_version("chat", make_model(f"v{i}"))
        others = [open_workspace().registry for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(others[0].promote, version.ref, "production", force=True, reason="x"),
                pool.submit(others[1].delete, version.ref),
            ]
            failed = [job.exception() for job in jobs if job.exception() is not None]
        assert len(failed) == 1
        assert isinstance(failed[0], ConflictError | NotFoundError)
        for alias_owner in registry.list("chat"):
            registry.delete(alias_owner.ref, force=True)
