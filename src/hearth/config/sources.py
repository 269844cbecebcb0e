"""Reading YAML and TOML into plain values, knowing on which line each key stands.

The YAML is that of YAML 1.2's core schema: `1e-4` is a number, only `true` and `false` are booleans, dates
are text. Duplicate keys are refused, because the first one would silently be ignored.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hearth.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_MAX_NODES = 100_000  # far beyond any real file: stops aliases that multiply
_MAX_DIGITS = 100  # Python itself refuses to read some thousands
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: its value, and the line (from 1) of each key path where the format tells it."""

    value: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of YAML 1.2 instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in PyYAML


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", [*"~nN", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", [*"tTfF"]),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", [*"-+0123456789"]),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        [*"-+0123456789."],
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something other than text."""


for _first_letter, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _resolver in _resolvers:
        _Dumper.add_implicit_resolver(_resolver[0], _resolver[1], [_first_letter])


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds Unicode's line breaks away unless they are escaped, which only double quotes do.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """``value`` as YAML that ``read_yaml`` reads back to the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def parse_scalar(text: str, key: str = "") -> Any:
    """The value that ``text`` has in a YAML file: for the command line and the environment.

    Raises ConfigError, naming the ``key`` that it was given to.
    """
    what = f"{key}: " if key else ""
    try:
        return _Builder().build(yaml.compose(text, Loader=_Loader), ())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{what}{text!r} is not a YAML value: {_problem(error)}",
            fix="in a shell, put what holds spaces, braces or brackets into quotes" if key else None,
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{what}{text[:40]!r}… is nested too deeply") from error


def read_document(path: Path) -> Document:
    """Read a YAML, TOML or JSON file whose top level is a mapping. Raises ConfigError, naming the file."""
    name = path.name
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a file", fix="give a YAML or TOML file")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} has no known ending", fix=f"name it with one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"no file {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    return _read_toml(text, name) if path.suffix.lower() == ".toml" else read_yaml(text, name)


def read_yaml(text: str, name: str) -> Document:
    """Parse YAML text; an empty file is an empty mapping."""
    builder = _Builder(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = builder.build(node, ())
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {_problem(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: the values are nested too deeply") from error
    value = {} if value is None else value
    if not isinstance(value, dict):
        kind = {"str": "text", "list": "a list"}.get(type(value).__name__, "a single value")
        raise ConfigError(f"{name}: the file holds {kind}, not sections with keys")
    return Document(value, builder.lines)


def _read_toml(text: str, name: str) -> Document:
    try:
        return Document(tomllib.loads(text))  # tomllib refuses duplicate keys itself
    except RecursionError as error:
        raise ConfigError(f"{name}: the values are nested too deeply") from error
    except ValueError as error:  # a TOMLDecodeError, or a number too long for Python
        raise ConfigError(f"{name}: {error}") from error


class _Builder:
    """Turns YAML nodes into values, noting lines and refusing duplicate keys."""

    def __init__(self, name: str = "") -> None:
        self.lines: dict[KeyPath, int] = {}
        self._name = name
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: yaml.Node | None, path: KeyPath) -> Any:
        if node is None:
            return None
        self._count += 1
        if id(node) in self._open or self._count > _MAX_NODES:
            raise ConfigError(f"{self._where(node)}an alias contains itself or grows without bound")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, str(i))) for i, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    value = self.build(source, path)
                    if not isinstance(value, dict):
                        raise ConfigError(f"{self._where(key_node)}<< needs a mapping")
                    merged = {**value, **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._where(key_node)}a key must be text")
            key = str(key_node.value)
            if key in own:
                dotted = ".".join((*path, key))
                raise ConfigError(
                    f"{self._name}: {dotted}: the key stands twice, "
                    f"on lines {self.lines[(*path, key)]} and {key_node.start_mark.line + 1}",
                    fix="remove one of them",
                )
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            own[key] = self.build(value_node, (*path, key))
        return {**merged, **own}

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = str(node.value)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int" and len(text) > _MAX_DIGITS:
            raise ConfigError(f"{self._where(node)}a number of {len(text)} digits is too long")
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if kind == "str":
            return text
        raise ConfigError(f"{self._where(node)}the tag {node.tag} is not allowed")

    def _where(self, node: yaml.Node) -> str:
        return f"{self._name}: line {node.start_mark.line + 1}: " if self._name else ""


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return str(error).splitlines()[0]
