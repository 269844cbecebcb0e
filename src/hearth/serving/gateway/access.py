"""Who may use the server: API keys of the workspace and of the configuration."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Iterable

from hearth.serving.http import HttpError

# How long a key that was valid is believed without asking the database: the delay of a revocation.
CACHE_SECONDS = 5.0


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Access:
    """Checks ``Authorization: Bearer …``. Without keys and without a store everyone may pass."""

    def __init__(self, static_keys: Iterable[str] = (), verify: Callable[[str], bool] | None = None) -> None:
        self._static = [_digest(key) for key in static_keys]
        self._verify = verify
        self._valid_until: dict[bytes, float] = {}

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._static) or self._verify is not None

    async def check(self, authorization: str | None) -> None:
        """Return if the header holds a valid key; raise HttpError 401 otherwise."""
        if not self.required:
            return
        if not authorization:
            raise HttpError(
                401, "no API key: send the header Authorization: Bearer KEY", code="missing_api_key"
            )
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret or not await self._is_valid(secret):
            raise HttpError(401, "the API key is not valid, or was revoked", code="invalid_api_key")

    async def _is_valid(self, secret: str) -> bool:
        digest = _digest(secret)
        # No early exit: the time must not tell which key is near.
        if sum(hmac.compare_digest(digest, known) for known in self._static):
            return True
        if self._verify is None:
            return False
        now = time.monotonic()
        if self._valid_until.get(digest, 0.0) > now:
            return True
        if not await asyncio.to_thread(self._verify, secret):
            self._valid_until.pop(digest, None)
            return False
        self._valid_until = {key: until for key, until in self._valid_until.items() if until > now}
        self._valid_until[digest] = now + CACHE_SECONDS
        return True
