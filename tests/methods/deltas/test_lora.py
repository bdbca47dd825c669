import math

import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear([[1, 0], [0, 1]], [1, 2]), LoRA(rank=1, alpha=3))
    put(delta, A=[[1, 2]], B=[[1], [-1]])
    close(change(delta), [[3, 6], [-3, -6]])
    close(model(torch.tensor([[1.0, 1.0]], dtype=DOUBLE)), [[1 + 1 + 9, 1 + 2 - 9]])


def test_first_gradient_is_zero_for_A_and_s_G_At_for_B():
    model, delta = attached(linear(draw(6, 5)), LoRA(rank=3, alpha=6))
    x, up = draw(7, 5, seed=1), draw(7, 6, seed=2)
    model(x).backward(up)
    assert not delta.A.grad.any()
    close(delta.B.grad, 2 * (up.T @ x) @ delta.A.detach().T, 1e-11)


def test_rank_and_doubling_alpha():
    _, one = attached(linear(draw(9, 8)), LoRA(rank=2, alpha=4))
    _, two = attached(linear(draw(9, 8)), LoRA(rank=2, alpha=8))
    perturb(one), perturb(two)
    assert torch.linalg.matrix_rank(change(one)) == 2
    close(change(two), 2 * change(one))


def test_start_of_A():
    delta = attached(nn.Linear(400, 60), LoRA(rank=50))[1]
    assert delta.A.abs().max() <= 1 / 20
    assert delta.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)
    delta = attached(nn.Linear(400, 60), LoRA(rank=50, start="gaussian"))[1]
    assert delta.A.std().item() == pytest.approx(1 / 50, rel=0.03)
    assert not delta.B.any()


def test_an_embedding_starts_the_other_way_round():
    delta = attached(nn.Embedding(50, 40), LoRA(rank=30))[1]
    assert not delta.A.any()
    assert delta.B.std().item() == pytest.approx(1, rel=0.1)


def test_rslora_scale():
    assert LoRA(rank=64, alpha=16, rslora=True).scale == 2
    assert LoRA(rank=64, alpha=16).scale == 0.25
    assert LoRA(rank=64).scale == 1
    assert LoRA(rank=64, rslora=True).scale == 8


@pytest.mark.parametrize(("rslora", "shrinks"), [(True, False), (False, True)])
def test_rslora_keeps_the_first_change_as_rank_grows(rslora: bool, shrinks: bool):
    """The size of the change of ΔW x after one step of gradient descent on B."""
    x, up = draw(16, 256, seed=1), draw(16, 256, seed=2)
    sizes = []
    for r in (4, 64, 256):
        model, delta = attached(linear(torch.zeros(256, 256)), LoRA(rank=r, alpha=16, rslora=rslora))
        model(x).backward(up)
        put(delta, B=-delta.B.grad)
        sizes.append(model(x).norm().item())
    assert (sizes[-1] < 0.1 * sizes[0]) is shrinks
    if not shrinks:
        assert max(sizes) / min(sizes) < 2


def test_counts_and_refuses():
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 6))
    assert rankfold.attach(model, LoRA(rank=3), targets=["0", "1"]).num_parameters() == 3 * 14 + 3 * 10
    with pytest.raises(rankfold.UnsupportedError, match="at most 4"):
        rankfold.attach(nn.Sequential(nn.Linear(10, 4)), LoRA(rank=5), targets=["0"])
