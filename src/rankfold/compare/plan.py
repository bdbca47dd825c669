"""What to compare: COMPARE.yaml as a validated value. Light: no torch, so that mistakes show at once.

recipe: {model: ..., data: ..., budget: {steps: 100}}     # in the words of a recipe; `method` is lora unless given
contenders: [lora, dora, "kasa:rank=4", {name: lora from pissa, init: pissa, optimizer: {name: galore, rank: 4}}]
budget: parameters=200k
seeds: 3
search: {trials: 5}
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from rankfold.errors import RankfoldError
from rankfold.train.recipe import Data, Recipe, Section
from rankfold.train.recipe_file import apply_override, describe_errors, read_values, validate, validate_part

# What a contender may put in the place of the base recipe's: how to train, never on what or for how long.
MAY_DIFFER = (
    "method", "targets", "init", "fold", "calibration", "overrides", "modules_to_save", "callbacks", "optimizer",
    "schedule", "precision", "low_precision", "gradient_checkpointing",
)  # fmt: skip
_NAMED = ("method", "init", "optimizer")  # keys of one technique, by slug alone or with its hyperparameters
_OF_ANY_OPTIMIZER = ("lr", "weight_decay", "clip", "per_layer")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_FACTORS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def quantity(text: Any) -> Any:
    """`200k`, `1.5M` or `1GB` as a number; anything else as it is."""
    found = re.fullmatch(r"([\d_]*\.?\d+)\s*([A-Za-z]*)", text.strip()) if isinstance(text, str) else None
    if found is None:
        return text
    if found[2] not in _FACTORS:
        raise RankfoldError(f"{found[2]!r} is no unit; there are: {', '.join(filter(None, _FACTORS))}")
    return float(found[1]) * _FACTORS[found[2]]


class Limits(Section):
    """What every contender has to get along with."""

    parameters: int | None = Field(None, gt=0, description="trained numbers of the adapter; its size is solved for it")
    memory: int | None = Field(None, gt=0, description="bytes of the peak; batches are cut into parts until it holds")
    minutes: float | None = Field(None, gt=0, description="of training; the recipe's own budget is not used then")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts = (part.partition("=") for part in re.split(r"[,|\s]+", value))
            value = {key: given for key, _, given in parts}
        if isinstance(value, Mapping):
            value = {key: quantity(given) for key, given in value.items()}
            whole = {"parameters", "memory"} & value.keys()
            value |= {key: int(value[key]) for key in whole if isinstance(value[key], float)}
        return value


class Search(Section):
    """How a learning rate is found for each contender, the same way for all."""

    trials: int = Field(5, ge=0, description="rates tried, the recipe's own first; 0 takes that without a search")
    spread: float = Field(10.0, gt=1, description="they lie from the recipe's rate over this to it times this")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training rows that judge them")
    seed: int = Field(1000, ge=0, lt=2**32, description="of the rates, and of the trials' trainings")


class Entry(Section):
    """A contender: its name, and what it puts in the place of the recipe's keys. In short `slug:key=value:key=value`,
    for one technique of any axis."""

    name: str
    changes: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "changes" not in value:
            changes = {key: given for key, given in value.items() if key != "name"}
            if unknown := sorted(set(changes) - set(MAY_DIFFER)):
                raise RankfoldError(f"{unknown[0]} cannot differ between contenders; what can: {', '.join(MAY_DIFFER)}")
            return {"name": value.get("name") or ", ".join(map(_slug, changes.values())), "changes": changes}
        if not isinstance(value, str):
            return value
        slug, *pairs = value.split(":")
        hyper: dict[str, Any] = {}
        for pair in pairs:
            apply_override(hyper, pair)
        return {"name": value, "changes": place(slug, hyper)}


def _slug(value: Any) -> str:
    return str(value.get("name", "")) if isinstance(value, Mapping) else str(value)


def place(slug: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The key of a recipe that the technique stands under, with its hyperparameters. Raises for an unknown slug."""
    import rankfold
    from rankfold.core.component import component
    from rankfold.train.recipe import FULL

    named = {"name": slug, **hyper}
    if slug == FULL:
        return {"method": named}
    cls = component(slug)
    for key, kind in (("method", rankfold.Method), ("init", rankfold.Init), ("optimizer", rankfold.Optimizer)):
        if issubclass(cls, kind):
            return {key: named}
    return {"callbacks": [named]}


