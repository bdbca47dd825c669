from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoKr
from rankfold.deltas.lokr import split
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear(torch.zeros(4, 4)), LoKr(rank=2, alpha=1))
    put(delta, C=[[1, 2], [0, 4]], D=[[0, 1], [1, 2]])
    expected = [[0, 0.5, 0, 1], [0.5, 1, 1, 2], [0, 0, 0, 2], [0, 0, 2, 4]]
    close(change(delta), expected)
    close(model(torch.eye(4, dtype=DOUBLE)).T, expected)


@pytest.mark.parametrize(("size", "pair"), [(256, (16, 16)), (128, (8, 16)), (127, (1, 127)), (1, (1, 1))])
def test_the_factors_nearest_the_root(size: int, pair: tuple[int, int]):
    assert split(size) == pair


def test_a_factor_that_is_named():
    assert split(128, 4) == (4, 32)
    assert split(128, 20) == (8, 16)
    assert split(90, 7) == (6, 15)
    assert split(12, 6) == (6, 2)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"rank": 8}, {"C": (4, 8), "D": (8, 16)}),
        ({"rank": 7}, {"C": (4, 8), "D_b": (8, 7), "D_a": (7, 16)}),
        ({"rank": 4, "decompose_both": True}, {"C": (4, 8), "D_b": (8, 4), "D_a": (4, 16)}),
        ({"rank": 3, "decompose_both": True}, {"C_b": (4, 3), "C_a": (3, 8), "D_b": (8, 3), "D_a": (3, 16)}),
        ({"rank": 8, "factor": 2}, {"C": (2, 2), "D_b": (16, 8), "D_a": (8, 64)}),
    ],
)
def test_what_is_trained(options: dict[str, Any], shapes: dict[str, tuple[int, int]]):
    model, delta = attached(nn.Linear(128, 32).double(), LoKr(**options))
    assert {name: tuple(parameter.shape) for name, parameter in delta.named_parameters()} == shapes
    assert LoKr(**options).count(delta.site) == sum(a * b for a, b in shapes.values())
    perturb(delta)
    C = delta.C if "C" in shapes else delta.C_b @ delta.C_a
    D = delta.D if "D" in shapes else delta.D_b @ delta.D_a
    expected = torch.kron(C, D)
    close(change(delta), expected)
    x = draw(2, 3, 128)
    close(model(x), x @ (delta.W + expected).T + delta.b)
    close(model(x[0, 0]), model(x)[0, 0])


def test_the_rank_is_the_product_of_the_ranks():
    _, delta = attached(linear(draw(16, 16)), LoKr(rank=1))
    perturb(delta)
    put(delta, C=torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0])))
    assert torch.linalg.matrix_rank(change(delta)) == 3 * 1
    _, delta = attached(linear(draw(16, 16)), LoKr(rank=2))
    perturb(delta)
    put(delta, D=torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])))
    assert torch.linalg.matrix_rank(change(delta)) == 4 * 2


def test_start():
    _, delta = attached(nn.Linear(4096, 1024), LoKr(rank=16))
    assert delta.C.shape == (32, 64)
    assert not delta.C.any()
    for name, bound in {"D_b": 0.25, "D_a": 0.125}.items():
        assert 0.97 * bound < getattr(delta, name).abs().max() <= bound


def test_first_gradient():
    """At C = 0 only C moves, by the inner products of D with the blocks of G."""
    W, x, up = draw(6, 4), draw(5, 4, seed=1), draw(5, 6, seed=2)
    model, delta = attached(linear(W), LoKr(rank=2, alpha=4))
    model(x).backward(up)
    blocks = (up.T @ x).unflatten(1, (2, 2)).unflatten(0, (2, 3))  # (out_l, out_k, in_m, in_n)
    close(delta.C.grad, 2 * torch.einsum("lkmn,kn->lm", blocks, delta.D), 1e-11)
    assert not delta.D.grad.any()


@pytest.mark.parametrize(("rank", "names"), [(8, ["C", "D"]), (1, ["C", "D_b", "D_a"])])
def test_a_convolution_keeps_its_kernel_with_D(rank: int, names: list[str]):
    layer = nn.Conv2d(8, 12, 3, groups=2).double()
    model, delta = attached(layer, LoKr(rank=rank))
    perturb(delta)
    assert list(delta._parameters) == names
    C, D = delta.pairs()
    assert C.shape == (3, 2)
    kernel = torch.kron(C[:, :, None, None], D.unflatten(1, (2, 3, 3)))
    x = draw(2, 8, 6, 6)
    close(model(x), nn.functional.conv2d(x, layer.weight + kernel, layer.bias, groups=2))


def test_an_embedding():
    model, delta = attached(nn.Embedding(20, 12).double(), LoKr(rank=2))
    perturb(delta)
    close(model(torch.tensor([3, 7])), (delta.W + change(delta)).T[[3, 7]])


@pytest.mark.parametrize("rank", [1, 8])
def test_experts_are_layers_of_their_own(rank: int):
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, LoKr(rank=rank), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = change(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), LoKr(rank=rank))
        put(alone, **{name: parameter[e] for name, parameter in delta.named_parameters()})
        close(together[e], change(alone))
