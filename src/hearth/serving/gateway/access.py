"""Who may use the server: API keys of the workspace and of the configuration, and one key of its operator.

An API key lets one ask the models. What changes the server (loading and unloading of models and adapters,
which reads its disk and takes its memory) takes the operator's own key, ``admin_key``. Only a server that
nobody else can reach, and that asks nobody for a key, does without.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Iterable

from starlette.types import Scope

from hearth.serving.http import HttpError

# How long a key that was valid is believed without asking the database: the delay of a revocation.
CACHE_SECONDS = 5.0


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _secret(authorization: str) -> str:
    scheme, _, secret = authorization.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _no_key() -> HttpError:
    return HttpError(401, "no API key: send the header Authorization: Bearer KEY", code="missing_api_key")


class Access:
    """Checks ``Authorization: Bearer …``. Without keys and without a store everyone may pass.

    loopback: whether the server can be reached from this machine only.
    """

    def __init__(
        self,
        static_keys: Iterable[str] = (),
        verify: Callable[[str], bool] | None = None,
        *,
        admin_key: str | None = None,
        loopback: bool = False,
    ) -> None:
        self._static = [_digest(key) for key in static_keys]
        self._verify = verify
        self._admin = None if admin_key is None else _digest(admin_key)
        self._loopback = loopback
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
            raise _no_key()
        secret = _secret(authorization)
        if not secret or not (self._is_admin(secret) or await self._is_valid(secret)):
            raise HttpError(401, "the API key is not valid, or was revoked", code="invalid_api_key")

    def check_admin(self, scope: Scope) -> None:
        """Return if the request may change the server; HttpError 401 or 403 otherwise."""
        headers = dict(scope["headers"])
        if self._admin is not None:
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            if not authorization:
                raise _no_key()
            if not self._is_admin(_secret(authorization)):
                raise HttpError(403, "this takes the key of the operator (admin_key)", code="not_allowed")
            return
        if self.required or not self._loopback:
            raise HttpError(
                403,
                "models and adapters are not changed from outside: the server was started without admin_key "
                "(HEARTH_SERVE__ADMIN_KEY)",
                code="not_allowed",
            )
        if b"origin" in headers:  # sent by browsers: any page that the operator looks at could ask
            raise HttpError(403, "without admin_key this is not for browsers", code="not_allowed")

    def _is_admin(self, secret: str) -> bool:
        return self._admin is not None and hmac.compare_digest(_digest(secret), self._admin)

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
