"""The size of a method for a budget of parameters, from its own count on a model without weights."""

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

import rankfold
from rankfold.compare.result import Size
from rankfold.core.delta import Site
from rankfold.core.targets import find
from rankfold.errors import RankfoldError
from rankfold.train.calibrating import targets_of
from rankfold.train.models import empty_model
from rankfold.train.recipe import Recipe

_ONE_BY_ONE = 4096


def sites_of(recipe: Recipe, labels: Sequence[str] | None) -> list[Site]:
    """The sites of the recipe's targets, on the meta device."""
    model = empty_model(recipe.model, recipe.task, labels)
    return [target.site for target in find(model, targets_of(recipe))]


def solve(method: rankfold.Method, sites: Sequence[Site], budget: int, seed: int = 0) -> tuple[rankfold.Method, Size]:
    """The method at the size whose count comes nearest to `budget` without being above, on these sites.

    The size is the hyperparameter that `Method.size` names; a method without it comes back as it is, with its own
    count. Raises RankfoldError where nothing fits.
    """
    field = method.size
    if field not in type(method).model_fields:
        return method, Size(field=None, value=None, parameters=_parameters(method, sites, seed), budget=budget)

    def at(value: float) -> rankfold.Method:
        return type(method).model_validate({**method.model_dump(), field: value})

    def count(value: float) -> int | None:
        """None for a value that is out of range."""
        try:
            return _parameters(at(value), sites, seed)
        except ValidationError:
            return None

    found = _share(count, budget) if _is_float(type(method), field) else _whole(count, at, sites, budget)
    if found is None:
        raise RankfoldError(
            f"{method.slug} cannot be made to train at most {budget:,} parameters on these {len(sites)} layers by its "
            f"{field}: raise budget.parameters, or give it fewer targets"
        )
    made = at(found)
    return made, Size(field=field, value=found, parameters=_parameters(made, sites, seed), budget=budget)


def stated(method: rankfold.Method, sites: Sequence[Site], budget: int, seed: int = 0) -> Size:
    """What a method has at the size that was stated."""
    field = method.size
    return Size(field=field, value=getattr(method, field), parameters=_parameters(method, sites, seed), budget=budget)


def _parameters(method: rankfold.Method, sites: Sequence[Site], seed: int) -> int:
    try:
        return method.num_parameters(sites, seed)
    except (NotImplementedError, RuntimeError) as error:  # there are no weights to look at
        raise RankfoldError(
            f"{method.slug} shares its parameters out by the weights themselves, so they cannot be counted before: "
            "leave budget.parameters out, or set it to share them out evenly"
        ) from error


def _is_float(cls: type[rankfold.Method], field: str) -> bool:
    annotation = cls.model_fields[field].annotation
    return float in (annotation, *typing.get_args(annotation))


def _share(count: Any, budget: int) -> float | None:
    """The largest share, up to 1, that fits."""
    if count(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low or None


def _whole(count: Any, at: Any, sites: Sequence[Site], budget: int) -> int | None:
    """Of the whole numbers up to where counts rise above the budget, the one that comes nearest and no layer refuses.

    They are gone through one by one, since some counts fall (RandLoRA's), jump (BOFT's) or are for certain numbers only
    (KIND's); from `_ONE_BY_ONE` on, which only smooth counts reach, by bisection.
    """
    counts: dict[int, int] = {}
    for value in range(1, _ONE_BY_ONE + 1):
        found = count(value)
        if found is not None:
            counts[value] = found
            rises = found >= counts.get(value // 2, found + 1)
            if rises and (found > budget or found < next(iter(counts.values()))):  # or it fell: more buys nothing more
                break
    else:
        low, high = _ONE_BY_ONE, 2 * _ONE_BY_ONE
        while (count(high) or budget + 1) <= budget and high < 2**40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if (count(middle) or budget + 1) <= budget else (low, middle)
        counts[low] = count(low) or 0
    fitting = sorted((value for value in counts if counts[value] <= budget), key=lambda value: (-counts[value], value))
    return next((value for value in fitting if all(at(value).refusal(site) is None for site in sites)), None)
