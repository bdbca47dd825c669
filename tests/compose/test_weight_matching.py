"""Weight matching: hidden units are found again, whatever their order."""

import pytest
import torch
from torch import Tensor

from rankfold import WeightMatching
from rankfold.compose.weight_matching import (
    Layer,
    aligned,
    alignment,
    barrier,
    between,
    match,
    match_by_loss,
    match_units,
    objective,
    permute,
)
from rankfold.core.linalg import svd
from tests.methods.support import close, draw

SIZES = [5, 9, 7, 3]


def network(seed: int, bias: bool = True) -> list[Layer]:
    shapes = list(zip(SIZES[1:], SIZES, strict=False))
    return [
        (draw(n, m, seed=seed + i), draw(n, seed=seed + 50 + i) if bias else None) for i, (n, m) in enumerate(shapes)
    ]


def shuffled(layers: list[Layer], seed: int) -> tuple[list[Layer], list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    P = [torch.arange(SIZES[0]), *(torch.randperm(n, generator=rng) for n in SIZES[1:-1]), torch.arange(SIZES[-1])]
    return permute(layers, P), P


def forward(layers: list[Layer], x: Tensor) -> Tensor:
    for W, b in layers[:-1]:
        x = torch.relu(x @ W.mT + (0 if b is None else b))
    W, b = layers[-1]
    return x @ W.mT + (0 if b is None else b)


def loss(layers: list[Layer]) -> Tensor:
    """The squared distance from what network(1) computes."""
    x = draw(20, SIZES[0], seed=7)
    return (forward(layers, x) - forward(network(1, layers[0][1] is not None), x)).square().mean()


def distance(a: list[Layer], b: list[Layer]) -> float:
    """The squared distance of the weights and biases."""
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True) if x is not None]
    return float(sum((x - y).square().sum() for x, y in pairs))


