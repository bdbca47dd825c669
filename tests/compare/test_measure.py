"""What is measured of a finished run, on changes that were planted."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.compare.measure import forgotten, inference, layers
from rankfold.core.routing import state_of
from rankfold.errors import RankfoldError
from rankfold.train.display import Display
from rankfold.train.inputs import Inputs, load_inputs
from rankfold.train.recipe import Recipe
from tests.train import tiny


@pytest.fixture
def inputs(place: Path) -> Inputs:
    return load_inputs(Recipe.model_validate(tiny.recipe_values(place / "llama", place / "questions.jsonl")), Display())


def test_norms_and_ranks_of_a_planted_change(inputs: Inputs) -> None:
    adapter = rankfold.attach(inputs.model, rankfold.LoRA(rank=3), targets=["q_proj"])
    for delta in adapter.deltas.values():
        delta.A.data.copy_(torch.eye(32)[:3])
        delta.B.data.copy_(torch.eye(32)[:, :3] * torch.tensor([2.0, 2.0, 0.0]))  # σ = 2, 2, 0
    first, second = layers(adapter)
    weight = adapter.deltas[first.site].W
    assert first.site == "model.layers.0.self_attn.q_proj"
    assert first.rank == second.rank == 2
    assert first.norm == pytest.approx(8**0.5)
    assert first.relative_norm == pytest.approx(8**0.5 / float(weight.norm()))
    assert first.stable_rank == pytest.approx(2)
    assert first.effective_rank == pytest.approx(2)


def test_a_fresh_adapter_has_changed_nothing(inputs: Inputs) -> None:
    found = layers(rankfold.attach(inputs.model, rankfold.LoRA(rank=3), targets=["q_proj"]))
    assert [(layer.rank, layer.norm, layer.stable_rank, layer.effective_rank) for layer in found] == [(0, 0, 0, 0)] * 2


def test_a_change_that_is_no_matrix_has_no_spectrum(inputs: Inputs) -> None:
    adapter = rankfold.attach(inputs.model, rankfold.build("hydra"), targets=["q_proj"])
    for delta in adapter.deltas.values():
        delta.form = "function"  # type: ignore[misc]
    with pytest.raises(RankfoldError, match=r"hydra changes model\.layers\.0\.self_attn\.q_proj by no ΔW"):
        layers(adapter)


def test_forgetting_on_a_text_of_rows(inputs: Inputs, place: Path) -> None:
    adapter = rankfold.attach(inputs.model, rankfold.LoRA(rank=3), targets=["q_proj"])
    text = {"path": str(place / "text.txt"), "format": "text", "max_length": 64}
    none = forgotten(inputs, adapter.name, text)
    assert (none.loss, none.low, none.high) == (0, 0, 0)
    assert none.base > 4  # of 261 tokens that an untrained model knows nothing of
    for delta in adapter.deltas.values():
        delta.B.data.normal_()
    assert forgotten(inputs, adapter.name, text).loss != 0


@pytest.mark.parametrize(("text", "said"), [(None, "no general text was given"), ({"path": "none.txt"}, "text.path")])
def test_forgetting_says_why_it_is_missing(inputs: Inputs, text: Any, said: str) -> None:
    adapter = rankfold.attach(inputs.model, rankfold.LoRA(rank=3), targets=["q_proj"])
    with pytest.raises(RankfoldError, match=said):
        forgotten(inputs, adapter.name, None if text is None else {"format": "text", **text})


def test_the_cost_of_a_forward_pass(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = rankfold.attach(inputs.model, rankfold.LoRA(rank=3), targets="all-linear")

    def seconds(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
        merged = bool(state_of(model).merged)
        adapted = state_of(model).route is not None
        return 1.0 if merged else 3.0 if adapted else 2.0

    monkeypatch.setattr("rankfold.compare.measure._seconds", seconds)
    missing: dict[str, str] = {}
    found = inference(inputs, adapter.name, missing)
    assert (found.base, found.unmerged, found.merged, missing) == (2.0, 3.0, 1.0, {})
    assert (found.unmerged_ratio, found.merged_ratio) == (1.5, 0.5)
    assert state_of(inputs.model).merged == ()
