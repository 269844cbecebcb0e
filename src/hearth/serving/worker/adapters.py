"""LoRA adapters of the served model: by which names requests may ask for them, and loading more."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from hearth.errors import InputError, RequestError
from hearth.serving.decoding import decode, invalid
from hearth.serving.http import HttpError
from hearth.serving.protocol import LoadAdapterRequest, UnloadAdapterRequest


def name_problem(name: str, taken: Collection[str]) -> str | None:
    """Why an adapter cannot have this name."""
    # A colon stands between model and adapter in requests, "=" and "?" before a path on a command line.
    if not name or len(name) > 128 or any(mark in name for mark in ":=?") or not name.isprintable():
        return "give it a name of 1 to 128 printable characters without ':', '=' and '?'"
    return f"there is a model or adapter {name!r} already" if name in taken else None


class AdapterEngine(Protocol):
    """What is used of AsyncEngine."""

    async def load_adapter(self, name: str, path: str) -> Any: ...
    async def unload_adapter(self, name: str) -> Any: ...


class Adapters:
    """The adapters of one model. ``paths`` holds where each came from, by name."""

    def __init__(self, engine: AdapterEngine, model_names: tuple[str, ...], loaded: dict[str, str]) -> None:
        self._engine = engine
        self._model_names = model_names
        self.paths = dict(loaded)

    def find(self, model: str | None) -> str | None:
        """The adapter that ``model`` means: its own name, or BASE:NAME; None for the model itself.

        Raises HttpError 404 for what is neither.
        """
        if model is None or model in self._model_names:
            return None
        if model in self.paths:
            return model
        base, _, name = model.rpartition(":")
        if base in self._model_names and name in self.paths:
            return name
        shown = model if len(model) <= 100 else model[:100] + "…"
        also = f" with the adapters {', '.join(self.paths)}" if self.paths else ""
        raise HttpError(
            404, f"the model {shown!r} is not served here; this is {self._model_names[0]}{also}",
            param="model", code="model_not_found",
        )  # fmt: skip

    async def load(self, body: bytes) -> dict[str, Any]:
        """``POST /v1/load_lora_adapter``."""
        request = decode(body, LoadAdapterRequest)
        name = request.lora_name
        problem = name_problem(name, {*self._model_names, *self.paths})
        if problem is not None:
            raise invalid(f"lora_name: {problem}", "lora_name")
        try:
            await self._engine.load_adapter(name, request.lora_path)
        except InputError as error:
            param = getattr(error, "param", None) or "lora_path"
            raise RequestError(error.message, fix=error.fix, param=param) from None
        self.paths[name] = request.lora_path
        return {"status": "loaded", "lora_name": name, "model": self._model_names[0]}

    async def unload(self, body: bytes) -> dict[str, Any]:
        """``POST /v1/unload_lora_adapter``; requests that use it end as the engine says."""
        request = decode(body, UnloadAdapterRequest)
        if request.lora_name not in self.paths:
            raise HttpError(
                404,
                f"no adapter {request.lora_name!r} is loaded",
                param="lora_name",
                code="adapter_not_found",
            )
        await self._engine.unload_adapter(request.lora_name)
        del self.paths[request.lora_name]
        return {"status": "unloaded", "lora_name": request.lora_name, "model": self._model_names[0]}
