"""DARE: entries dropped at random, the rest rescaled, and then a sum or TIES."""

import pytest
import torch
from torch import Tensor

from rankfold import DARE
from rankfold.compose.dare import dropped
from rankfold.compose.ties import agreeing_mean
from tests.methods.support import close, draw


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mean_variance_and_number_kept() -> None:
    """E[τ̃] = τ and Var = τ² p/(1 − p) over 2000 masks; the number kept is binomial."""
    tau, p, n = draw(4, 5), 0.7, 2000
    generator = rng()
    drawn = torch.stack([dropped(tau, p, generator) for _ in range(n)])
    variance = tau.square() * p / (1 - p)
    assert bool(((drawn.mean(0) - tau).abs() < 4 * (variance / n).sqrt()).all())
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0)
    kept = drawn.ne(0).sum((1, 2)).double()  # of 20 entries
    assert abs(float(kept.mean()) - 20 * (1 - p)) < 4 * (20 * p * (1 - p) / n) ** 0.5
    assert float(kept.var()) == pytest.approx(20 * p * (1 - p), rel=0.15)


def test_without_dropping_it_is_the_identity() -> None:
    tau = draw(4, 5)
    close(dropped(tau, 0.0, rng()), tau)
    assert set((dropped(tau, 0.5, rng(), rescale=False) / tau).unique().tolist()) == {0.0, 1.0}
    assert set((dropped(tau, 0.5, rng()) / tau).unique().tolist()) == {0.0, 2.0}


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(draw(6, 2, seed=i), draw(2, 7, seed=10 + i)) for i in range(3)]


def merged(rule: DARE, weights: list[float], seed: int = 0, rank: int | None = 6) -> Tensor:
    B, A, _ = rule.combine(pairs(), weights, rank, rng(seed))
    return B @ A


def test_a_seed_gives_the_same_again() -> None:
    w = [0.5, 0.3, 0.2]
    assert torch.equal(merged(DARE(), w, 1), merged(DARE(), w, 1))
    assert not torch.equal(merged(DARE(), w, 1), merged(DARE(), w, 2))


def test_dropped_then_summed_or_merged_by_ties() -> None:
    """Each adapter has a mask of its own, in turn."""
    w, generator = [0.5, 0.3, 0.2], rng(3)
    kept = [dropped(B @ A, 0.6, generator) for B, A in pairs()]
    close(merged(DARE(drop=0.6), w, 3), sum(x * tau for x, tau in zip(w, kept, strict=True)))
    expected = agreeing_mean([3 * x * tau for x, tau in zip(w, kept, strict=True)])
    close(merged(DARE(drop=0.6, rule="ties"), w, 3), expected)
    assert not torch.equal(kept[0].ne(0), kept[1].ne(0))


def test_nothing_dropped_is_the_plain_sum() -> None:
    w = [0.5, -0.3, 0.2]
    close(merged(DARE(drop=0), w), sum(x * B @ A for x, (B, A) in zip(w, pairs(), strict=True)))


def test_factors_are_dropped_apart() -> None:
    w, generator = [0.5, 0.3, 0.2], rng(4)
    A = sum(x**0.5 * dropped(A, 0.5, generator) for x, (_, A) in zip(w, pairs(), strict=True))
    B = sum(x**0.5 * dropped(B, 0.5, generator) for x, (B, _) in zip(w, pairs(), strict=True))
    close(merged(DARE(drop=0.5, space="factors"), w, 4, None), B @ A)
