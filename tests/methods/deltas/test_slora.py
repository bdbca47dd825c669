import pytest
import torch
from torch import nn

import rankfold
from rankfold import SLoRA
from tests.methods.support import attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear([[1, 0], [0, 1]]), SLoRA(rank=2, alpha=6))
    put(delta, B=[[1, 0], [1, 1]], N=[[0, 1], [2, 0]], A=[[1, 0], [0, 3]])
    close(change(delta), [[0, 9], [6, 9]])
    close(model(torch.eye(2, dtype=torch.float64)), [[1, 6], [9, 10]])


def test_starts_as_the_base_and_only_B_has_a_gradient():
    model, delta = attached(linear(draw(6, 5)), SLoRA(rank=3, alpha=6))
    assert not change(delta).any()
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    assert not delta.A.grad.any()
    assert not delta.N.grad.any()
    close(delta.B.grad, 2 * (up.T @ x) @ delta.A.detach().T @ delta.N.detach().T, 1e-11)


def test_gradient_of_N_once_B_is_there():
    model, delta = attached(linear(draw(6, 5)), SLoRA(rank=3, alpha=6))
    perturb(delta)
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    close(delta.N.grad, 2 * delta.B.detach().T @ (up.T @ x) @ delta.A.detach().T, 1e-11)


def test_start_of_A_and_N():
    _, delta = attached(nn.Linear(400, 120), SLoRA(rank=100))
    for factor, bound in ((delta.A, 400**-0.5), (delta.N, 100**-0.5)):
        assert 0.99 * bound < factor.abs().max() <= bound
        assert factor.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_with_N_the_identity_it_is_lora():
    torch.manual_seed(0)
    model, delta = attached(linear(draw(6, 5)), SLoRA(rank=3, alpha=6))
    put(delta, N=torch.eye(3), B=draw(6, 3, seed=2))
    twin, lora = attached(linear(draw(6, 5)), rankfold.LoRA(rank=3, alpha=6))
    put(lora, A=delta.A, B=delta.B)
    x = draw(4, 5, seed=1)
    close(model(x), twin(x).detach(), 1e-14)


def test_an_embedding_starts_the_other_way_round():
    model, delta = attached(nn.Embedding(30, 20), SLoRA(rank=10))
    assert not delta.A.any()
    assert delta.B.std().item() == pytest.approx(1, rel=0.15)
    model(torch.arange(30)).square().sum().backward()
    assert delta.A.grad.any()


def test_counts_scale_and_refusals():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(10, 7)), SLoRA(rank=3), targets=["0"])
    assert adapter.num_parameters() == 3 * (10 + 7 + 3)
    assert SLoRA().scale == 1
    assert SLoRA(rank=4, alpha=2).scale == 0.5
    with pytest.raises(rankfold.UnsupportedError, match="at most 7"):
        attached(nn.Linear(10, 7), SLoRA(rank=8))
