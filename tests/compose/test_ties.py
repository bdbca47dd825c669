"""TIES: trimmed over all layers, one sign elected, and those that agree averaged."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from rankfold import TIES
from rankfold.compose._merge import Pair
from rankfold.compose.ties import agreeing_mean, thresholds
from tests.methods.support import close, draw

RNG = torch.Generator()


def vectors(*rows: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_worked_numbers() -> None:
    """τ_1 = (1, −2, 3), τ_2 = (−2, −1, 2): γ = (−, −, +), m = (−2, −1.5, 2.5)."""
    one, two = vectors([1, -2, 3], [-2, -1, 2])
    close(agreeing_mean([one, two]), [-2, -1.5, 2.5])
    close(agreeing_mean([two, one]), [-2, -1.5, 2.5])


def test_one_task_equal_tasks_and_what_cancels() -> None:
    tau = draw(7, 5)
    close(agreeing_mean([tau]), tau)
    close(agreeing_mean([tau, tau, tau]), tau)  # and not three times that
    close(agreeing_mean(vectors([1, 2, 3], [-1, 2, 3])), [1, 2, 3])  # 1 and −1: the sign of most entries
    close(agreeing_mean(vectors([1, -2, -3], [-1, -2, -3])), [-1, -2, -3])
    close(agreeing_mean(vectors([4, 0], [2, 0], [0, 0])), [3, 0])  # zeros are not counted


def layers(*whole: Tensor, cuts: Sequence[int]) -> Iterator[list[list[Tensor]]]:
    for parts in zip(*(tau.split(list(cuts)) for tau in whole), strict=True):
        yield [[part] for part in parts]


@pytest.mark.parametrize("density", [0.2, 0.37, 0.999, 1.0, 1e-9])
def test_the_threshold_is_the_largest_of_the_whole_vector(density: float) -> None:
    """Exactly, whatever the layers: in spite of sizes from 1e-30 to 1e30, of zeros and of equal values."""
    a = draw(997, seed=1).float() * torch.logspace(-30, 30, 997)
    b = torch.cat([torch.zeros(500), torch.full((300,), 0.5), draw(197, seed=2).float()])
    found = thresholds(lambda: layers(a, b, cuts=[400, 97, 500]), 2, density)
    k = max(1, int(density * 997))
    assert found == [float(tau.abs().sort(descending=True).values[k - 1]) for tau in (a, b)]


def pairs_of(*deltas: Tensor) -> list[Pair]:
    return [(delta, torch.eye(delta.shape[1]).double()) for delta in deltas]


def merged(rule: TIES, layers: Sequence[Sequence[Pair]], weights: list[float], rank: int | None = None) -> list[Tensor]:
    seen = rule.survey(lambda: iter(layers), weights)
    products = (rule.combine(pairs, weights, rank, RNG, seen) for pairs in layers)
    return [B @ A for B, A, _ in products]


def test_trimmed_over_all_layers_together() -> None:
    """d = 12 + 8, K = 0.25: the five largest of all, which a layer at a time would not have chosen."""
    first, second = draw(4, 3, seed=1), 10 * draw(2, 4, seed=2)
    both = torch.cat([first.flatten(), second.flatten()]).abs()
    least = both.sort(descending=True).values[4]
    ours = merged(TIES(density=0.25), [pairs_of(first), pairs_of(second)], [1.0])
    for made, delta in zip(ours, (first, second), strict=True):
        close(made, delta * (delta.abs() >= least), atol=1e-6)
    assert sum(int(made.abs().gt(1e-6).sum()) for made in ours) == 5


def test_weights_and_scale() -> None:
    """By default the paper's mean; w_i multiplies N times over, and λ the whole."""
    a, b = draw(6, 6, seed=1), draw(6, 6, seed=2)
    layer = [pairs_of(a, b)]
    close(merged(TIES(density=1), layer, [0.5, 0.5])[0], agreeing_mean([a, b]))
    close(merged(TIES(density=1, scale=1.5), layer, [0.1, 0.3])[0], 1.5 * agreeing_mean([0.2 * a, 0.6 * b]))
    close(merged(TIES(density=1), [pairs_of(b, a)], [0.5, 0.5])[0], agreeing_mean([a, b]))
    assert TIES().weights(2) == [0.5, 0.5]


