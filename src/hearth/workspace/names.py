"""Names, ids and references of the things in a workspace."""

from __future__ import annotations

import getpass
import os
import re
import secrets

from hearth.errors import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_ID_LETTERS = "bcdfghjkmnpqrstvwxz"  # no vowels: ids spell no words
_ID_SYMBOLS = _ID_LETTERS + "23456789"
LATEST = "latest"


def new_id() -> str:
    """A short random id: a letter, then seven letters or digits (36 bits)."""
    return secrets.choice(_ID_LETTERS) + "".join(secrets.choice(_ID_SYMBOLS) for _ in range(7))


def check_model_name(name: str) -> str:
    """Return ``name`` when it may name a model; raise InputError otherwise."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a model name",
            fix="use lowercase letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` when it may name a version; raise InputError otherwise."""
    if not _NAME.fullmatch(alias):
        raise InputError(
            f"{alias!r} is not an alias",
            fix="use lowercase letters, digits, '.', '_' and '-', such as production",
        )
    if alias.isdigit():
        raise InputError(f"the alias {alias!r} reads as a version number", fix="use a word")
    if alias == LATEST:
        raise InputError("the alias 'latest' always means the newest version and cannot be set")
    return alias


def split_reference(ref: str) -> tuple[str, str | None]:
    """``name`` → (name, None); ``name@3`` or ``name@alias`` → (name, what follows the @)."""
    name, at, selector = ref.partition("@")
    check_model_name(name)
    if at and not _NAME.fullmatch(selector):
        raise InputError(f"{ref!r} is not a model reference", fix="write name, name@3 or name@alias")
    return name, selector if at else None


def default_actor() -> str:
    """Who acts when nobody says: $HEARTH_ACTOR, else the user of the operating system."""
    actor = os.environ.get("HEARTH_ACTOR", "").strip()
    if actor:
        return actor
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user id
        return f"uid-{os.getuid()}"
