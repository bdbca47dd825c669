import itertools
from typing import Any

import torch
from torch import nn

from rankfold import Fira, GaLore
from rankfold.optim._rules import AdamW, ratios
from tests.methods.optim.stepping import TALL, made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import DOUBLE, close, draw


def test_full_rank_is_galore() -> None:
    p, q = parameter(5, 3), parameter(5, 3)
    ours, theirs = made(Fira(rank=3, scale=1.0), p), made(GaLore(rank=3, scale=1.0), q)
    for step in range(3):
        G = draw(5, 3, seed=step)
        close(moved(ours, p, G), moved(theirs, q, G))


def test_a_row_without_gradient_in_the_subspace_gets_no_residual() -> None:
    p, q = parameter(3, 2), parameter(3, 2)
    close(moved(made(Fira(rank=1, scale=1.0), p), p, TALL), moved(made(GaLore(rank=1, scale=1.0), q), q, TALL))


def test_the_cards_scales() -> None:
    R = TALL[:, :1]
    N, _ = AdamW().direction(R, AdamW().start(R, (3, 1), DOUBLE), 1)
    close(ratios(N, R, along=1), [[1.0541], [0], [0]], atol=1e-4)
    close(ratios(N, R, along=0), [[1.0541]], atol=1e-4)


def test_the_scale_of_a_row_by_hand() -> None:
    """R has one number a row, so φ = |N| / |R|; the second row has none."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=DOUBLE))
    G = torch.tensor([[3.0, 0.4], [0.0, 0.0]], dtype=DOUBLE)
    scale, factor = 0.25, 0.001**0.5 / 0.1
    for removes, inside in (("authors", scale), ("paper", 1.0)):
        optimizer = made(Fira(rank=1, scale=scale, removes=removes), p)
        P = torch.linalg.svd(G)[2][:1]
        R = float((G @ P.T)[0])
        N = 0.1 * R / (0.001**0.5 * abs(R) + 1e-6)
        phi = abs(N) / (abs(R) + 1e-8)
        expected = -factor * (scale * N * P[0] + phi * (G[0] - inside * R * P[0]))
        close(moved(optimizer, p, G)[0], expected)


def test_the_residual_grows_by_the_limit_at_most() -> None:
    p = parameter(6, 4)
    optimizer = made(Fira(rank=1, every=100), p)
    norms = []
    for step in range(12):
        moved(optimizer, p, draw(6, 4, seed=step) * (1 + step) ** 2)
        norms.append(float(optimizer.state[p]["norm"]))
    growth = [b / a for a, b in itertools.pairwise(norms)]
    assert max(growth) <= 1.01 + 1e-9
    assert max(growth) > 1.0099  # and the limit is met


def test_a_zero_gradient_does_not_shut_the_residual_off() -> None:
    p = parameter(6, 4)
    optimizer = made(Fira(rank=1, every=1), p)
    moved(optimizer, p, draw(6, 4))
    moved(optimizer, p, torch.zeros(6, 4, dtype=DOUBLE))
    moved(optimizer, p, draw(6, 4, seed=1))
    assert optimizer.state[p]["norm"] > 1e-3


def test_a_step_has_full_rank() -> None:
    p = parameter(6, 4)
    step = moved(made(Fira(rank=1), p), p, draw(6, 4))
    assert torch.linalg.matrix_rank(step) == 4


def test_state_is_galores_and_one_number() -> None:
    p = nn.Parameter(torch.zeros(40, 16))
    assert made(Fira(rank=4), p).state_bytes() == made(GaLore(rank=4), p).state_bytes() + 4


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    resumed_bit_for_bit(Fira(rank=2, every=3), tmp_path)
