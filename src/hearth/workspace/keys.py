"""API keys: random 256-bit secrets, of which only the SHA-256 is stored.

A plain hash is right here: the secrets are uniformly random, so there is nothing to guess or to slow down.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from hearth.errors import InputError, NotFoundError
from hearth.workspace.database import Database
from hearth.workspace.names import new_id
from hearth.workspace.schema import api_keys, utcnow

PREFIX = "hk-"
_USE_RESOLUTION = timedelta(minutes=1)  # `last used` is written at most this often, not on every request


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret; ``hint`` is the secret's first characters, to recognise it by."""

    id: str
    name: str
    hint: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None

    @property
    def active(self) -> bool:
        """Whether the key still opens the door."""
        return self.revoked_at is None


class KeyStore:
    """The API keys of a workspace."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str) -> tuple[ApiKey, str]:
        """Make a key; the secret is returned here and can never be read again."""
        if not name.strip() or len(name) > 255:
            raise InputError(f"{name!r} is not a name for a key", fix="give a name of 1 to 255 characters")
        secret = PREFIX + secrets.token_urlsafe(32)
        key_id = new_id()
        row = {
            "id": key_id,
            "name": name.strip(),
            "secret_sha256": _hash(secret),
            "hint": secret[: len(PREFIX) + 4],
            "created_at": utcnow(),
        }
        with self._database.write() as connection:
            connection.execute(api_keys.insert().values(row))
        return self.get(key_id), secret

    def verify(self, secret: str) -> ApiKey | None:
        """The active key with this secret, or None."""
        if not secret.startswith(PREFIX):
            return None
        given = _hash(secret)
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.secret_sha256 == given)).first()
        # The look-up by hash tells an attacker nothing about a random secret; the comparison that decides
        # takes the same time wherever the two differ.
        if row is None or not hmac.compare_digest(row.secret_sha256, given) or row.revoked_at is not None:
            return None
        now = utcnow()
        if row.last_used_at is None or now - row.last_used_at >= _USE_RESOLUTION:
            self._update(row.id, last_used_at=now)
        return _key(row)

    def get(self, key_id: str) -> ApiKey:
        """The key with this id."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).first()
        if row is None:
            raise NotFoundError(f"no API key {key_id}", fix="`hearth keys list` shows them")
        return _key(row)

    def list(self) -> list[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        with self._database.read() as connection:
            query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
            return [_key(row) for row in connection.execute(query)]

    def revoke(self, key_id: str) -> ApiKey:
        """Close a key for good. Revoking it again changes nothing."""
        if self.get(key_id).active:
            self._update(key_id, revoked_at=utcnow())
        return self.get(key_id)

    def _update(self, key_id: str, **values: object) -> None:
        with self._database.write() as connection:
            connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(values))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.name, row.hint, row.created_at, row.last_used_at, row.revoked_at)
