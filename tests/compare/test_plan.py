"""COMPARE.yaml and the options: what is understood, and what is said of mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfold.compare.columns import format_of
from rankfold.compare.plan import make_plan, quantity, read_plan, recipe_of
from rankfold.errors import RankfoldError


def recipes(values: dict[str, Any]) -> list[Any]:
    plan = make_plan(values)
    return [recipe_of(plan, entry, "plan") for entry in plan.contenders]


def test_a_slug_finds_its_place_by_its_axis(values: dict[str, Any]) -> None:
    values["contenders"] = ["kasa:rank=4", "pissa", "galore:rank=3:lr=0.5", "kasa-penalty", "full"]
    kasa, pissa, galore, penalty, full = recipes(values)
    assert (kasa.method.name, kasa.method.hyper) == ("kasa", {"rank": 4})
    assert (pissa.method.name, pissa.init.name) == ("lora", "pissa")
    assert (galore.optimizer.name, galore.optimizer.lr, galore.optimizer.hyper) == ("galore", 0.5, {"rank": 3})
    assert (penalty.callbacks[0].name, penalty.method.name) == ("kasa-penalty", "lora")
    assert (full.method.name, full.targets) == ("full", "everything")


def test_a_contender_keeps_what_the_base_says_of_the_same_technique(values: dict[str, Any]) -> None:
    values["recipe"]["method"] = {"name": "lora", "rank": 2, "alpha": 7}
    values["recipe"]["optimizer"] = {"name": "sgd", "lr": 0.3, "clip": 0, "momentum": 0.9}
    values["contenders"] = ["lora:rank=5", "dora", "galore", {"name": "slow", "optimizer": {"lr": 0.1}}]
    lora, dora, galore, slow = recipes(values)
    assert lora.method.hyper == {"rank": 5, "alpha": 7}
    assert dora.method.hyper == {}
    assert (galore.optimizer.lr, galore.optimizer.clip, galore.optimizer.hyper) == (0.3, 0, {})
    assert (slow.optimizer.name, slow.optimizer.lr, slow.optimizer.hyper) == ("sgd", 0.1, {"momentum": 0.9})
    assert lora.data == dora.data == galore.data == slow.data


def test_several_changes_at_once(values: dict[str, Any]) -> None:
    values["contenders"] = [{"method": {"name": "dora", "rank": 3}, "init": "pissa", "targets": "attention"}]
    (recipe,) = recipes(values)
    assert (recipe.method.name, recipe.init.name, recipe.targets) == ("dora", "pissa", "attention")


@pytest.mark.parametrize(
    ("text", "number"), [("200k", 200_000), ("1.5M", 1_500_000), ("1GB", 10**9), ("2 MiB", 2 * 2**20), ("5", 5)]
)
def test_quantities(text: str, number: float) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize(
    ("given", "parameters", "memory", "minutes"),
    [
        ("parameters=200k", 200_000, None, None),
        ("memory=1GB|minutes=5", None, 10**9, 5.0),
        ({"parameters": "3k"}, 3000, None, None),
    ],
)
def test_budgets(
    values: dict[str, Any], given: Any, parameters: int | None, memory: int | None, minutes: float | None
) -> None:
    budget = make_plan({**values, "budget": given}).budget
    assert (budget.parameters, budget.memory, budget.minutes) == (parameters, memory, minutes)


def test_a_number_of_seeds_means_the_first_ones(values: dict[str, Any]) -> None:
    assert make_plan({**values, "seeds": 3}).seeds == (0, 1, 2)
    assert make_plan({**values, "seeds": [4, 2]}).seeds == (4, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgett": 1}, "budgett: unknown key; did you mean budget?"),
        ({"recipe": {"model": "m"}}, "recipe.data: required"),
        ({"contenders": ["lorra"]}, "contenders.0: no component is called 'lorra'; did you mean 'lora'"),
        ({"contenders": ["lora", "lora"]}, "'lora' stands there twice"),
        ({"contenders": []}, "contenders: tuple should have at least 1 item"),
        ({"contenders": [{"name": "x", "data": "y"}]}, "data cannot differ between contenders"),
        ({"contenders": [{"name": "x", "optimizer": {"lr": -1}}]}, "contenders.0: optimizer.lr: input should be great"),
        ({"budget": "parameters=200q"}, "'q' is no unit"),
        ({"budget": "params=2"}, "budget.params: unknown key; did you mean parameters?"),
        ({"budget": {"memory": 0}}, "budget.memory: input should be greater than 0"),
        ({"seeds": [1, 1]}, "seeds: one stands there twice"),
        ({"seeds": 0}, "seeds: tuple should have at least 1 item"),
        ({"search": {"trials": -1}}, "search.trials: input should be greater than or equal to 0"),
    ],
)
def test_mistakes_are_named_by_their_key(values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RankfoldError) as error:
        make_plan({**values, **changes})
    assert said in str(error.value)


def test_a_wrong_key_of_the_recipe_is_named_within_it(values: dict[str, Any]) -> None:
    values["recipe"]["batch"] = {"sise": 3}
    with pytest.raises(RankfoldError, match=r"recipe\.batch\.sise: unknown key; did you mean size\?"):
        make_plan(values)


def test_a_file_is_read_with_overrides(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    plan = read_plan(tmp_path / "c.yaml", ["seeds=1", "recipe.budget.steps=9", "budget=minutes=2"])
    assert (plan.seeds, plan.recipe.budget.steps, plan.budget.minutes) == ((0,), 9, 2.0)
    with pytest.raises(RankfoldError, match="cannot read the comparison"):
        read_plan(tmp_path / "none.yaml")


def test_what_is_written_is_read_back(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora", "pissa", {"name": "both", "method": "dora", "init": "pissa"}], "text": "t.txt"}
    plan = make_plan({**values, "budget": "parameters=2k"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    assert read_plan(tmp_path / "c.yaml").model_dump() == plan.model_dump()


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"messages": []}', "chat"),
        ('{"prompt": "a", "completion": "b"}', "prompt-completion"),
        ('{"text": "a", "label": "b"}', "classification"),
        ('{"text": "a"}', "text"),
    ],
)
def test_the_format_follows_from_the_columns(tmp_path: Path, row: str, found: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    assert format_of(str(tmp_path / "rows.jsonl")) == found


def test_columns_that_say_nothing_ask_for_the_format(place: Path) -> None:
    with pytest.raises(RankfoldError, match="the columns answer, kind, question do not say"):
        format_of(str(place / "questions.jsonl"))
