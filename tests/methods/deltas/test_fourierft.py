import math

import pytest
import torch
from torch import nn

import rankfold
from rankfold import FourierFT
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def entry(delta: rankfold.Delta, row: int, column: int) -> int:
    """Which of all entries of the spectrum is the one at this place."""
    return delta.places.tolist().index(row * delta.site.in_ + column)


def test_worked_numbers():
    model, delta = attached(linear(torch.zeros(4, 4)), FourierFT(alpha=1))
    c = torch.zeros(16)
    c[entry(delta, 1, 2)] = 1
    put(delta, c=c)
    close(change(delta)[0], [1 / 16, -1 / 16, 1 / 16, -1 / 16])
    close(change(delta)[1], torch.zeros(4))
    close(model(torch.eye(4, dtype=DOUBLE))[:, 0], [1 / 16, -1 / 16, 1 / 16, -1 / 16])


def test_every_entry_is_a_cosine():
    _, delta = attached(linear(torch.zeros(6, 10)), FourierFT(n=7, alpha=30))
    perturb(delta)
    p, q = torch.arange(6, dtype=DOUBLE)[:, None], torch.arange(10, dtype=DOUBLE)
    waves = [
        c * torch.cos(2 * math.pi * (p * (place // 10) / 6 + q * (place % 10) / 10))
        for c, place in zip(delta.c.tolist(), delta.places.tolist(), strict=True)
    ]
    close(change(delta), 30 * sum(waves) / 60)


def test_linear_in_the_entries():
    _, delta = attached(linear(torch.zeros(6, 10)), FourierFT(n=7))
    one, two = draw(7, seed=1), draw(7, seed=2)
    changes = []
    for c in (one, two, 2 * one - 3 * two):
        put(delta, c=c)
        changes.append(change(delta))
    close(changes[2], 2 * changes[0] - 3 * changes[1])


def test_first_gradient():
    """∂L/∂c at a place is the inner product of G with its wave."""
    x, up = draw(5, 10, seed=1), draw(5, 6, seed=2)
    model, delta = attached(linear(draw(6, 10)), FourierFT(n=7, alpha=2))
    model(x).backward(up)
    waves = []
    for i in range(7):
        put(delta, c=torch.eye(7)[i])
        waves.append((change(delta) * (up.T @ x)).sum())
    close(delta.c.grad, torch.stack(waves), 1e-11)


def test_the_places_come_from_the_seed_and_the_shape_alone():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 30), nn.Linear(30, 40))
    first = rankfold.attach(model, FourierFT(n=50), targets=["0", "1", "2"], seed=1).deltas
    second = rankfold.attach(model, FourierFT(n=50), targets=["0"], name="b", seed=2).deltas
    third = rankfold.attach(model, FourierFT(n=50, entry_seed=3), targets=["0"], name="c").deltas
    assert torch.equal(first["0"].places, first["2"].places)
    assert torch.equal(first["0"].places, second["0"].places)
    assert not torch.equal(first["0"].places, third["0"].places)
    assert len(set(first["1"].places.tolist())) == 50
    assert max(first["0"].places) < 1200


def test_start():
    x = draw(3, 30)
    layer = nn.Linear(30, 40).double()
    expected = layer(x)
    model, delta = attached(layer, FourierFT())
    assert not delta.c.any()
    assert torch.equal(model(x), expected)
    model, delta = attached(nn.Linear(30, 40).double(), FourierFT(start="normal"))
    assert abs(float(delta.c.detach().std()) - 1) < 0.1
    assert change(delta).abs().max() > 0.1


@pytest.mark.parametrize(("shape", "n"), [((16, 32), 512), ((40, 30), 1000), ((3, 2), 6)])
def test_no_more_entries_than_the_weight_has(shape: tuple[int, int], n: int):
    _, delta = attached(nn.Linear(*shape), FourierFT())
    assert len(delta.c) == n == FourierFT().count(delta.site)
    assert len(set(delta.places.tolist())) == n


def test_all_entries_reach_every_even_change():
    """Re(ifft2) of real entries is even: ΔW[−p, −q] = ΔW[p, q], and with all entries it is any such matrix."""
    _, delta = attached(linear(torch.zeros(4, 6)), FourierFT(alpha=1))
    wanted = draw(4, 6)
    wanted = wanted + wanted.roll((-1, -1), (0, 1)).flip(0, 1)
    spectrum = torch.fft.fft2(wanted)
    close(spectrum.imag, torch.zeros(4, 6))
    put(delta, c=spectrum.real.flatten()[delta.places])
    close(change(delta), wanted)


def test_convolutions_and_embeddings():
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    model, delta = attached(conv, FourierFT(n=20))
    perturb(delta)
    x = draw(2, 4, 5, 5)
    W = conv.weight + change(delta).reshape(conv.weight.shape)
    close(model(x), nn.functional.conv2d(x, W, conv.bias, groups=2))
    model, delta = attached(nn.Embedding(20, 12).double(), FourierFT(n=20))
    perturb(delta)
    close(model(torch.tensor([3, 7])), (delta.W + change(delta)).T[[3, 7]])


def test_experts_are_layers_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, FourierFT(n=9), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = change(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), FourierFT(n=9))
        put(alone, c=delta.c[e])
        close(together[e], change(alone))


def test_a_half_precision_base_keeps_the_entries_in_float32():
    model, delta = attached(nn.Linear(30, 40).bfloat16(), FourierFT(n=20))
    assert delta.c.dtype == torch.float32
    model(draw(3, 30).bfloat16()).float().square().sum().backward()
    assert delta.c.grad.any()
