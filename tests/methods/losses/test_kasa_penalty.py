import pytest
import torch
from torch import nn

import rankfold
from rankfold import SORSA, AdaLoRASVD, KaSA, KaSAPenalty, LoRA, SLoRA
from tests.methods.support import attached, close, draw, linear, perturb, put


def on(model: nn.Module, **hyper: float) -> KaSAPenalty:
    callback = KaSAPenalty(**hyper)
    callback.on_attach(rankfold.adapters(model)["default"], model)
    return callback


def test_worked_numbers():
    """λ = (1, 2): 5. B = 0: √2. Orthonormal A: 0 (and not √(in − r) = 2, as for the authors' AᵀA)."""
    model, delta = attached(linear(draw(5, 6)), KaSA(rank=2))
    put(delta, lam=[1, 2], A=torch.eye(2, 6))
    assert not delta.B.any()
    close(on(model).penalty(), 1e-4 * 5 + 1e-3 * 2**0.5)
    close(on(model, beta=0, gamma=1).penalty(), 2**0.5)
    close(on(model, beta=2, gamma=0).penalty(), 10)
    put(delta, A=[[2, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], B=[[1, 1], [0, 1], [0, 0], [0, 0], [0, 0]])
    close(on(model, beta=0, gamma=1).penalty(), 3 + 3**0.5)


def test_mean_over_layers_of_several_ranks():
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6))
    adapter = rankfold.attach(model, KaSA(rank=3), targets=["0", "1", "2"], overrides={"1": {"rank": 2}})
    expected = []
    for delta in adapter.deltas.values():
        perturb(delta)
        B, lam, A = delta.B.double(), delta.lam.double(), delta.A.double()
        eye = torch.eye(len(lam))
        expected.append(0.5 * lam @ lam + 0.25 * ((B.T @ B - eye).norm() + (A @ A.T - eye).norm()))
    close(on(model, beta=0.5, gamma=0.25).penalty(), torch.stack(expected).mean().detach(), 1e-5)


def test_each_expert_is_a_layer():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, KaSA(rank=2), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    norms = [(M @ M.T - torch.eye(2)).norm() for A, B in zip(delta.A, delta.B, strict=True) for M in (A, B.T)]
    expected = (delta.lam.square().sum() + sum(norms)) / 3
    close(on(model, beta=1, gamma=1).penalty(), expected.detach())


def test_gradients_are_finite_at_the_start_and_at_exactly_orthonormal_vectors():
    model, delta = attached(linear(draw(5, 6)), KaSA(rank=2))
    put(delta, A=torch.eye(2, 6))
    on(model, beta=1, gamma=1).penalty().backward()
    close(delta.lam.grad, 2 * delta.lam.detach())
    assert not delta.A.grad.any()  # a subgradient of the norm at zero
    assert not delta.B.grad.any()  # the derivative of ‖BᵀB − I‖ is zero at B = 0
    put(delta, B=torch.eye(5, 2))
    on(model).penalty().backward()
    assert torch.isfinite(delta.B.grad).all()


@pytest.mark.parametrize("method", [AdaLoRASVD(rank=2), SORSA(rank=2)])
def test_on_other_deltas_of_the_same_form(method: rankfold.Method):
    model, delta = attached(linear(draw(5, 6)), method)
    put(delta, lam=[1, 2], A=torch.eye(2, 6), B=torch.eye(5, 2))
    close(on(model, beta=2, gamma=7).penalty(), 10)


@pytest.mark.parametrize("method", [LoRA(rank=2), SLoRA(rank=2)])
def test_deltas_without_lambda_are_refused(method: rankfold.Method):
    model, _ = attached(linear(draw(5, 6)), method)
    with pytest.raises(rankfold.RankfoldError, match="B, λ and A"):
        on(model)
