"""The size that is solved for a budget of parameters."""

from typing import Any

import pytest

import rankfold
from rankfold.compare.budget import sites_of, solve, stated
from rankfold.compare.plan import Plan
from rankfold.core import Site
from rankfold.core.component import components
from rankfold.core.targets import find
from rankfold.errors import RankfoldError
from tests.train import tiny


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    """48 wide, so that the layers' sides have many divisors."""
    model = tiny.llama(hidden_size=48, intermediate_size=96, num_attention_heads=4)
    return [target.site for target in find(model, "all-linear")]


def methods() -> list[Any]:
    return [cls for cls in components() if issubclass(cls, rankfold.Method) and cls.size in cls.model_fields]


def test_sites_come_without_weights(plan: Plan) -> None:
    found = sites_of(plan.recipe, None)
    there = [target.site for target in find(tiny.llama(), "all-linear")]
    assert [(s.name, s.out, s.in_) for s in found] == [(s.name, s.out, s.in_) for s in there]
    assert all(site.stored.is_meta for site in found)


def test_lora_by_its_formula(sites: list[Site]) -> None:
    one = sum(site.in_ + site.out for site in sites)
    made, size = solve(rankfold.LoRA(), sites, 5 * one)
    assert (made.rank, size.field, size.value, size.parameters) == (5, "rank", 5, 5 * one)
    made, size = solve(rankfold.LoRA(), sites, 6 * one - 1)
    assert (made.rank, size.parameters, size.budget) == (5, 5 * one, 6 * one - 1)


@pytest.mark.parametrize("cls", methods(), ids=lambda cls: cls.slug)
def test_every_method_with_a_size_gets_the_nearest_that_is_not_above(cls: Any, sites: list[Site]) -> None:
    method = cls()
    field = method.size
    kept = [site for site in sites if method.refusal(site) is None]
    budget = round(1.3 * method.num_parameters(kept))
    made, size = solve(method, kept, budget)
    assert made.num_parameters(kept) == size.parameters <= budget
    assert all(made.refusal(site) is None for site in kept)
    assert size.value == getattr(made, field)
    if isinstance(size.value, float) and not size.value.is_integer():
        more = [cls(**{**made.model_dump(), field: min(1.0, size.value * 1.001)})]
    else:  # no neighbour that is accepted comes nearer
        values = range(max(1, int(size.value) - 8), int(size.value) + 9)
        more = [m for v in values if (m := _made(made, field, v)) and all(m.refusal(s) is None for s in kept)]
    counts = [m.num_parameters(kept) for m in more]
    assert not [count for count in counts if size.parameters < count <= budget]


def _made(method: Any, field: str, value: int) -> Any:
    try:
        return type(method).model_validate({**method.model_dump(), field: value})
    except ValueError:
        return None


def test_more_of_a_size_that_falls_is_found_too(sites: list[Site]) -> None:
    kept = [site for site in sites if min(site.in_, site.out) >= 24]
    small, large = (solve(rankfold.build("randlora"), kept, budget)[1] for budget in (10_000, 30_000))
    assert small.value is not None
    assert large.value is not None
    assert small.value > large.value


def test_a_method_of_one_size_is_counted(sites: list[Site]) -> None:
    method = rankfold.build("ia3", feedforward=["down_proj"])
    kept = [site for site in sites if method.refusal(site) is None]
    same, size = solve(method, kept, 10)
    assert same is method
    assert (size.field, size.parameters) == (None, method.num_parameters(kept))


def test_a_stated_size_is_counted(sites: list[Site]) -> None:
    size = stated(rankfold.LoRA(rank=3), sites, 10)
    assert (size.value, size.parameters) == (3, 3 * sum(site.in_ + site.out for site in sites))


def test_a_budget_that_is_too_small_is_refused(sites: list[Site]) -> None:
    with pytest.raises(RankfoldError, match="lora cannot be made to train at most 10 parameters on these 14 layers"):
        solve(rankfold.LoRA(), sites, 10)


def test_a_budget_beyond_the_layers_takes_the_largest_that_fits(sites: list[Site]) -> None:
    made, _ = solve(rankfold.LoRA(), sites, 10**7)
    assert made.rank == min(min(site.in_, site.out) for site in sites)


def test_sizes_beyond_those_gone_through_are_bisected(sites: list[Site]) -> None:
    made, size = solve(rankfold.build("nola"), sites, 14 * 2 * 12345 + 5)
    assert (made.k, size.parameters) == (12345, 14 * 2 * 12345)


def test_a_size_that_hangs_on_the_weights_is_refused(plan: Plan) -> None:
    with pytest.raises(RankfoldError, match="sara shares its parameters out by the weights themselves"):
        solve(rankfold.build("sara", threshold=0.01), sites_of(plan.recipe, None), 1000)
