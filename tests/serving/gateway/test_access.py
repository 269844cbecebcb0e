"""Keys: static ones, those of a real workspace, and revocation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hearth.serving.gateway import access as access_module
from hearth.serving.gateway.access import Access
from hearth.serving.http import HttpError
from hearth.workspace import Workspace


async def status(access: Access, header: str | None) -> int:
    try:
        await access.check(header)
    except HttpError as error:
        return error.status
    return 200


async def test_without_keys_everyone_may_pass() -> None:
    assert not Access().required
    assert await status(Access(), None) == 200


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong-key", "Basic secret-1", "secret-1", "Bearer secret-12"],
)
async def test_a_missing_or_wrong_key_is_401(header: str | None) -> None:
    assert await status(Access(["secret-1"]), header) == 401


async def test_static_keys_pass() -> None:
    access = Access(["secret-1", "secret-2"])
    assert await status(access, "Bearer secret-2") == 200
    assert await status(access, "bearer secret-1 ") == 200


async def test_workspace_keys_and_their_revocation(
    workspace_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "CACHE_SECONDS", 0.0)
    with Workspace.open() as workspace:
        key, secret = workspace.keys.create("laptop")
        access = Access((), lambda text: workspace.keys.verify(text) is not None)
        assert access.required
        assert await status(access, f"Bearer {secret}") == 200
        assert await status(access, f"Bearer {secret}x") == 401
        workspace.keys.revoke(key.id)
        assert await status(access, f"Bearer {secret}") == 401


async def test_a_valid_key_is_not_asked_for_each_request() -> None:
    asked: list[str] = []
    access = Access((), lambda text: asked.append(text) is None)
    for _ in range(3):
        assert await status(access, "Bearer hk-1") == 200
    assert asked == ["hk-1"]


async def test_wrong_keys_do_not_fill_memory() -> None:
    access = Access((), lambda text: False)
    for number in range(50):
        assert await status(access, f"Bearer wrong-{number}") == 401
    assert access._valid_until == {}
