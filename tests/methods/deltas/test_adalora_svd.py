import pytest
import torch
from torch import nn

import rankfold
from rankfold import AdaLoRASVD, Orthogonality
from tests.methods.support import attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear([[1, 0], [0, 1]]), AdaLoRASVD(rank=2, alpha=6))
    put(delta, B=[[1, 0], [1, 1]], lam=[2, -1], A=[[1, 0], [0, 3]])
    close(change(delta), [[6, 0], [6, -9]])
    close(model(torch.eye(2, dtype=torch.float64)), [[7, 6], [0, -8]])


def test_starts_as_the_base_with_factors_that_are_not_zero():
    _, delta = attached(nn.Linear(300, 200), AdaLoRASVD(rank=40))
    assert not change(delta).any()
    assert not delta.lam.any()
    for factor in (delta.A, delta.B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(factor.mean().item()) < 1e-3


def test_first_gradient_reaches_lambda_alone():
    model, delta = attached(linear(draw(6, 5)), AdaLoRASVD(rank=3, alpha=6))
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    G = up.T @ x
    assert not delta.A.grad.any()
    assert not delta.B.grad.any()
    close(delta.lam.grad, 2 * (delta.B.T @ G @ delta.A.T).diagonal().detach())


def test_a_lambda_of_zero_lowers_the_rank_by_one():
    _, delta = attached(linear(draw(9, 8)), AdaLoRASVD(rank=4))
    perturb(delta)
    for rank in (4, 3, 2, 1, 0):
        assert torch.linalg.matrix_rank(change(delta), atol=1e-9) == rank
        if rank:
            with torch.no_grad():
                delta.lam[rank - 1] = 0


def test_an_embedding_starts_alive_too():
    model, delta = attached(nn.Embedding(9, 8), AdaLoRASVD(rank=3))
    model(torch.arange(9)).sum().backward()
    assert delta.A.any()
    assert delta.lam.grad.all()


def test_its_regulariser_sees_B_and_A_without_lambda():
    model, delta = attached(linear(draw(5, 4)), AdaLoRASVD(rank=1))
    put(delta, B=[[2], [0], [0], [0], [0]], lam=[100], A=[[1, 0, 0, 0]])
    callback = Orthogonality()
    callback.on_attach(rankfold.adapters(model)["default"], model)
    close(callback.penalty(), 0.5 * (3 + 0) / 2)


def test_counts_scale_and_refusals():
    model = nn.Sequential(nn.Linear(10, 7), nn.Conv2d(3, 8, 3))
    adapter = rankfold.attach(model, AdaLoRASVD(rank=3), targets=["0", "1"])
    assert adapter.num_parameters() == 3 * (10 + 7 + 1) + 3 * (27 + 8 + 1)
    assert AdaLoRASVD().scale == 1
    assert AdaLoRASVD(rank=4, alpha=2).scale == 0.5
    with pytest.raises(rankfold.UnsupportedError, match="at most 7"):
        attached(nn.Linear(10, 7), AdaLoRASVD(rank=8))
    with pytest.raises(rankfold.RankfoldError, match="alpha"):
        rankfold.build("adalora-svd", alpha=0)
