from typing import Any

import pytest
import torch
from torch import nn

from rankfold import GaLore, NaturalGaLore
from rankfold.optim import Natural
from tests.methods.optim.stepping import made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import DOUBLE, close, draw


def preconditioned(rule: Natural, *gradients: Any) -> torch.Tensor:
    """g̃ of the last of these."""
    rows = [torch.as_tensor(g, dtype=DOUBLE).reshape(1, -1) for g in gradients]
    state = rule.start(rows[0], tuple(rows[0].shape), DOUBLE)
    for row in rows:
        out = rule.natural(row, state)
    return out


def test_the_cards_numbers() -> None:
    close(preconditioned(Natural(), (1, 2)), [[0.19996, 0.39992]], atol=1e-6)
    close(preconditioned(Natural(), (1, 0), (0, 2)), [[0, 0.499875]], atol=1e-6)
    close(preconditioned(Natural(), (1, 0), (0, 2), (0, 2)), [[0, 0.25]], atol=1e-3)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_it_is_the_dense_solution_over_the_last_few(count: int) -> None:
    gradients = [draw(6, seed=i) for i in range(count)]
    H = torch.stack(gradients[-5:], dim=1)
    expected = torch.linalg.solve(1e-3 * torch.eye(6, dtype=DOUBLE) + H @ H.T, gradients[-1])
    close(preconditioned(Natural(history=5), *gradients)[0], expected, atol=1e-10)


def test_float32_is_as_good_with_large_gradients() -> None:
    """Woodbury's difference would lose it all: ‖g‖²/λ is beyond what float32 resolves."""
    rule = Natural()
    g = 300 * draw(1, 50, dtype=torch.float32)
    state = rule.start(g, (1, 50), torch.float32)
    torch.testing.assert_close(rule.natural(g, state), g / g.square().sum(), rtol=1e-5, atol=0)


def test_a_large_damping_is_galore() -> None:
    p, q = parameter(5, 3), parameter(5, 3)
    ours = made(NaturalGaLore(rank=2, damping=1e9, eps=1e-20), p)
    theirs = made(GaLore(rank=2, eps=1e-20), q)
    for step in range(4):
        G = draw(5, 3, seed=step)
        close(moved(ours, p, G), moved(theirs, q, G), atol=1e-6)


def test_the_history_is_dropped_with_the_subspace() -> None:
    p = parameter(5, 3)
    optimizer = made(NaturalGaLore(rank=2, every=3, spread=False, history=2), p)
    seen = []
    for step in range(5):
        moved(optimizer, p, draw(5, 3, seed=step))
        seen.append(optimizer.state[p]["seen"])
    assert seen == [1, 2, 3, 1, 2]


def test_state_is_the_cards_formula() -> None:
    p = nn.Parameter(torch.zeros(40, 16))
    galore = 2 * 4 * 40 + 4 * 16
    assert made(NaturalGaLore(rank=4, history=6), p).state_bytes() == 4 * (galore + 6 * 4 * 40)


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    resumed_bit_for_bit(NaturalGaLore(rank=2, every=4, history=3), tmp_path)


def test_a_zero_gradient() -> None:
    p = parameter(5, 3)
    assert not moved(made(NaturalGaLore(rank=2), p), p, torch.zeros(5, 3, dtype=DOUBLE)).any()
