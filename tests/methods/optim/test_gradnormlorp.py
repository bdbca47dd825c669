from typing import Any

import pytest
import torch
from torch import nn

from rankfold import GaLore, GradNormLoRP
from rankfold.optim import SGD, Svd
from rankfold.optim.gradnormlorp import WeightNormed, normed_gradients
from tests.methods.optim.stepping import made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import DOUBLE, close, draw


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_the_cards_gradients() -> None:
    U, g, length, G = tensor([[0.6, 0.8]]), tensor([[10.0]]), tensor([[5.0]]), tensor([[1.0, 0.0]])
    dV, dg = normed_gradients(U, g, length, G)
    close(dg, [[0.6]])
    close(dV, [[1.28, -0.96]])
    close((dV * U).sum(), 0)
    close(normed_gradients(U, g, length, G, project=False)[0], [[2, 0]])
    close(normed_gradients(U, length, length, G, project=False)[0], [[1, 0]])


def test_full_rank_with_sgd_is_weight_normalised_sgd() -> None:
    """Also where a step takes g through zero: its sign stays with the length."""
    p = parameter(4, 3)
    V = p.detach().clone().requires_grad_()
    g = p.detach().norm(dim=1, keepdim=True).requires_grad_()
    optimizer = WeightNormed([p], 0.1, projector=Svd(3), inner=SGD(), fallback=SGD())
    for step in range(6):
        G = draw(4, 3, seed=step) * (30 if step == 1 else 1)
        dV, dg = torch.autograd.grad((G * (g * V / V.norm(dim=1, keepdim=True))).sum(), (V, g))
        with torch.no_grad():
            V -= 0.1 * dV
            g -= 0.1 * dg
        moved(optimizer, p, G)
        close(p, g * V / V.norm(dim=1, keepdim=True), atol=1e-10)
    assert bool((g < 0).any())


def test_the_first_step_of_the_magnitude() -> None:
    """A gradient along the row turns nothing: g alone moves, by the rate."""
    p = nn.Parameter(tensor([[3.0, 4.0], [6.0, 8.0]]))
    optimizer = made(GradNormLoRP(rank=1, eps=1e-8), p, lr=0.5)
    moved(optimizer, p, tensor([[0.6, 0.8], [-6.0, -8.0]]))
    close(p, [[2.7, 3.6], [6.3, 8.4]], atol=1e-6)
    close(optimizer.state[p]["length"], [[5.0], [10.0]], atol=1e-5)


def test_as_the_authors_step() -> None:
    """The gradient of V is G, g begins at ‖V‖: with SGD, V ← V - ηG, W = (‖V_old‖ - η∇g) V/‖V‖."""
    p = nn.Parameter(tensor([[3.0, 4.0]]))
    optimizer = WeightNormed([p], 0.5, projector=Svd(1), inner=SGD(), fallback=SGD())
    optimizer.authors = True
    V = tensor([[3.0, 4.0]])
    for G in (tensor([[1.0, 0.0]]), tensor([[0.5, -1.0]])):
        length = V.norm()
        dg = (G * V).sum() / length
        V = V - 0.5 * G
        moved(optimizer, p, G)
        close(p, (length - 0.5 * dg) * V / V.norm())


def test_a_row_of_zeros_steps_as_galore_and_lives_on() -> None:
    W = draw(4, 3)
    W[2] = 0
    p = nn.Parameter(W)
    optimizer = made(GradNormLoRP(rank=3, scale=1.0), p, lr=0.1)
    for step in range(3):
        assert moved(optimizer, p, draw(4, 3, seed=step)).isfinite().all()
        assert p.detach()[2].norm() > 1e-2


def test_state_is_the_cards_formula() -> None:
    p = nn.Parameter(torch.zeros(40, 16))
    assert made(GradNormLoRP(rank=4), p).state_bytes() == made(GaLore(rank=4), p).state_bytes() + 4 * 3 * 40


@pytest.mark.parametrize("authors", [False, True])
def test_resumes_bit_for_bit(authors: bool, tmp_path: Any) -> None:
    resumed_bit_for_bit(GradNormLoRP(rank=2, every=3, authors=authors), tmp_path)
