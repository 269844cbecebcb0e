"""Layered loading: defaults < preset < file < environment < command line, and where each value came from."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from hearth.config.problems import describe
from hearth.config.recipe import Recipe
from hearth.config.sources import Document, KeyPath, dump_yaml, parse_scalar, read_document, read_yaml
from hearth.errors import ConfigError

PRESETS = Path(__file__).with_name("presets")
_PREFIX = "HEARTH_"
# Environment sections of settings other than the recipe's.
_OTHER_SECTIONS = frozenset({"serve"})

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """Where a value came from; ``detail`` is the preset, the file with its line, or the variable."""

    kind: Literal["default", "preset", "file", "environment", "command line"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}".strip()

    @property
    def place(self) -> str:
        """What an error about the value begins with."""
        if self.kind in ("file", "environment"):
            return self.detail.partition(":")[0]
        return str(self)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Settings, and for each dotted key the source of its value."""

    settings: T
    sources: dict[str, Source]
    path: Path | None
    preset: str | None = None


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and for each dotted key the source of its value."""

    recipe: Recipe
    sources: dict[str, Source]
    path: Path | None
    preset: str | None = None


def load_recipe(
    path: str | Path | None, overrides: Iterable[str] = (), *, environ: Mapping[str, str] | None = None
) -> LoadedRecipe:
    """Read a recipe with all its layers; ``overrides`` are ``key=value`` texts with YAML values.

    Relative paths in the file (``data.sources[].path``, and ``data.dataset``, ``model.base`` and
    ``tokenizer.base`` where they are no names) are resolved against the folder of the file; those of the
    command line and the environment stay relative to the current directory. Raises ConfigError, listing
    every mistake.
    """
    loaded = load_settings(Recipe, path, overrides, environ=environ)
    return LoadedRecipe(loaded.settings, loaded.sources, loaded.path, loaded.preset)


def load_settings(
    cls: type[T],
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
) -> Loaded[T]:
    """Read settings of any frozen pydantic class in the layers of ``load_recipe``; no path, no file.

    A class with ``environment_section = "serve"`` reads ``HEARTH_SERVE__KEY``; Recipe reads
    ``HEARTH_SECTION__KEY``.
    """
    environ = os.environ if environ is None else environ
    path = None if path is None else Path(path)
    layers = _Layers()
    document = Document({}) if path is None else read_document(path)
    given = _parse_overrides(overrides)
    preset = _take_preset(cls, document.value, given, path)
    if preset is not None:
        content = read_preset(preset)
        layers.add(content.value, lambda _key: Source("preset", preset))
    if path is not None:
        value = _resolve_paths(document.value, path.absolute().parent) if cls is Recipe else document.value
        layers.add(value, lambda key: Source("file", _file_detail(path.name, document.lines, key)))
    for variable, key, value in _environment(cls, environ):
        layers.set(key, value, Source("environment", variable))
    for key, value in given:
        layers.set(key, value, Source("command line"))
    settings = _validate(cls, layers)
    return Loaded(settings, _all_sources(settings, layers.sources), path, preset)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of the canonical JSON of a resolved recipe; which layer gave a value does not matter."""
    text = json.dumps(
        to_dict(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def to_dict(settings: BaseModel) -> dict[str, Any]:
    """Every value, in the spelling of the file."""
    return settings.model_dump(mode="json", by_alias=True)


def to_yaml(settings: BaseModel) -> str:
    """A resolved file: loads back to equal settings in an empty environment."""
    return dump_yaml(to_dict(settings))


def json_schema(cls: type[BaseModel] = Recipe) -> dict[str, Any]:
    """A JSON schema for editors. Recipes may also name a preset."""
    schema = cls.model_json_schema(by_alias=True)
    if cls is Recipe:
        preset = {
            "type": "string",
            "enum": list_presets(),
            "description": "Values to start from; what the file says wins.",
        }
        schema["properties"] = {"preset": preset, **schema["properties"]}
        # A section may be left empty, which YAML reads as null.
        for name, field in Recipe.model_fields.items():
            key = field.alias or name
            own = schema["properties"][key]
            if "$ref" not in own:  # may be left out, and thus is null already
                continue
            schema["properties"][key] = {
                "anyOf": [{"$ref": own.pop("$ref")}, {"type": "null"}],
                **own,
            }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def list_presets() -> list[str]:
    """Names of the presets that ship with Hearth."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> Document:
    """The content of a preset. Raises ConfigError, which lists what there is."""
    names = list_presets()
    if name not in names:
        raise ConfigError(f"preset {name!r} does not exist", fix=f"use one of {', '.join(names)}")
    return read_yaml((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────


class _Layers:
    """The values so far, and the source of each that is not a default."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.sources: dict[KeyPath, Source] = {}

    def add(self, layer: Mapping[str, Any], source: Callable[[KeyPath], Source]) -> None:
        """Lay a mapping over what there is: mappings merge, everything else replaces."""
        self._merge(self.value, layer, (), source)

    def set(self, key: KeyPath, value: Any, source: Source) -> None:
        """Lay a single value over what there is."""
        layer: Any = value
        for part in reversed(key):
            layer = {part: layer}
        self.add(layer, lambda _key: source)

    def source(self, key: Sequence[str]) -> Source | None:
        """The source of a key, or of the nearest one that contains it."""
        for length in range(len(key), 0, -1):
            found = self.sources.get(tuple(key[:length]))
            if found is not None:
                return found
        return None

    def _merge(
        self,
        into: dict[str, Any],
        layer: Mapping[str, Any],
        path: KeyPath,
        source: Callable[[KeyPath], Source],
    ) -> None:
        for name, value in layer.items():
            key = (*path, name)
            self.sources[key] = source(key)
            if isinstance(value, dict):
                if not isinstance(into.get(name), dict):
                    self._forget_below(key)
                    into[name] = {}
                self._merge(into[name], value, key, source)
            else:
                self._forget_below(key)
                into[name] = value

    def _forget_below(self, key: KeyPath) -> None:
        for other in [k for k in self.sources if len(k) > len(key) and k[: len(key)] == key]:
            del self.sources[other]


def _file_detail(name: str, lines: Mapping[KeyPath, int], key: KeyPath) -> str:
    line = lines.get(key)
    return name if line is None else f"{name}:{line}"


def _parse_overrides(overrides: Iterable[str]) -> list[tuple[KeyPath, Any]]:
    found = []
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            raise ConfigError(
                f"command line: {text!r} is not key=value", fix="write it as train.learning_rate=1e-3"
            )
        found.append((parts, parse_scalar(value, f"command line: {key.strip()}")))
    return found


def _take_preset(
    cls: type[BaseModel], document: dict[str, Any], given: list[tuple[KeyPath, Any]], path: Path | None
) -> str | None:
    """Remove the key `preset` from file and command line; return the one that counts."""
    if cls is not Recipe:
        return None
    name, place = document.pop("preset", None), "" if path is None else path.name
    for key, value in [entry for entry in given if entry[0] == ("preset",)]:
        given.remove((key, value))
        name, place = value, "command line"
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{place}: preset: {name!r} is not the name of a preset")
    if name is not None and name not in list_presets():
        close = difflib.get_close_matches(name, list_presets(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"{place}: preset: there is no preset {name!r}{hint}", fix=f"presets: {', '.join(list_presets())}"
        )
    return name


def _environment(cls: type[BaseModel], environ: Mapping[str, str]) -> list[tuple[str, KeyPath, Any]]:
    """The variables that speak to ``cls``, as (variable, key, value)."""
    own = getattr(cls, "environment_section", None)
    found = []
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        parts = tuple(variable.removeprefix(_PREFIX).lower().split("__"))
        if own is not None:
            if parts[0] != own:
                continue
            parts = parts[1:]
        elif parts[0] in _OTHER_SECTIONS:
            continue
        found.append((variable, parts, parse_scalar(environ[variable], variable)))
    return found


def _resolve_paths(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the relative paths of a recipe file absolute."""
    value = json.loads(json.dumps(value, default=str))  # a deep copy; TOML's dates become text
    data = value.get("data")
    if isinstance(data, dict):
        dataset = data.get("dataset")
        if isinstance(dataset, str) and (
            dataset.startswith("~") or "/" in dataset or (folder / dataset).is_dir()
        ):
            data["dataset"] = _absolute(dataset, folder)  # otherwise a name in the workspace
        for source in data["sources"] if isinstance(data.get("sources"), list) else []:
            if (
                isinstance(source, dict)
                and isinstance(source.get("path"), str)
                and source["path"] not in ("stdlib", "stdlib-chat")
            ):
                source["path"] = _absolute(source["path"], folder)
    for name in ("model", "tokenizer"):
        section = value.get(name)
        base = section.get("base") if isinstance(section, dict) else None
        if (
            isinstance(section, dict)
            and isinstance(base, str)
            and (base.startswith(("./", "../", "~")) or (folder / base).is_dir())
        ):
            section["base"] = _absolute(base, folder)
    return value


def _absolute(path: str, folder: Path) -> str:
    # normpath: `..` goes away also where the folder does not exist (yet); a glob stays a glob.
    return os.path.normpath(folder / os.path.expanduser(path))  # noqa: PTH111


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────


def _validate(cls: type[T], layers: _Layers) -> T:
    value = {
        key: {} if item is None and _is_section(cls, key) else item for key, item in layers.value.items()
    }
    try:
        # As JSON and strict: `true` is no number, "10" is none either, and a list may fill a tuple.
        return cls.model_validate_json(
            json.dumps(value, default=str), strict=True, by_alias=True, by_name=False
        )
    except ValidationError as error:
        problems = describe(cls, error, value, layers.source)
        raise ConfigError("\n".join(problems)) from error


def _is_section(cls: type[BaseModel], key: str) -> bool:
    for name, info in cls.model_fields.items():
        if key == (info.alias or name):
            return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    return False


def _all_sources(settings: BaseModel, given: Mapping[KeyPath, Source]) -> dict[str, Source]:
    """The source of every leaf. A list is one leaf, and so is a mapping with keys of the user's choice."""
    found: dict[str, Source] = {}

    def visit(section: BaseModel, path: KeyPath) -> None:
        for name, info in type(section).model_fields.items():
            key = (*path, info.alias or name)
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                visit(value, key)
            else:
                found[".".join(key)] = given.get(key, Source("default"))

    visit(settings, ())
    return found