def test_a_layer_that_an_adapter_leaves_alone() -> None:
    """It has no entry there, neither among the K d nor in the mean."""
    a, b = draw(4, 4, seed=1), draw(4, 4, seed=2)
    nothing = torch.zeros(4, 0).double(), torch.zeros(0, 4).double()
    both, alone = pairs_of(a, b), [pairs_of(a)[0], nothing]
    rule = TIES(density=0.5)
    seen = rule.survey(lambda: iter([both, alone]), [0.5, 0.5])
    whole = torch.cat([a.flatten(), a.flatten()]).abs().sort(descending=True).values
    assert seen == pytest.approx([float(whole[15]), float(b.flatten().abs().sort(descending=True).values[7])])
    close(merged(rule, [both, alone], [0.5, 0.5])[1], a * (a.abs().float() >= seen[0]))


def test_cut_to_a_rank_tells_what_it_lost() -> None:
    """The rule's M is no product of low rank: what comes out is its best approximation."""
    pairs = [(draw(8, 2, seed=i), draw(2, 9, seed=10 + i)) for i in range(3)]
    rule = TIES(density=0.4)
    weights = rule.weights(3)
    seen = rule.survey(lambda: iter([pairs]), weights)
    M = agreeing_mean([(B @ A) * ((B @ A).abs().float() >= t) for (B, A), t in zip(pairs, seen, strict=True)])
    U, S, Vh = torch.linalg.svd(M)
    for rank, t in ((None, 2), (5, 5)):
        B, A, cut = rule.combine(pairs, weights, rank, RNG, seen)
        close(B @ A, U[:, :t] * S[:t] @ Vh[:t])
        assert cut == pytest.approx(float(S[t:].norm() / S.norm()))


def test_factors_are_trimmed_and_merged_apart() -> None:
    """One threshold over all entries of A and B; √(N w_i) on each."""
    pairs = [(draw(5, 2, seed=i), draw(2, 6, seed=10 + i)) for i in range(2)]
    rule = TIES(space="factors", density=0.5)
    weights = [0.4, 0.6]
    seen = rule.survey(lambda: iter([pairs]), weights)
    for (B, A), least in zip(pairs, seen, strict=True):
        assert least == pytest.approx(float(torch.cat([B.flatten(), A.flatten()]).abs().sort().values[-11]))

    def trimmed(which: int) -> Tensor:
        taus = [pair[which] * (pair[which].abs().float() >= t) for pair, t in zip(pairs, seen, strict=True)]
        return agreeing_mean([(2 * w) ** 0.5 * tau for w, tau in zip(weights, taus, strict=True)])

    B, A, cut = rule.combine(pairs, weights, None, RNG, seen)
    assert cut == 0
    close(B, trimmed(0))
    close(A, trimmed(1))


def test_of_conflicting_tasks_more_is_kept_than_by_averaging() -> None:
    """Four tasks, each with entries of its own, a third of all shared and in conflict, and small noise everywhere."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, 6, (40, 30), generator=generator)  # 0 to 3: whose entry it is; 4, 5: everybody's
    taus = []
    for task in range(4):
        sign = torch.randint(0, 2, own.shape, generator=generator, dtype=torch.float64) * 2 - 1
        taus.append(sign * ((own == task) | (own > 3)) + 0.05 * draw(*own.shape, seed=task))
    ties = merged(TIES(density=0.5), [pairs_of(*taus)], [0.25] * 4, rank=30)[0]
    average = torch.stack(taus).mean(0)

    def left(made: Tensor) -> float:
        """The mean share of what a task's own entries do that is still there."""
        shares = [(made * tau)[own == i].sum() / tau[own == i].square().sum() for i, tau in enumerate(taus)]
        return float(torch.stack(shares).mean())

    assert left(average) == pytest.approx(0.25, abs=0.02)
    assert left(ties) > 0.95