def test_worked_numbers() -> None:
    """W1 = diag(1, 2), W2 = (3, 1), b with its two units swapped: C = [[3, 10], [5, 3]], so (1, 0)."""
    a = [(torch.diag(torch.tensor([1.0, 2])), None), (torch.tensor([[3.0, 1]]), None)]
    b = [(torch.tensor([[0.0, 2], [1, 0]]), None), (torch.tensor([[1.0, 3]]), None)]
    P = match(a, b)
    assert [p.tolist() for p in P] == [[0, 1], [1, 0], [0]]
    before = objective(a, b)
    assert (before, objective(a, permute(b, P))) == (6, 15)  # ⟨C, I⟩ = 3 + 3 and ⟨C, P⟩ = 10 + 5
    same = torch.ones(2, 2)  # here only the biases tell the units apart
    told = [[(same, torch.tensor(bias)), (same, None)] for bias in ([1.0, 2.0], [2.0, 1.0])]
    assert match(*told)[1].tolist() == [1, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_permuted_copy_is_found_again(bias: bool) -> None:
    a = network(1, bias)
    b, _ = shuffled(a, 3)
    assert distance(a, b) > 1
    assert barrier(loss, a, b) > 0.1
    again = permute(b, match(a, b))
    assert distance(a, again) == 0
    assert barrier(loss, a, again) == pytest.approx(0, abs=1e-12)
    assert alignment(a, again) == pytest.approx(1)
    assert alignment(a, b) < 0.8


def test_the_function_stays_and_so_do_the_singular_values() -> None:
    a = network(1)
    b, P = shuffled(a, 5)
    x = draw(11, SIZES[0], seed=2)
    close(forward(b, x), forward(a, x), atol=1e-12)
    for (W, _), (V, _) in zip(a, b, strict=True):
        close(torch.linalg.svdvals(W), torch.linalg.svdvals(V))
    inverse = [p.argsort() for p in P]
    assert distance(a, permute(b, inverse)) == 0


def test_the_objective_in_singular_vectors() -> None:
    """`⟨W, P V Qᵀ⟩ = Σ_ij σ_i τ_j (u_iᵀ P x_j)(v_iᵀ Q y_j)`."""
    a, b = network(1, bias=False), network(20, bias=False)
    moved, P = shuffled(b, 4)
    total = 0.0
    for (W, _), (V, _), after, before in zip(a, b, P[1:], P, strict=False):
        (U, S, Vh), (X, T, Yh) = svd(W), svd(V)
        agreement = (U.mT @ X[after]) * (Vh @ Yh[:, before].mT)
        total += float((S[:, None] * T * agreement).sum())
    assert total == pytest.approx(objective(a, moved), abs=1e-9)


def test_every_sweep_is_a_step_up() -> None:
    a, b = network(1), network(20)
    heights = [objective(a, permute(b, match(a, b, sweeps=n, seed=2))) for n in range(6)]
    assert heights[0] == pytest.approx(objective(a, b))
    assert heights == sorted(heights)
    assert heights[1] > heights[0]
    assert heights[-1] == pytest.approx(objective(a, permute(b, match(a, b, seed=2))))
    nearer = distance(a, b) - distance(a, permute(b, match(a, b, seed=2)))
    assert nearer == pytest.approx(2 * (heights[-1] - heights[0]))


def test_barrier() -> None:
    """L(θ) = θ² has none below its chord; −θ² on [-1, 1] rises by 1 in the middle."""
    a, b = [(torch.tensor([[-1.0]]), None)], [(torch.tensor([[1.0]]), None)]
    assert barrier(lambda layers: layers[0][0].square().sum(), a, b) == 0
    assert barrier(lambda layers: -layers[0][0].square().sum(), a, b) == pytest.approx(1)
    assert barrier(lambda layers: layers[0][0].sum(), a, b) == pytest.approx(0, abs=1e-6)
    close(between(a, b, 0.25)[0][0], [[-0.5]])


def test_alignment() -> None:
    """The whole of it, the leading components only, layers that share nothing, and a sign."""
    W = torch.diag(torch.tensor([10.0, 9, 1]).double())
    V = torch.diag(torch.tensor([10.0, 0, 8]).double())
    assert aligned(svd(W), svd(W), 0.3) == (2, 2)
    assert aligned(svd(W), svd(V), 0.3) == (1, 2)  # of e₁, e₂ and of e₁, e₃
    assert aligned(svd(W), svd(V), 0)[0] == pytest.approx(3)
    assert alignment([(W, None)], [(-W, None)]) == pytest.approx(-1)
    assert alignment([(W, None)], [(5 * W, None)]) == pytest.approx(1)


def test_straight_through() -> None:
    """It lowers the loss of the midpoint, and finds a permutation of a copy at once."""
    a = network(1)
    b, _ = shuffled(a, 3)
    assert distance(a, permute(b, match_by_loss(a, b, loss, steps=2))) == 0
    other = network(20)
    P = match_by_loss(a, other, loss, steps=15, lr=0.05)
    middle = [float(loss(between(a, permute(other, p), 0.5))) for p in (P, match(a, other, seed=0))]
    assert middle[0] < middle[1]
    assert a[0][0].grad is None


def merged(pairs: list[tuple[Tensor, Tensor]], weights: list[float], rank: int | None = None) -> Tensor:
    B, A, _ = WeightMatching().combine(pairs, weights, rank, torch.Generator())
    return B @ A


def test_units_of_a_lora_are_found_again() -> None:
    """In another order, of other signs and with the norm elsewhere it is the same LoRA, and so is the average."""
    B, A = draw(6, 4, seed=1), draw(4, 7, seed=2)
    p, c = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -2, 0.5, -1])
    other = (B[:, p] * c, A[p] / c[:, None])
    close(other[0] @ other[1], B @ A)
    close(merged([(B, A), other], [0.5, 0.5]), B @ A)
    close(merged([other, (B, A), other], [0.2, 0.3, 0.5]), B @ A)
    plain = (B + other[0]) @ (A + other[1]) / 4
    assert float((plain - B @ A).norm() / (B @ A).norm()) > 0.5
    D, C = match_units((B, A), (B[:, p] * c.sign(), A[p] * c.sign()[:, None]))
    close(D, B)
    close(C, A)
    experts = [torch.stack([part, 2 * part]) for part in (B, A, *other)]
    close(merged([tuple(experts[:2]), tuple(experts[2:])], [0.5, 0.5]), torch.stack([B @ A, 4 * (B @ A)]))


def test_ranks_may_differ() -> None:
    """A LoRA of fewer units is matched to as many of the other's; the rank asked for is kept to."""
    B, A = draw(6, 4, seed=1), draw(4, 7, seed=2)
    kept = [3, 1]
    close(merged([(B[:, kept], A[kept]), (B, A)], [1.0, 0]), B[:, kept] @ A[kept])
    both = merged([(B[:, kept], A[kept]), (B, A)], [0.5, 0.5])
    rest = [0, 2]
    close(both, B[:, kept] @ A[kept] + B[:, rest] @ A[rest] / 4)
    close(merged([(B[:, :0], A[:0]), (B, A)], [0.5, 0.5]), B @ A / 4)
    cut = merged([(B, A), (B, A)], [0.5, 0.5], rank=1)
    U, S, Vh = svd(B @ A)
    close(cut, S[0] * torch.outer(U[:, 0], Vh[0]))
