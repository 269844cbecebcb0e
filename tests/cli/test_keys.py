from __future__ import annotations

from hearth.workspace import Workspace


def test_a_key_from_creation_to_revocation(hearth, workspace_dir):
    created = hearth("keys", "create", "my [laptop]")
    assert created.code == 0
    secret = created.out.strip()
    assert "only time" in created.err
    with Workspace.open() as workspace:
        key = workspace.keys.verify(secret)
        assert key is not None
    listed = hearth("keys", "list")
    assert "my [laptop]" in listed.out
    assert "active" in listed.out
    assert secret not in listed.out + listed.err
    revoked = hearth("keys", "revoke", key.id)
    assert (revoked.code, revoked.out) == (0, f"revoked {key.id} (my [laptop])\n")
    assert "revoked" in hearth("keys", "list").out
    with Workspace.open() as workspace:
        assert workspace.keys.verify(secret) is None


def test_json(hearth, workspace_dir):
    created = hearth("keys", "create", "ci", "--json").json
    assert created["secret"].startswith("hk-")
    (listed,) = hearth("keys", "list", "--json").json
    assert "secret" not in listed
    assert (listed["id"], listed["name"], listed["active"]) == (created["id"], "ci", True)
    assert hearth("keys", "revoke", created["id"], "--json").json["active"] is False


def test_nothing_yet(hearth, workspace_dir):
    result = hearth("keys", "list")
    assert (result.code, result.out) == (0, "")
    assert "nothing here yet" in result.err
    assert hearth("keys", "list", "--json").json == []
    assert not workspace_dir.exists(), "reading makes no workspace"
    assert hearth("keys", "revoke", "x").code == 2
    Workspace.open().close()
    assert "hearth keys create" in hearth("keys", "list").err


def test_mistakes(hearth, workspace_dir):
    assert hearth("keys", "create", "").code == 2
    result = hearth("keys", "revoke", "nope")
    assert result.code == 2
    assert "no API key nope" in result.err
