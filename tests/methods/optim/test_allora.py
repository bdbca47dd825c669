import itertools

import pytest
import torch
from torch import nn

import rankfold
from rankfold import ALLoRA, LoRA, VeRA
from tests.methods.support import attached, close, draw, put


def layer(**options):
    model, delta = attached(nn.Linear(4, 3, dtype=torch.float64), LoRA(rank=2, **options))
    return model, delta, rankfold.adapters(model)["default"]


def step(method, delta, optimizer, seed=3):
    delta.A.grad, delta.B.grad = draw(2, 4, seed=seed), draw(3, 2, seed=seed + 1)
    method.before_step(0)
    optimizer.step()
    method.after_step(0)


def test_the_factor_by_hand():
    B = torch.tensor([[0, 0], [0.45, 0.6], [3.75, 0]], dtype=torch.float64)
    close(ALLoRA(eta=2).factor(B), [[2.0], [1.0], [0.5]])


def test_the_factor_falls_with_the_norm_and_is_at_most_eta():
    norms = torch.linspace(0, 50, 200, dtype=torch.float64)
    factors = ALLoRA(eta=3).factor(norms.unsqueeze(-1)).flatten().tolist()
    assert factors[0] == pytest.approx(3)
    assert all(a > b for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize("apply_to", ["update", "grad"])
def test_a_step_of_sgd(apply_to):
    _, delta, adapter = layer()
    put(delta, B=[[0, 0], [0.45, 0.6], [3.75, 0]])
    A, B = delta.A.detach().clone(), delta.B.detach().clone()
    method = ALLoRA(apply_to=apply_to)
    method.on_attach(adapter, None)
    step(method, delta, torch.optim.SGD(adapter.parameters(), lr=0.1))
    close(delta.A, A - 0.1 * draw(2, 4, seed=3))
    close(delta.B, B - 0.1 * torch.tensor([[2.0], [1.0], [0.5]]).double() * draw(3, 2, seed=4))


def test_under_adam_the_update_is_scaled_and_a_scaled_gradient_is_not():
    moves = {}
    for apply_to in ("update", "grad"):
        _, delta, adapter = layer()
        method = ALLoRA(apply_to=apply_to)
        method.on_attach(adapter, None)
        step(method, delta, torch.optim.Adam(adapter.parameters(), lr=0.1, eps=1e-20))
        moves[apply_to] = delta.B.detach().abs()
    close(moves["update"], torch.full((3, 2), 0.2, dtype=torch.float64), atol=1e-9)
    close(moves["grad"], torch.full((3, 2), 0.1, dtype=torch.float64), atol=1e-9)


def test_a_step_that_was_skipped_changes_nothing():
    _, delta, adapter = layer()
    put(delta, B=draw(3, 2))
    method = ALLoRA()
    method.on_attach(adapter, None)
    method.before_step(0)
    method.before_step(0)
    method.after_step(0)
    assert torch.equal(delta.B, draw(3, 2))


@pytest.mark.parametrize("options", [{"alpha": 4}, {"dropout": 0.1}])
def test_dropout_and_alpha_are_refused(options):
    _, _, adapter = layer(**options)
    with pytest.raises(rankfold.RankfoldError, match="leave both out at 0"):
        ALLoRA().on_attach(adapter, None)
    assert not {"alpha", "dropout"} & set(ALLoRA.model_fields)


def test_needs_a_trained_B():
    model, _ = attached(nn.Linear(6, 5), VeRA(rank=2))
    with pytest.raises(rankfold.RankfoldError, match="B and A"):
        ALLoRA().on_attach(rankfold.adapters(model)["default"], model)
