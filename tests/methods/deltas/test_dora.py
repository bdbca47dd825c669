import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rankfold import DoRA
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear([[3, 4], [0, 5]], [10, 20]), DoRA(rank=1))
    close(delta.m, [5, 5])
    put(delta, B=[[0], [12]], A=[[1, 0]])
    close(delta.transform(delta.W), [[3, 4], [60 / 13, 25 / 13]])
    close(model(torch.eye(2, dtype=DOUBLE)), [[13, 20 + 60 / 13], [14, 20 + 25 / 13]])


def test_row_norms_are_m_and_the_bias_is_left_alone():
    model, delta = attached(linear(draw(6, 5), draw(6)), DoRA(rank=2, alpha=4))
    perturb(delta)
    close(delta.transform(delta.W).norm(dim=1), delta.m.abs())
    close(model(torch.zeros(1, 5, dtype=DOUBLE)), model[0].bias[None])


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv", "embedding"])
def test_forward_and_gradients_are_those_of_W_with_a_constant_norm(kind: str):
    layers = {
        "linear": nn.Linear(6, 8),
        "conv": nn.Conv2d(6, 8, 3),
        "grouped conv": nn.Conv2d(6, 8, 3, groups=2),
        "embedding": nn.Embedding(9, 8),
    }
    layer = layers[kind].to(DOUBLE)
    model, delta = attached(layer, DoRA(rank=3, alpha=6))
    perturb(delta)
    x = torch.arange(9)[None] if isinstance(layer, nn.Embedding) else draw(2, 6, *[7] * (delta.site.kind == "conv") * 2)
    W = delta.W.detach()
    V = W + 2 * delta.B @ delta.A
    weight = (delta.m / V.norm(dim=1).detach())[:, None] * V
    if isinstance(layer, nn.Embedding):
        expected = F.embedding(x, weight.T)
    elif isinstance(layer, nn.Conv2d):
        expected = F.conv2d(x, weight.view(layer.weight.shape), layer.bias, groups=layer.groups)
    else:
        expected = F.linear(x, weight, layer.bias)
    up = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(delta.parameters()), up)
    got = torch.autograd.grad(model(x), list(delta.parameters()), up)
    close(model(x), expected)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e-11)


def test_the_norm_is_accurate_in_float32_where_the_change_is_small_and_where_it_is_large():
    for size in (1e-4, 1.0, 100.0):
        _, delta = attached(nn.Linear(300, 200), DoRA(rank=8))
        put(delta, A=draw(8, 300, seed=1), B=size * draw(200, 8, seed=2))
        exact = (delta.W.double() + delta.B.double() @ delta.A.double()).norm(dim=1)
        close(delta.m / delta.gain(delta.W) / exact, torch.ones(200), 1e-6)


def test_keeps_no_second_weight_for_the_backward():
    model, delta = attached(nn.Linear(256, 256), DoRA(rank=4))
    perturb(delta)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() != model[0].weight.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(8, 256))
    assert max(kept) <= 8 * 256


def test_a_row_of_zeros_stays_zero_and_finite():
    model, delta = attached(linear([[0, 0], [3, 4]]), DoRA(rank=1))
    x = draw(3, 2)
    model(x).sum().backward()
    close(model(x)[:, 0], [0, 0, 0])
    assert all(torch.isfinite(p.grad).all() for p in delta.parameters())


def test_starts_as_the_base_and_counts():
    _, delta = attached(nn.Linear(10, 4), DoRA(rank=3))
    assert sum(p.numel() for p in delta.parameters()) == DoRA(rank=3).count(delta.site) == 3 * 14 + 4
    close(change(delta), torch.zeros(4, 10), 1e-6)


def test_dropout_leaves_the_base_alone():
    model, delta = attached(linear(draw(6, 5)), DoRA(rank=2, dropout=0.5))
    put(delta, m=2 * delta.m)
    model.train()
    x = draw(4, 5)
    close(model(x), 2 * x @ model[0].weight.T)
