"""From the name of a model, as commands and recipes spell it, to a directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hearth.errors import HearthError, ModelError, NotFoundError
from hearth.models.loading import check_model_directory

if TYPE_CHECKING:
    from hearth.workspace import Workspace

_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


def resolve_reference(reference: str | Path, workspace: Workspace | None = None) -> Path:
    """The directory of ``name``, ``name@3``, ``name@alias``, a model directory, or ``hf:org/name``.

    A directory wins over a name. Without ``workspace`` the default one is asked. Raises ``NotFoundError``
    for an unknown name and ``ModelError`` for a directory that is absent or a hub that cannot be reached.
    """
    text = str(reference)
    if text.startswith("hf:"):
        return _from_hub(text[3:])
    path = Path(text).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    looks_like_path = isinstance(reference, Path) or "/" in text or text.startswith((".", "~"))
    if looks_like_path:
        return check_model_directory(path)
    try:
        return _from_registry(text, workspace)
    except NotFoundError:
        if path.exists():
            # Something of that name lies here; say what is wrong with it rather than "no such model".
            check_model_directory(path)
        raise


def _from_registry(name: str, workspace: Workspace | None) -> Path:
    if workspace is not None:
        return Path(workspace.registry.resolve(name))
    from hearth.workspace import Workspace

    with Workspace.open() as opened:
        return Path(opened.registry.resolve(name))


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        raise ModelError(f"'hf:{name}' is no model of the Hugging Face hub", fix="write hf:organisation/name")
    repository, _, revision = name.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"the Hugging Face hub has no model {repository!r}, or it is private",
            fix="check the name; for a private model log in with `hf auth login`",
        ) from error
    except HearthError:
        raise
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model hf:{name} is not in the local cache and the hub cannot be reached: {reason}",
            fix="connect once to fetch it, or give a directory that holds the model",
        ) from error
