"""The form that an answer must have: ``response_format``, and vLLM's fields that say the same."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from hearth.engine.params import Guided
from hearth.serving.decoding import invalid, missing

ANY_OBJECT = {"type": "object"}


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's envelope of a schema. It is always enforced, so ``strict`` changes nothing."""

    name: str
    schema: dict[str, Any] | UnsetType = UNSET
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's ``structured_outputs``."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class Constrained(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields of a request that constrain its answer; at most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


def guided_of(request: Constrained) -> Guided | None:
    """The constraint of a request; HttpError 400 for several, and RequestError for one that has no sense."""
    found: dict[str, Guided] = {}
    for name in ("json", "regex", "grammar", "choice"):
        value = getattr(request, f"guided_{name}")
        if value == []:
            raise invalid(f"guided_{name} is empty: no answer would be allowed", f"guided_{name}")
        if value is not None:
            found[f"guided_{name}"] = Guided(**{name: value})
    outputs = request.structured_outputs
    if outputs is not None:
        given = {
            name: value for name in ("json", "regex", "grammar", "choice")
            if (value := getattr(outputs, name)) is not None
        }  # fmt: skip
        if outputs.json_object:
            given.setdefault("json", ANY_OBJECT)
        if not any(given.values()):
            raise invalid(
                "structured_outputs says no form: give one of json, regex, grammar, choice, json_object",
                "structured_outputs",
            )
        found["structured_outputs"] = Guided(**given)
    if request.response_format is not None and request.response_format.type != "text":
        found["response_format"] = Guided(json=_schema(request.response_format))
    if len(found) > 1:
        raise invalid(f"{' and '.join(found)} are given: an answer can have one form", list(found)[1])
    return next(iter(found.values()), None)


def form_field(request: Constrained) -> str:
    """The field that constrains the answer, for errors about what it says."""
    form = request.response_format
    given = [name for name in Constrained.__struct_fields__ if getattr(request, name) is not None]
    if form is not None and form.type == "text":  # any text will do: it constrains nothing
        given.remove("response_format")
    return next(iter(given), "guided")


def _schema(form: ResponseFormat) -> dict[str, Any]:
    if form.type == "json_object":
        return ANY_OBJECT
    if form.json_schema is None or form.json_schema.schema is UNSET:
        raise missing("response_format.json_schema" + (".schema" if form.json_schema else ""))
    assert isinstance(form.json_schema.schema, dict)
    return form.json_schema.schema
