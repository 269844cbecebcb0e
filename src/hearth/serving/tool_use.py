"""Tools: which functions a request offers, whether one must be called, and the grammar that enforces it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from hearth.engine.params import Guided
from hearth.serving.constraints import ANY_OBJECT
from hearth.serving.decoding import invalid

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 128


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A function; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool is a function."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A ``tool_choice`` that says which."""

    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class ToolUse:
    """What a request's tools come to.

    schemas: parameters by name. mode: "auto" leaves it to the model, "required" asks for one call or more,
    "named" for one call of ``name``. max_calls: 1 where calls may not be parallel.
    """

    schemas: dict[str, dict[str, Any]]
    mode: Literal["auto", "required", "named"]
    name: str | None = None
    max_calls: int | None = None
    described: tuple[dict[str, Any], ...] = ()  # for the chat template

    def guided(self) -> Guided | None:
        """The grammar that enforces the choice: a list of calls, or the arguments of the named one."""
        if self.mode == "auto":
            return None
        if self.name is not None:
            return Guided(json=self.schemas[self.name])
        pointer = "#/items/anyOf/{}/properties/parameters"
        items = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "parameters": _moved(schema, pointer.format(index)),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for index, (name, schema) in enumerate(self.schemas.items())
        ]
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items}}
        if self.max_calls is not None:
            schema["maxItems"] = self.max_calls
        return Guided(json=schema)


def tool_use(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """What may be called; None for nothing. HttpError 400 for what contradicts itself."""
    schemas: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools or ()):
        where, name = f"tools[{index}].function.name", tool.function.name
        if not _NAME.fullmatch(name):
            raise invalid(f"{where}: letters, digits, _, - and ., at most 64 of them", where)
        if name in schemas:
            raise invalid(f"{where}: there are two functions {name!r}", where)
        schemas[name] = tool.function.parameters or ANY_OBJECT
    if len(schemas) > MAX_TOOLS:
        raise invalid(f"tools has {len(schemas)} entries, at most {MAX_TOOLS} are allowed", "tools")
    if not schemas:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice asks for a call, and there are no tools", "tool_choice")
        return None
    if choice == "none":
        return None
    described = tuple(_described(tool) for tool in tools or ())
    max_calls = 1 if parallel is False else None
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in schemas:
            known = ", ".join(schemas)
            raise invalid(f"tool_choice names {name!r}, which is none of the tools: {known}", "tool_choice")
        return ToolUse(schemas, "named", name, 1, described)
    mode: Literal["auto", "required"] = "required" if choice == "required" else "auto"
    return ToolUse(schemas, mode, None, max_calls, described)


def _described(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    # Templates loop over the properties, so an empty schema has them too.
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _moved(schema: Any, pointer: str) -> Any:
    """The schema with its references to itself, now that it stands at ``pointer`` of a larger one."""
    if isinstance(schema, list):
        return [_moved(each, pointer) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: pointer + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, pointer)
        for key, value in schema.items()
    }
