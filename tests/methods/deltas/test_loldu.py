import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoLDU
from rankfold.deltas.loldu import leading_ldu
from tests.methods.support import attached, change, close, draw, linear, put


def test_worked_numbers():
    _, delta = attached(linear([[2, 1], [4, 5]]), LoLDU(rank=1, alpha=1))
    close(delta.D, [4])
    close(delta.PL, [[0.5], [1]])
    close(delta.U, [[1, 1.25]])
    start = delta.PL * delta.D @ delta.U
    close(start, [[2, 2.5], [4, 5]])
    close(delta.W - start, [[0, -1.5], [0, 0]])
    PL, D, U = leading_ldu(delta.W.detach(), 2)
    close(D, [4, -1.5])
    close(U, [[1, 1.25], [0, 1]])
    close(PL, [[0.5, 1], [1, 0]])


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (5, 9)])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_first_pivots_are_those_of_the_whole_factorisation(shape: tuple[int, int], r: int):
    W = draw(2, *shape)
    P, L, U = torch.linalg.lu(W)
    D = U.diagonal(dim1=-2, dim2=-1)
    got = leading_ldu(W, r)
    for a, b in zip(got, ((P @ L)[..., :r], D[..., :r], (U / D[..., None])[..., :r, :]), strict=True):
        close(a, b, 1e-10)


def test_all_pivots_give_W_back():
    W = draw(6, 8)
    PL, D, U = leading_ldu(W, 6)
    close(PL * D @ U, W, 1e-12)


def test_a_zero_pivot_gives_finite_factors_and_still_trains():
    W = torch.outer(draw(5), draw(6))
    W[:, 0] = 0
    model, delta = attached(linear(W), LoLDU(rank=4))
    for tensor in (delta.PL, delta.U, delta.D):
        assert torch.isfinite(tensor).all()
    close(delta.U.diagonal(), torch.ones(4))
    assert delta.U.abs().max() < 100
    model(draw(3, 6)).square().sum().backward()
    assert (delta.z.grad != 0).all()
    model, delta = attached(nn.Linear(5, 6), LoLDU(rank=4))
    with torch.no_grad():
        model[0].weight.zero_()
    delta.start(torch.Generator())
    assert torch.isfinite(delta.PL).all()
    assert not delta.D.any()


def test_gradient_of_z_and_identity_at_start():
    model, delta = attached(linear(draw(6, 5)), LoLDU(rank=2, alpha=3))
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    assert not change(delta).any()
    model(x).backward(up)
    G = up.T @ x
    close(delta.z.grad, [1.5 * delta.PL[:, i] @ G @ delta.U[i] for i in range(2)], 1e-11)
    put(delta, z=[7.0, -2.0])
    expected = 1.5 * (delta.PL @ torch.diag(delta.z.detach() - delta.D) @ delta.U)
    close(change(delta), expected)


@pytest.mark.parametrize("start", ["uniform", "normal", "constant", "ones", "zeros"])
def test_other_starts_change_the_function_and_keep_the_residual(start: str):
    W = draw(30, 20)
    _, delta = attached(linear(W), LoLDU(rank=10, alpha=10, start=start))
    residual = W - delta.PL * delta.D @ delta.U
    close(delta.adapted_weight(W), residual + (delta.PL * delta.z @ delta.U).detach(), 1e-10)
    mean = delta.D.mean()
    expected = {"constant": mean, "ones": 1.0, "zeros": 0.0}
    if start in expected:
        close(delta.z, expected[start] * torch.ones(10, dtype=delta.z.dtype))
    elif start == "uniform":
        assert delta.z.abs().max() <= mean.abs() / 2
        assert delta.z.std() > 0.1 * mean.abs()
    else:
        assert (delta.z.std() / delta.D.std()).log().abs() < 1


def test_saves_what_it_needs_and_counts_r():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(5, 7)), LoLDU(rank=3), targets=["0"])
    assert adapter.num_parameters() == 3
    assert {name.split(".")[-1] for name in adapter.state_dict()} == {"z", "PL", "U", "D"}
    assert LoLDU().rank == 4
    assert adapter.deltas["0"].scale == 1 / 3
    with pytest.raises(rankfold.UnsupportedError, match="5 pivots"):
        attached(nn.Linear(5, 7), LoLDU(rank=6))
