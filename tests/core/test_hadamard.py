"""Rotations of any width."""

import pytest
import scipy.linalg
import torch

from rankfold.core.hadamard import matrix, rotate
from tests.methods.support import DOUBLE, close, draw


@pytest.mark.parametrize("n", [1, 2, 4, 32, 64, 256, 2048])
def test_powers_of_two_are_scipys(n: int) -> None:
    close(rotate(torch.eye(n, dtype=DOUBLE)), scipy.linalg.hadamard(n) / n**0.5)


@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 44, 576, 384, 1536])
def test_others_are_hadamard_matrices_too(n: int) -> None:
    """Every number is ±1/√n: 576 and 1536 are SmolLM2's widths, 384 MiniLM's."""
    H = rotate(torch.eye(n, dtype=DOUBLE))
    close(H.abs(), torch.full((n, n), n**-0.5, dtype=DOUBLE))
    close(H @ H.mT, torch.eye(n))
    close(rotate(H, back=True), torch.eye(n))


@pytest.mark.parametrize("n", [3, 7, 10, 22, 92])
def test_what_is_neither_turns_in_blocks(n: int) -> None:
    """92 = 4·23 is an order that Paley's two constructions do not give."""
    H = rotate(torch.eye(n, dtype=DOUBLE))
    block = n & -n
    close(H @ H.mT, torch.eye(n))
    inside = torch.block_diag(*[torch.ones(block, block)] * (n // block)).bool()
    assert (H[inside].abs() - block**-0.5).abs().max() < 1e-12
    assert not H[~inside].any()


def test_products_are_left_as_they_are() -> None:
    X, W = draw(5, 24), draw(7, 24, seed=1)
    close(rotate(X) @ rotate(W).mT, X @ W.mT)
    close(rotate(rotate(X), back=True), X)
    close(rotate(X[None, 0]).norm(), X[0].norm())


def test_orders_without_a_construction() -> None:
    with pytest.raises(ValueError, match="92"):
        matrix(92)
