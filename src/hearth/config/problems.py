"""Validation errors in the spelling of the file: where, which key, what was given, what is allowed."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError


class _Place(Protocol):
    @property
    def detail(self) -> str: ...

    @property
    def place(self) -> str: ...


def describe(
    cls: type[BaseModel],
    error: ValidationError,
    value: dict[str, Any],
    source: Callable[[Sequence[str]], _Place | None],
) -> list[str]:
    """One line a mistake, such as `recipe.yaml: train.steps: "ten" is not a whole number (line 3)`."""
    found: dict[str, None] = {}
    for item in error.errors(include_url=False):
        key = _key(item["loc"], value, item["type"])
        text = _text(cls, key, item)
        origin = source(key)
        place = f"{origin.place}: " if origin is not None else ""
        spelled = f"{_dotted(key)}: " if key else ""
        line = origin.detail.partition(":")[2] if origin is not None else ""
        where = f" (line {line})" if line else ""
        blamed = _blamed(cls, key, item, source, place)
        found.setdefault(f"{place}{spelled}{text}{blamed}{where}")
    return list(found)


def _key(loc: tuple[str | int, ...], value: Any, kind: str) -> tuple[str, ...]:
    """pydantic's location without the parts that name a member of a union rather than a key."""
    key: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(value, dict) and str(part) in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif kind != "missing" or position != len(loc) - 1:
            continue
        key.append(str(part))
    return tuple(key)


def _dotted(key: Sequence[str]) -> str:
    """('data', 'sources', '0', 'path') → data.sources[0].path"""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(key))


def _text(cls: type[BaseModel], key: tuple[str, ...], item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    given = _shown(item["input"])
    if kind == "extra_forbidden":
        close = _nearest(cls, key)
        return f"unknown key; did you mean {close}?" if close else f"unknown key; {_known(cls, key)}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"{given} is not allowed; use {context['expected']}"
    allowed = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a section with keys",
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
    }.get(kind)
    return f"{given} is not {allowed}" if allowed else f"{given}: {item['msg']}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _blamed(
    cls: type[BaseModel],
    key: tuple[str, ...],
    item: Any,
    source: Callable[[Sequence[str]], _Place | None],
    place: str,
) -> str:
    """For a rule over several keys: which of the keys it names were set elsewhere (a preset, a variable)."""
    if item["type"] != "value_error":
        return ""
    section = _section(cls, key)
    words = set(re.findall(r"[\w.]+", str(item["ctx"]["error"])))
    notes = []
    for candidate in keys_of(section) if section is not None else []:
        if ".".join(candidate) not in words:
            continue
        origin = source((*key, *candidate))
        if origin is not None and f"{origin.place}: " != place:
            notes.append(f"{_dotted((*key, *candidate))} comes from {origin.place}")
    return f" ({'; '.join(notes)})" if notes else ""


def keys_of(cls: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path of a section class, sections included."""
    found = []
    for name, info in cls.model_fields.items():
        key = (*path, info.alias or name)
        found.append(key)
        below = section_of(info.annotation)
        if below is not None:
            found += keys_of(below, key)
    return found


# What other trainers call some of our keys.
OTHER_NAMES = {
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "max_steps": "steps",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "max_grad_norm": "grad_clip",
    "eval_steps": "evaluate_every",
    "max_seq_length": "sequence_length",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "report_to": "trackers",
}


def _nearest(cls: type[BaseModel], key: tuple[str, ...]) -> str | None:
    """The known key that an unknown one most likely means: a sibling, or one that stands elsewhere."""
    plain = tuple(part for part in key if not part.isdigit())
    parent = plain[:-1]
    keys = keys_of(cls)
    # The very name in another section; else a sibling; else a name elsewhere that is nearly it.
    name = OTHER_NAMES.get(plain[-1], plain[-1])
    same = [k for k in keys if k[-1] == name]
    if same:
        return ".".join(same[0])
    siblings = [k[-1] for k in keys if k[:-1] == parent]
    close = difflib.get_close_matches(plain[-1].lower().replace("-", "_"), siblings, n=1, cutoff=0.6)
    if close:
        return _dotted((*key[:-1], close[0]))
    close = difflib.get_close_matches(plain[-1], {k[-1]: None for k in keys}, n=1, cutoff=0.8)
    return ".".join(next(k for k in keys if k[-1] == close[0])) if close else None


def _known(cls: type[BaseModel], key: tuple[str, ...]) -> str:
    section = _section(cls, key[:-1])
    names = [] if section is None else [info.alias or name for name, info in section.model_fields.items()]
    return f"known: {', '.join(names)}"


def _section(cls: type[BaseModel], key: Sequence[str]) -> type[BaseModel] | None:
    """The section class that stands at ``key``."""
    current: type[BaseModel] | None = cls
    for part in key:
        if part.isdigit():
            continue
        if current is None:
            return None
        fields = {info.alias or name: info for name, info in current.model_fields.items()}
        current = section_of(fields[part].annotation) if part in fields else None
    return current


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as ``AdapterSection | None`` or ``tuple[Source, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        for argument in typing.get_args(annotation):
            found = section_of(argument)
            if found is not None:
                return found
    return None
