from typing import Any

import pytest
import torch
from torch import nn

from rankfold import Frugal
from rankfold.errors import RankfoldError
from rankfold.optim import AdamW as Adam
from rankfold.optim import Columns, Signed, Subspace, Svd
from tests.methods.optim.stepping import made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import DOUBLE, close, draw

G = torch.tensor([[0.4, -2.0], [0.1, 3.0]], dtype=DOUBLE)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", ["columns", "rows"])
def test_the_step_after_a_reset_moves_every_entry_by_the_rate(part: Any, density: float) -> None:
    p = parameter(2, 2)
    step = moved(made(Frugal(density=density, part=part), p, lr=0.1), p, G)
    close(step, [[-0.1, 0.1], [-0.1, -0.1]], atol=1e-7)


def test_density_one_is_adamw_and_zero_is_sign_descent() -> None:
    p, q, s = (parameter(4, 3) for _ in range(3))
    ours = made(Frugal(density=1.0), p, lr=0.1, decay=0.2)
    adamw = torch.optim.AdamW([q], lr=0.1, weight_decay=0.2)
    signs = made(Frugal(density=0.0, scale=0.5, sign_scale=0.5), s, lr=0.1)
    for step in range(4):
        grad = draw(4, 3, seed=step)
        close(moved(ours, p, grad), moved(adamw, q, grad))
        close(moved(signs, s, grad), -0.025 * grad.sign())


def test_columns_are_disjoint_from_the_rest() -> None:
    p = parameter(4, 6)
    optimizer = made(Frugal(density=0.5, sign_scale=0.0), p)
    step = moved(optimizer, p, draw(4, 6))
    kept = optimizer.state[p]["right"].tolist()
    assert len(set(kept)) == 3
    assert sorted(step.any(0).nonzero().flatten().tolist()) == sorted(kept)


def test_a_new_part_begins_again() -> None:
    p = parameter(4, 6)
    optimizer = made(Frugal(density=0.5, every=3), p, lr=0.1)
    steps = [moved(optimizer, p, draw(4, 6, seed=i)) for i in range(4)]
    close(steps[3], -0.1 * draw(4, 6, seed=3).sign(), atol=1e-6)
    assert optimizer.state[p]["t"] == 1
    assert (steps[2] + 0.1 * draw(4, 6, seed=2).sign()).abs().max() > 1e-2


def test_parts_change_and_differ_between_matrices() -> None:
    params = [parameter(3, 40) for _ in range(2)]
    optimizer = made(Frugal(every=1), *params)
    seen = set()
    for _ in range(2):
        for p in params:
            p.grad = draw(3, 40)
        optimizer.step()
        seen |= {tuple(optimizer.state[p]["right"].tolist()) for p in params}
    assert len(seen) == 4


@pytest.mark.parametrize("part", ["svd", "random"])
def test_without_signs_the_step_stays_in_the_subspace(part: Any) -> None:
    p = parameter(6, 4)
    step = moved(made(Frugal(density=0.5, part=part, sign_scale=0.0), p), p, draw(6, 4))
    assert torch.linalg.matrix_rank(step, atol=1e-9) == 2


def test_state_is_the_cards_formula() -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    assert made(Frugal(density=0.25), p).state_bytes() == 4 * 2 * 64 * 8 + 4 * 8


def test_one_composes_ones_own() -> None:
    p = parameter(5, 3)
    optimizer = Subspace([p], 0.1, projector=Svd(1), inner=Adam(), residual=Signed(0.1))
    step = moved(optimizer, p, draw(5, 3))
    assert torch.linalg.matrix_rank(step) == 3


def test_density_is_a_share() -> None:
    with pytest.raises(RankfoldError, match="density"):
        Columns(density=1.5)


@pytest.mark.parametrize("part", ["columns", "rows", "svd", "random"])
def test_resumes_bit_for_bit(part: Any, tmp_path: Any) -> None:
    resumed_bit_for_bit(Frugal(density=0.5, every=3, part=part), tmp_path)