class Plan(Section):
    """A whole comparison. `read_plan` reads it with errors that name the key."""

    title: str = ""
    recipe: Recipe = Field(description="what all share, in the words of a recipe")
    contenders: tuple[Entry, ...] = Field(min_length=1)
    budget: Limits = Limits()  # type: ignore[call-arg]
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="a run each; a number n means 0 to n − 1")
    search: Search = Search()  # type: ignore[call-arg]
    text: Data | None = Field(None, description="general text on which forgetting is measured: a path, or as `data`")

    @field_validator("recipe", mode="before")
    @classmethod
    def _default_method(cls, value: Any) -> Any:
        return {"method": "lora", **value} if isinstance(value, Mapping) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) else value

    @field_validator("text", mode="before")
    @classmethod
    def _format_text(cls, value: Any) -> Any:
        value = {"path": value} if isinstance(value, str) else value
        return {"format": "text", "max_length": 128, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _different(self) -> Self:
        names = [entry.name for entry in self.contenders]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RankfoldError(f"contenders: {twice[0]!r} stands there twice: give one another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise RankfoldError("seeds: one stands there twice")
        return self


def read_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The comparison in the file `path`, with `key.sub=value` overrides applied.

    Raises RankfoldError, naming the key in dotted form and what is allowed there.
    """
    return make_plan(read_values(path, Plan, "comparison", overrides), str(path))


def make_plan(values: dict[str, Any], where: str = "comparison") -> Plan:
    """`values` as a Plan, every contender's recipe checked; every problem in a RankfoldError that names the key."""
    recipe = values.get("recipe")
    if isinstance(recipe, Mapping):  # by itself first, for errors that know a recipe's keys
        try:
            Recipe.model_validate({"method": "lora", **recipe})
        except ValidationError as error:
            raise RankfoldError(f"{where}: " + "; ".join(describe_errors(error, Recipe, "recipe"))) from None
    plan = validate_part(Plan, values, where)
    for place_, entry in enumerate(plan.contenders):
        recipe_of(plan, entry, f"{where}: contenders.{place_}")
    return plan


def recipe_of(plan: Plan, entry: Entry, where: str) -> Recipe:
    """The base recipe with the contender's changes.

    A method or optimiser that is the base's own keeps what the base says of it. The rate, the decay, and how gradients
    are clipped and layers stepped stay the base's for any optimiser that does not say otherwise.
    """
    base = plan.recipe.model_dump(exclude={"targets"} if "targets" not in plan.recipe.model_fields_set else None)
    base = {key: value for key, value in base.items() if key in plan.recipe.model_fields_set}
    changes = {key: _long(value) if key in _NAMED else value for key, value in entry.changes.items()}
    if changes.get("method", {}).get("name") == plan.recipe.method.name:
        changes["method"] = {**base["method"], **changes["method"]}
    if "optimizer" in changes:
        own = plan.recipe.optimizer
        same = changes["optimizer"].get("name", own.name) == own.name
        kept = (
            own.model_dump()
            if same
            else {key: getattr(own, key) for key in ("lr", "weight_decay", "clip", "per_layer")}
        )
        changes["optimizer"] = {**kept, **changes["optimizer"]}
    if "method" in changes and changes["method"]["name"] != plan.recipe.method.name:
        base.pop("overrides", None)  # they are hyperparameters of the base's method
    return validate({**base, **changes}, where)


def _long(value: Any) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(value)
