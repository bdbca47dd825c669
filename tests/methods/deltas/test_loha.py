import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoHa
from rankfold.deltas.loha import DenseLoHa, ThinLoHa
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear(torch.zeros(2, 2)), LoHa(rank=1, alpha=3))
    put(delta, B1=[[1], [2]], A1=[[3, 4]], B2=[[5], [6]], A2=[[7, 8]])
    expected = 3.0 * torch.tensor([[3 * 35, 4 * 40], [6 * 42, 8 * 48]])
    close(change(delta), expected)
    close(model(torch.eye(2, dtype=DOUBLE)), expected.T)


def test_two_pairs_of_rank_2_make_rank_4():
    _, delta = attached(linear(draw(8, 8)), LoHa(rank=2))
    perturb(delta, size=1.0)
    assert torch.linalg.matrix_rank(change(delta)) == 4


@pytest.mark.parametrize(("rank", "kind"), [(2, ThinLoHa), (3, DenseLoHa)])
def test_both_ways_to_compute_it(rank: int, kind: type):
    model, delta = attached(linear(draw(8, 12)), LoHa(rank=rank, alpha=5))
    assert type(delta) is kind
    perturb(delta)
    expected = 5 / rank * (delta.B1 @ delta.A1) * (delta.B2 @ delta.A2)
    close(change(delta), expected)
    x = draw(4, 12, seed=1)
    close(model(x), x @ (draw(8, 12) + expected).T)


def test_start():
    _, delta = attached(nn.Linear(400, 300), LoHa(rank=4))
    for name, bound in {"B1": 0.5, "B2": 0.5, "A1": 0.05}.items():
        tensor = getattr(delta, name)
        assert 0.98 * bound < tensor.abs().max() <= bound
        assert abs(float(tensor.detach().std()) - bound / 3**0.5) < 0.05 * bound
    assert not delta.A2.any()


@pytest.mark.parametrize("rank", [1, 4])
def test_first_gradients(rank: int):
    """At A₂ = 0 only A₂ moves, by `s B₂ᵀ (G ⊙ B₁ A₁)`."""
    W, x, up = draw(6, 8), draw(5, 8, seed=1), draw(5, 6, seed=2)
    model, delta = attached(linear(W), LoHa(rank=rank, alpha=2))
    model(x).backward(up)
    close(delta.A2.grad, 2 / rank * delta.B2.T @ ((up.T @ x) * (delta.B1 @ delta.A1)), 1e-11)
    assert not any(tensor.grad.any() for tensor in (delta.B1, delta.A1, delta.B2))


@pytest.mark.parametrize("layer", [nn.Linear(12, 20), nn.Conv2d(4, 8, 3), nn.Embedding(20, 12)])
def test_count(layer: nn.Module):
    _, delta = attached(layer, LoHa(rank=3))
    assert LoHa(rank=3).count(delta.site) == 6 * (delta.site.in_ + delta.site.out)
    assert LoHa(rank=3).count(delta.site) == sum(p.numel() for p in delta.parameters())


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_and_embeddings(rank: int):
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    model, delta = attached(conv, LoHa(rank=rank))
    perturb(delta)
    x = draw(2, 4, 5, 5)
    W = conv.weight + change(delta).reshape(conv.weight.shape)
    close(model(x), nn.functional.conv2d(x, W, conv.bias, groups=2))
    model, delta = attached(nn.Embedding(20, 12).double(), LoHa(rank=rank))
    perturb(delta)
    close(model(torch.tensor([3, 7])), (delta.W + change(delta)).T[[3, 7]])


@pytest.mark.parametrize("rank", [1, 3])
def test_experts_are_layers_of_their_own(rank: int):
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, LoHa(rank=rank), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = change(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), LoHa(rank=rank))
        put(alone, **{name: parameter[e] for name, parameter in delta.named_parameters()})
        close(together[e], change(alone))


def test_a_thin_one_is_exported_as_the_lora_it_is():
    model, delta = attached(linear(draw(16, 12)), LoHa(rank=2, alpha=6))
    perturb(delta)
    x = draw(3, 12)
    expected = model(x)
    adapter, report = rankfold.as_lora(model)
    assert adapter.deltas["0"].A.shape[0] == 4
    rankfold.set_active(model, adapter.name)
    close(model(x), expected, 1e-10)
    assert max(report.values()) < 1e-10
