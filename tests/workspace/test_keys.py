from __future__ import annotations

import hashlib
from datetime import timedelta

import pytest
import sqlalchemy as sa

from hearth.errors import InputError, NotFoundError
from hearth.workspace.schema import api_keys, utcnow


@pytest.fixture
def keys(workspace):
    return workspace.keys


def test_a_secret_opens_and_no_other_does(keys):
    key, secret = keys.create("laptop")
    assert secret.startswith("hk-")
    assert len(secret) == 46, "256 bits in base64"
    assert keys.verify(secret).id == key.id
    for wrong in ("", "hk-", secret[:-1], secret + "x", secret.upper(), secret[3:]):
        assert keys.verify(wrong) is None


def test_only_the_hash_is_stored(keys, workspace):
    key, secret = keys.create("laptop")
    with workspace.database.read() as connection:
        row = connection.execute(sa.select(api_keys)).one()
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in str(row)
    assert row.hint == secret[:7] == key.hint


def test_secrets_differ(keys):
    assert keys.create("a")[1] != keys.create("a")[1]


def test_a_revoked_key_is_closed_for_good(keys):
    key, secret = keys.create("laptop")
    revoked = keys.revoke(key.id)
    assert not revoked.active
    assert keys.verify(secret) is None
    assert keys.revoke(key.id).revoked_at == revoked.revoked_at
    with pytest.raises(NotFoundError, match="no API key nope"):
        keys.revoke("nope")


def test_use_is_noted_but_not_on_every_request(keys, workspace):
    key, secret = keys.create("laptop")
    assert keys.get(key.id).last_used_at is None
    keys.verify(secret)
    first = keys.get(key.id).last_used_at
    assert first is not None
    keys.verify(secret)
    assert keys.get(key.id).last_used_at == first
    with workspace.database.write() as connection:
        connection.execute(api_keys.update().values(last_used_at=utcnow() - timedelta(hours=1)))
    keys.verify(secret)
    assert keys.get(key.id).last_used_at >= first


def test_a_name_is_needed(keys):
    for name in ("", "  ", "x" * 256):
        with pytest.raises(InputError, match="is not a name for a key"):
            keys.create(name)


def test_keys_are_listed_oldest_first(keys):
    ids = [keys.create(name)[0].id for name in "abc"]
    keys.revoke(ids[1])
    assert [(key.id, key.active) for key in keys.list()] == [
        (ids[0], True),
        (ids[1], False),
        (ids[2], True),
    ]
