import itertools
import math
from typing import Any

import torch
from torch import nn

from rankfold import Apollo
from rankfold.optim import Random
from tests.methods.optim.stepping import made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import close, draw


def test_one_scale_is_parallel_to_the_gradient() -> None:
    p = parameter(4, 3)
    G = draw(4, 3, seed=1)
    step = moved(made(Apollo(rank=1, tensor=True), p), p, G)
    close(step / G, (step / G)[0, 0].expand(4, 3))


def test_the_scale_of_the_step_is_a_root() -> None:
    p, q = parameter(4, 3), parameter(4, 3)
    G = draw(4, 3, seed=1)
    plain, mini = (Apollo(rank=1, tensor=True, scale=scale) for scale in (1.0, 128.0))
    close(moved(made(mini, q), q, G), math.sqrt(128) * moved(made(plain, p), p, G))


def test_the_first_step_by_hand() -> None:
    """A row of the tall matrix is scaled by ‖N_i‖/‖R_i‖, with N = 0.1 R / (√0.001 |R| + eps)."""
    for shape, along in (((4, 3), 1), ((3, 4), 0)):
        p = parameter(*shape)
        optimizer = made(Apollo(rank=2), p, lr=0.1)
        G = draw(*shape, seed=1)
        step = moved(optimizer, p, G)
        rng = torch.Generator().manual_seed(optimizer.state[p]["seed"])
        P = torch.randn(3, 2, generator=rng, dtype=G.dtype) / math.sqrt(2)
        R = G @ P if along == 1 else P.T @ G
        N = 0.1 * R / (math.sqrt(0.001) * R.abs() + 1e-6)
        phi = N.norm(dim=along, keepdim=True) / (R.norm(dim=along, keepdim=True) + 1e-8)
        close(step, -0.1 * math.sqrt(0.001) / 0.1 * phi * G)


def test_the_projection_is_drawn_anew_from_a_seed_and_not_orthonormal() -> None:
    p = parameter(6, 4)
    optimizer = made(Apollo(rank=2, every=2), p)
    seeds = []
    for step in range(5):
        moved(optimizer, p, draw(6, 4, seed=step))
        seeds.append(optimizer.state[p]["seed"])
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3] != seeds[4]
    like = torch.empty(400, 300)
    P = Random(100).frame({"seed": 5}, like).right
    assert P is not None
    assert abs(float(P.var()) * 100 - 1) < 0.03


def test_the_step_grows_by_the_limit_at_most() -> None:
    p = parameter(6, 4)
    optimizer = made(Apollo(rank=2), p)
    norms = []
    for step in range(6):
        moved(optimizer, p, draw(6, 4, seed=step) * 10**step)
        norms.append(float(optimizer.state[p]["norm"]))
    assert all(b <= 1.01 * (a + 1e-8) * (1 + 1e-12) for a, b in itertools.pairwise(norms))


def test_state_is_the_cards_formula() -> None:
    p = nn.Parameter(torch.zeros(40, 16))
    assert made(Apollo(rank=4), p).state_bytes() == 4 * (2 * 4 * 40 + 1)  # and the seed


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    resumed_bit_for_bit(Apollo(rank=2, every=3), tmp_path)
