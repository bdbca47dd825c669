"""LoraHub: mixtures of adapters, and the search for their weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from torch import Tensor, nn

import rankfold
from rankfold import LoRA, LoraHub
from rankfold.cli import lorahub as command
from rankfold.compose._merge import combine
from rankfold.compose.lorahub import lorahub
from tests.contract.nets import scramble
from tests.methods.support import change, close, draw
from tests.train import tiny


class Regression(nn.Module):
    """`loss` is the squared distance of two layers' output from the labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.b(self.a(x).tanh()) - labels).square().mean())

    def answer(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.b(self.a(x).tanh())


def library(model: nn.Module, ranks: Sequence[int] = (2, 2, 2)) -> list[rankfold.Adapter]:
    made = []
    for i, rank in enumerate(ranks):
        adapter = rankfold.attach(model, LoRA(rank=rank), ["a", "b"], name=f"task{i}")
        with torch.no_grad():
            for j, parameter in enumerate(adapter.parameters()):
                parameter.copy_(0.6 * draw(*parameter.shape, seed=10 * i + j, dtype=torch.float32))
        made.append(adapter)
    return made


def examples(model: Any, name: str | None, batches: int = 2) -> list[dict[str, Tensor]]:
    """What the model answers under an adapter."""
    xs = [draw(5, 6, seed=90 + i, dtype=torch.float32) for i in range(batches)]
    with rankfold.using(model, name):
        return [{"x": x, "labels": model.answer(x)} for x in xs]


def mixture(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int | None = None) -> Tensor:
    B, A, _ = LoraHub().combine(pairs, weights, rank, torch.Generator())
    return B @ A


def test_worked_numbers() -> None:
    """w on both factors: (½, ½) on the two 2×2 examples gives ¼ everywhere, a single one at ½ a quarter of its ΔW."""
    eye = torch.eye(2).double()
    pairs = [(eye[:, :1], eye[:1]), (eye[:, 1:], eye[1:])]
    close(mixture(pairs, [0.5, 0.5]), [[0.25, 0.25], [0.25, 0.25]])
    close(mixture(pairs[:1], [0.5]), [[0.25, 0], [0, 0]])
    close(mixture(pairs, [0, 1]), [[0, 0], [0, 1]])
    close(mixture(pairs, [0, 0]), [[0, 0], [0, 0]])
    close(mixture(pairs, [-1, 1]), [[1, -1], [-1, 1]])
    two = draw(6, 3, seed=1), draw(3, 7, seed=2)
    close(mixture([two, (two[0][:, :1], two[1][:1])], [0, 1]), two[0][:, :1] @ two[1][:1])
    U, S, Vh = torch.linalg.svd(two[0] @ two[1])
    close(mixture([two], [1], rank=1), S[0] * torch.outer(U[:, 0], Vh[0]))


def test_no_weight_is_the_base_and_one_weight_is_that_adapter() -> None:
    """The first trial is at 0; the first step of COBYLA, 0.5, goes along each axis in turn."""
    model = Regression()
    adapters = library(model)
    batches = examples(model, "task1")
    _, search = lorahub(adapters, batches, budget=5, penalty=0.0)
    assert len(search.trials) == 5
    first = search.trials[0]
    assert first.weights == (0, 0, 0)
    assert search.trials[1].weights == (0.5, 0, 0)
    combine(adapters, "lorahub", [0.5, 0, 0], "half")
    assert search.trials[1].loss == pytest.approx(loss(model, "half", batches))
    combine(adapters, "lorahub", [0, 1, 0], "second")
    assert loss(model, "second", batches) == pytest.approx(0, abs=1e-10)  # what the labels come from
    assert first.loss == pytest.approx(loss(model, None, batches))


def loss(model: Any, name: str | None, batches: Sequence[dict[str, Tensor]]) -> float:
    with rankfold.using(model, name), torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def test_it_finds_the_adapter_of_the_task() -> None:
    model = Regression()
    adapters = library(model, (2, 3, 1))
    rankfold.set_active(model, "task2")
    made, search = lorahub(adapters, examples(model, "task1"), "new", budget=60)
    w = search.best.weights
    assert max(range(3), key=lambda i: abs(w[i])) == 1
    assert abs(w[1]) == pytest.approx(1, abs=0.15)  # w and −w are the same ΔW
    assert search.best.penalised < 0.3 * search.trials[0].penalised
    assert search.best.penalised == pytest.approx(search.best.loss + 0.05 * sum(map(abs, w)) / 3)
    assert list(rankfold.adapters(model)) == ["task0", "task1", "task2", "new"]
    assert model._rankfold_state.active == "task2"
    assert made.name == "new"
    close(change(made.deltas["a"]), mixture([scaled(adapter.deltas["a"]) for adapter in adapters], w), atol=1e-6)


def scaled(delta: Any) -> tuple[Tensor, Tensor]:
    """The factors in float64, √s in each."""
    return delta.B.detach().double() * delta.scale**0.5, delta.A.detach().double() * delta.scale**0.5


def test_adapters_on_disk(tmp_path: Path) -> None:
    """The same search, and a model that is afterwards as it was."""
    model = Regression()
    adapters = library(model)
    batches = examples(model, "task1")
    folders = [rankfold.save(model, tmp_path / adapter.name, adapter.name) for adapter in adapters]
    _, live = lorahub(adapters, batches, budget=20)
    fresh = Regression()
    path, search = lorahub(folders, batches, tmp_path / "mixed", model=fresh, budget=20)
    assert search == live
    assert type(fresh.a) is nn.Linear
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    rankfold.load(fresh, path, "mixed")
    assert loss(fresh, "mixed", batches) == pytest.approx(search.best.loss, rel=1e-4)


def test_no_more_than_so_many_take_part() -> None:
    model = Regression()
    adapters = library(model, (1, 1, 1, 1))
    batches = examples(model, "task1")
    searches = [lorahub(adapters, batches, f"new{seed}", budget=4, most=2, seed=seed)[1] for seed in range(3)]
    assert len({search.chosen for search in searches}) > 1
    assert all(len(search.chosen) == 2 == len(search.trials[0].weights) for search in searches)


def test_bad_input() -> None:
    model = Regression()
    adapters = library(model)
    batches = examples(model, None)
    with pytest.raises(rankfold.RankfoldError, match="3 weights need a budget of at least 5, and it is 4"):
        lorahub(adapters, batches, budget=4)
    with pytest.raises(rankfold.RankfoldError, match="3 adapters and 0 batches"):
        lorahub(adapters, [])
    with pytest.raises(rankfold.RankfoldError, match="say the base model"):
        lorahub(["somewhere"], batches, "to")
    with pytest.raises(rankfold.RankfoldError, match="say the base model"):
        lorahub(["somewhere"], batches, model=model)
    assert list(rankfold.adapters(model)) == ["task0", "task1", "task2"]


def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.write_llama(tmp_path / "llama"))
    folders = []
    for name in ("one", "two"):
        scramble(rankfold.attach(model, LoRA(rank=2), ["q_proj", "down_proj"], name=name), seed=len(folders))
        folders.append(str(rankfold.save(model, tmp_path / name, name)))
    recipe = tmp_path / "recipe.yaml"
    questions = tiny.write_questions(tmp_path / "questions.jsonl")
    recipe.write_text(yaml.safe_dump(tiny.recipe_values(tmp_path / "llama", questions)))
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)

    def run(*arguments: str) -> str:
        app(["lorahub", str(recipe), *folders, "--budget", "6", *arguments], standalone_mode=False)
        return capfd.readouterr().out

    found = json.loads(run("--output", str(tmp_path / "mixed"), "--json"))
    assert list(found["weights"]) == folders
    assert found["trials"] == 6
    assert found["loss"]["mixture"] <= found["loss"]["base"] + 0.05 * 1.5
    rankfold.load(model, found["adapter"], "mixed")
    text = run("--output", str(tmp_path / "again"), "--examples", "2")
    assert "loss on the examples" in text
    assert "two" in text
