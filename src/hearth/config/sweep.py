"""A sweep: which keys of a recipe vary, over what, and what makes one trial better than another."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from hearth.config.problems import OTHER_NAMES, describe, keys_of, section_of
from hearth.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config.recipe import Recipe

_KINDS = ("log", "uniform", "int", "choice")
# What these say is the same for all trials, or of the sweep's own making.
_NOT_SWEPT = ("track", "register", "sweep")


class ParameterSection(Section):
    """The values of one key: a range or a list."""

    log: tuple[float, float] | None = Field(
        None, description="From, to: numbers whose logarithms are uniform."
    )
    uniform: tuple[float, float] | None = Field(None, description="From, to: uniform numbers.")
    int_: tuple[int, int] | None = Field(None, alias="int", description="From, to: whole numbers.")
    choice: tuple[Any, ...] | None = Field(None, description="One of these values.")
    step: PositiveFloat | None = Field(None, description="Distance between values of uniform or int.")

    model_config = ConfigDict(populate_by_name=True)

    @property
    def kind(self) -> str:
        """log, uniform, int or choice."""
        return next(kind for kind in _KINDS if self.range(kind) is not None)

    def range(self, kind: str | None = None) -> tuple[Any, ...] | None:
        """The values of ``kind``, or of the one that is given."""
        found: tuple[Any, ...] | None = getattr(
            self, "int_" if (kind or self.kind) == "int" else kind or self.kind
        )
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [kind for kind in _KINDS if self.range(kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of {', '.join(_KINDS)}" + (f", not {' and '.join(given)}" if given else "")
            )
        kind, values = given[0], self.range(given[0])
        assert values is not None
        if kind == "choice":
            if len({json.dumps(value, sort_keys=True) for value in values}) != len(values) or not values:
                raise ValueError("choice needs values, each once")
        elif values[0] >= values[1]:
            raise ValueError(f"{kind} runs from {values[0]} to {values[1]}: the first must be less")
        if kind == "log" and values[0] <= 0:
            raise ValueError(f"log needs numbers above 0, not {values[0]}")
        if self.step is not None and (kind not in ("uniform", "int") or self.step > values[1] - values[0]):
            raise ValueError(f"step {self.step} does not fit {kind} {list(values)}")
        if kind == "int" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"step {self.step} of whole numbers is none")
        return self

    def grid(self) -> list[Any] | None:
        """All values, or None where there is no end of them."""
        values = self.range()
        assert values is not None
        if self.kind == "choice":
            return list(values)
        if self.kind == "int":
            return list(range(values[0], values[1] + 1, int(self.step or 1)))
        if self.kind == "uniform" and self.step is not None:
            # As decimals, as Optuna counts them: it refuses 0.30000000000000004 at the end of 0.3.
            first, last, step = (Decimal(str(value)) for value in (*values, self.step))
            return [float(first + index * step) for index in range(int((last - first) / step) + 1)]
        return None


class SweepSection(Section):
    """Many trials of one recipe."""

    name: str | None = Field(
        None, description="Name of the sweep; default: of the recipe file, with a hash of what varies."
    )
    parameters: dict[str, ParameterSection] = Field(description="Keys of the recipe, with their values.")
    trials: PositiveInt = Field(20, description="Trials in all; a grid stops at its end.")
    metric: str = Field("eval_loss", description="A figure of the run's summary or of its series.")
    direction: Literal["minimize", "maximize"] = Field("minimize", description="Whether less is better.")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="How values are chosen.")
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="How trials that do badly are stopped at an evaluation."
    )
    parallel: PositiveInt = Field(1, description="Processes that run trials at the same time.")
    timeout: PositiveFloat | None = Field(None, description="Seconds after which no trial begins.")
    seed: NonNegativeInt = Field(0, description="Seed of the choices.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.parameters:
            raise ValueError("parameters is empty: name at least one key of the recipe")
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r} may have letters, digits, dot, dash and underscore only")
        if self.sampler == "grid":
            endless = [key for key, parameter in self.parameters.items() if parameter.grid() is None]
            if endless:
                raise ValueError(
                    f"sampler grid needs values to go through: give {endless[0]} a choice, or a step"
                )
        return self

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination, the last key varying fastest."""
        columns = [parameter.grid() or [] for parameter in self.parameters.values()]
        for combination in itertools.product(*columns):
            yield dict(zip(self.parameters, combination, strict=True))


def recipe_with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values for some dotted keys. Raises ConfigError as a file would."""
    from hearth.config.loading import to_dict
    from hearth.config.recipe import Recipe

    value = to_dict(recipe)
    for key, item in values.items():
        *parents, last = key.split(".")
        place = value
        for depth, parent in enumerate(parents):
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"{key}: the recipe has no {'.'.join(parents[: depth + 1])}", fix="set it in the recipe"
                )
        place[last] = item
    try:
        return Recipe.model_validate_json(json.dumps(value), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(Recipe, error, value, lambda _key: None))) from error


def check_sweep(section: SweepSection, recipe: Recipe) -> None:
    """Raise ConfigError for a key that the recipe does not know, or an end of a range that it refuses."""
    for key, parameter in section.parameters.items():
        _check_key(key)
        values = parameter.range()
        assert values is not None
        for value in values:
            try:
                recipe_with(recipe, {key: value})
            except ConfigError as error:
                raise ConfigError(
                    f"sweep.parameters.{key}: {value!r} cannot be used: {error.message}"
                ) from error
    if section.pruner != "none" and not recipe.train.evaluate_every:
        raise ConfigError(
            f"sweep.pruner {section.pruner} has nothing to go by: train.evaluate_every is 0",
            fix="set train.evaluate_every, or pruner: none",
        )


def _check_key(key: str) -> None:
    from hearth.config.recipe import Recipe

    leaves = [path for path in keys_of(Recipe) if not _is_section(path)]
    parts = tuple(key.split("."))
    if parts[0] in _NOT_SWEPT:
        raise ConfigError(
            f"sweep.parameters.{key}: {parts[0]} is the same for all trials", fix="leave it out"
        )
    if parts in leaves or any(path == parts[: len(path)] and _is_free(path) for path in leaves):
        return
    dotted = {".".join(path): path for path in leaves}
    key_here = ".".join([*parts[:-1], OTHER_NAMES.get(parts[-1], parts[-1])])
    close = [key_here] if key_here in dotted else difflib.get_close_matches(key, dotted, n=1, cutoff=0.6)
    if not close:
        last = difflib.get_close_matches(parts[-1], [path[-1] for path in leaves], n=1, cutoff=0.6)
        close = [name for name, path in dotted.items() if last and path[-1] == last[0]][:1]
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"sweep.parameters.{key}: the recipe has no such key{hint}")


def _field(path: tuple[str, ...]) -> Any:
    from hearth.config.recipe import Recipe

    current: Any = Recipe
    info: Any = None
    for part in path:
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        info = fields[part]
        current = section_of(info.annotation)
    return info.annotation


def _is_section(path: tuple[str, ...]) -> bool:
    return section_of(_field(path)) is not None and "tuple" not in str(_field(path))


def _is_free(path: tuple[str, ...]) -> bool:
    """Whether the key holds a mapping with keys of the user's choice, such as model.config."""
    return "dict[" in str(_field(path))


def sweep_identity(section: SweepSection, recipe: Recipe) -> str:
    """Hash of what the trials depend on; more trials, or more at a time, make no other sweep of it."""
    from hearth.config.loading import recipe_hash, to_dict

    varying = to_dict(section)
    for key in ("name", "trials", "parallel", "timeout"):
        del varying[key]
    text = json.dumps([recipe_hash(recipe), varying], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
