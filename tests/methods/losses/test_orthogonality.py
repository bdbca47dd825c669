import pytest
import torch
from torch import nn

import rankfold
from rankfold import BitFit, DoRA, LoRA, Orthogonality, VeRA
from tests.methods.support import attached, close, draw, linear, put


def callback_on(model: nn.Module, **hyper: float) -> Orthogonality:
    callback = Orthogonality(**hyper)
    callback.on_attach(rankfold.adapters(model)["default"], model)
    return callback


def test_worked_numbers():
    """A Aᵀ − I = diag(3, 0), of norm 3; Bᵀ B − I = [[0, 1], [1, 1]], of norm √3; their mean, times a half."""
    model, delta = attached(linear(torch.zeros(3, 2)), LoRA(rank=2))
    put(delta, A=[[2, 0], [0, 1]], B=[[1, 1], [0, 1], [0, 0]])
    close(callback_on(model).penalty(), (3 + 3**0.5) / 2 / 2)
    close(callback_on(model, weight=0.1).penalty(), (3 + 3**0.5) / 2 / 10)


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(rank=3), VeRA(rank=3)])
def test_mean_over_every_factor_of_every_layer(method: rankfold.Method):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapter = rankfold.attach(model, method, targets=["0", "1"])
    norms = []
    for delta in adapter.deltas.values():
        for i, parameter in enumerate(delta.parameters()):
            put(delta, **{dict(enumerate(delta._parameters))[i]: draw(*parameter.shape, seed=i)})
        B, A = delta.factors() if delta.form == "factors" else (delta.B, delta.A)
        norms += [(A @ A.T - torch.eye(3)).norm(), (B.T @ B - torch.eye(3)).norm()]
    penalty = callback_on(model).penalty()
    close(penalty, 0.5 * sum(norms) / 4, 1e-5)
    penalty.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


def test_each_expert_counts():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, LoRA(rank=2), targets=["up"]).deltas["experts.up"]
    put(delta, A=draw(3, 2, 4), B=draw(3, 8, 2))
    norms = [(M @ M.T - torch.eye(2)).norm() for A, B in zip(delta.A, delta.B, strict=True) for M in (A, B.T)]
    close(callback_on(model).penalty(), 0.5 * sum(norms) / 6)


def test_training_on_it_alone_makes_factors_orthogonal():
    model, delta = attached(linear(draw(6, 5)), LoRA(rank=3))
    put(delta, B=draw(6, 3))
    callback = callback_on(model)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.01)
    first = callback.penalty().item()
    for _ in range(500):
        optimizer.zero_grad()
        callback.penalty().backward()
        optimizer.step()
    assert callback.penalty().item() < 0.1 * first
    exact = torch.linalg.qr(draw(6, 3))[0]
    put(delta, B=exact, A=torch.eye(3, 5))
    callback.penalty().backward()
    assert torch.isfinite(delta.B.grad).all(), "the norm has no derivative at zero, but a subgradient"


def test_methods_without_factors_are_refused():
    model, _ = attached(linear(draw(6, 5), draw(6)), BitFit())
    with pytest.raises(rankfold.RankfoldError, match="factors B and A"):
        callback_on(model)
