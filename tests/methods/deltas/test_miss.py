import pytest
import torch
from torch import nn

import rankfold
from rankfold import Bone, MiSS
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear(torch.zeros(2, 4)), MiSS(rank=2))
    put(delta, D=[[1, 2], [3, 4]])
    close(change(delta), [[1, 3, 1, 3], [2, 4, 2, 4]])
    close(model(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=DOUBLE)), [[22, 32]])


def test_mini_repeats_along_the_outputs():
    _, delta = attached(linear(torch.zeros(4, 4)), MiSS(rank=2, mini=2))
    put(delta, D=[[1, 2], [3, 4]])
    close(change(delta), [[1, 3, 1, 3], [2, 4, 2, 4], [1, 3, 1, 3], [2, 4, 2, 4]])
    assert delta.D.numel() == MiSS(rank=2, mini=2).count(delta.site) == 4


def test_is_the_later_form_of_bone():
    W, x = draw(6, 8), draw(5, 8, seed=1)
    model, delta = attached(linear(W), MiSS(rank=3))
    perturb(delta)
    other, bone = attached(linear(W), Bone(rank=3, variant="bone"))
    put(bone, D=delta.D)
    close(model(x), other(x))


def test_pads_where_rank_does_not_divide_in():
    """`Δy = (Σ_j x_j) D` over the chunks of x, filled up with zeros."""
    model, delta = attached(linear(torch.zeros(3, 7)), MiSS(rank=3))
    perturb(delta)
    x = draw(5, 7)
    padded = torch.cat([x, torch.zeros(5, 2, dtype=DOUBLE)], 1)
    close(model(x), padded.view(5, 3, 3).sum(1) @ delta.D)


def test_first_gradient():
    W, x, up = draw(4, 6), draw(5, 6, seed=1), draw(5, 4, seed=2)
    G = up.T @ x
    model, delta = attached(linear(W), MiSS(rank=2, mini=2))
    model(x).backward(up)
    blocks = [G[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].T for i in range(2) for j in range(3)]
    close(delta.D.grad, sum(blocks), 1e-11)


def test_rank_of_the_change_is_at_most_r():
    _, delta = attached(linear(draw(8, 12)), MiSS(rank=3))
    perturb(delta)
    assert torch.linalg.matrix_rank(change(delta)) == 3


@pytest.mark.parametrize(("shape", "rank"), [((16, 32), 16), ((576, 64), 64)])
def test_rank_of_none(shape: tuple[int, int], rank: int):
    _, delta = attached(nn.Linear(*shape), MiSS())
    assert delta.D.shape == (rank, shape[1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="input size"):
        attached(nn.Linear(6, 8), MiSS(rank=7))
    with pytest.raises(rankfold.UnsupportedError, match="mini must divide"):
        attached(nn.Linear(6, 8), MiSS(rank=2, mini=3))


def test_dropout_acts_on_the_input():
    model, delta = attached(linear(torch.zeros(2, 4)), MiSS(rank=2, dropout=0.5))
    put(delta, D=torch.eye(2))
    delta.train()
    torch.manual_seed(0)
    y = model(torch.ones(400, 4, dtype=DOUBLE)).detach()
    assert set(y.flatten().tolist()) == {0.0, 2.0, 4.0}  # none, one or both of the two inputs, at twice their size
    delta.eval()
    close(model(torch.ones(1, 4, dtype=DOUBLE)), [[2, 2]])


def test_experts_are_layers_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, MiSS(rank=2, mini=4), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), MiSS(rank=2, mini=4))
        put(alone, D=delta.D[e])
        close(change(delta)[e], change(alone))
