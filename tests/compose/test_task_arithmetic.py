"""Task arithmetic: the weighted sum, exact as products and with cross terms as factors."""

import pytest
import torch

import rankfold
from rankfold import SVDMerge, TaskArithmetic
from rankfold.compose._merge import Pair
from tests.methods.support import close, draw

FIRST = torch.tensor([[1.0], [0]]).double(), torch.tensor([[1.0, 0]]).double()
SECOND = torch.tensor([[0.0], [1]]).double(), torch.tensor([[0.0, 1]]).double()


def merged(pairs: list[Pair], weights: list[float], space: str = "delta") -> torch.Tensor:
    rule = TaskArithmetic(space=space)  # type: ignore[arg-type]
    B, A, cut = rule.combine(pairs, weights, None, torch.Generator())
    assert cut == 0
    return B @ A


def test_worked_numbers() -> None:
    """A_1 = [1, 0], B_1 = [1, 0]ᵀ, A_2 = [0, 1], B_2 = [0, 1]ᵀ, w = ½: diag(½, ½), and as factors all ½."""
    close(merged([FIRST, SECOND], [0.5, 0.5]), [[0.5, 0], [0, 0.5]])
    close(merged([FIRST, SECOND], [0.5, 0.5], "factors"), [[0.5, 0.5], [0.5, 0.5]])


def test_one_adapter_is_itself() -> None:
    pair = draw(5, 3, seed=1), draw(3, 6, seed=2)
    for space in ("delta", "factors"):
        close(merged([pair], [1.0], space), pair[0] @ pair[1])
        close(merged([pair], [-0.5], space), -0.5 * pair[0] @ pair[1])  # the sign goes to A only


def test_the_sum_is_exact_whatever_the_ranks() -> None:
    pairs = [(draw(9, r, seed=2 * r), draw(r, 8, seed=2 * r + 1)) for r in (1, 2, 4)]
    weights = [0.7, -1.5, 0.2]
    expected = sum(w * B @ A for w, (B, A) in zip(weights, pairs, strict=True))
    close(merged(pairs, weights), expected)
    B, A, _ = TaskArithmetic().combine(pairs, weights, None, torch.Generator())
    assert (B.shape, A.shape) == ((9, 7), (7, 8))


def test_factors_have_cross_terms() -> None:
    """Σ_ij √(w_i w_j) B_i A_j."""
    pairs = [(draw(5, 2, seed=i), draw(2, 4, seed=10 + i)) for i in range(2)]
    w = [0.3, 0.8]
    cross = [(w[i] * w[j]) ** 0.5 * pairs[i][0] @ pairs[j][1] for i in range(2) for j in range(2)]
    close(merged(pairs, w, "factors"), sum(cross[1:], cross[0]))


def test_what_factors_cannot_do() -> None:
    pairs = [(draw(5, r), draw(r, 4)) for r in (2, 3)]
    with pytest.raises(rankfold.RankfoldError, match=r"mixes equal ranks and keeps them; here are \[2, 3\]"):
        merged(pairs, [1, 1], "factors")
    with pytest.raises(rankfold.RankfoldError, match="svd-merge cuts to a rank"):
        TaskArithmetic().combine(pairs, [1, 1], 2, torch.Generator())
    nothing = torch.zeros(5, 0).double(), torch.zeros(0, 4).double()
    close(merged([pairs[0], nothing], [1, 1], "factors"), pairs[0][0] @ pairs[0][1])  # no adapter there is zeros


def test_svd_cuts_the_sum_to_the_best_of_a_rank() -> None:
    """Lossless from Σ r_i on, error² = Σ_{i>t} σ_i² below, whatever the order of the adapters."""
    pairs = [(draw(9, r, seed=r), draw(r, 8, seed=10 + r)) for r in (2, 3)]
    weights = [0.4, 1.1]
    M = sum(w * B @ A for w, (B, A) in zip(weights, pairs, strict=True))
    U, S, Vh = torch.linalg.svd(M)  # type: ignore[arg-type]
    for rank, t in ((1, 1), (None, 3), (4, 4), (5, 5), (50, 8)):
        B, A, cut = SVDMerge().combine(pairs, weights, rank, torch.Generator())
        close(B @ A, U[:, :t] * S[:t] @ Vh[:t], atol=1e-10)
        assert A.shape[0] == min(t, 5) if rank != 50 else 5
        assert cut**2 * float(S.square().sum()) == pytest.approx(float(S[t:].square().sum()), abs=1e-12)
        close(B.norm(dim=0), A.norm(dim=1))
        other = SVDMerge().combine(pairs[::-1], weights[::-1], rank, torch.Generator())
        close(other[0] @ other[1], B @ A, atol=1e-10)
    B, A, cut = SVDMerge().combine(pairs[:1], [1.0], None, torch.Generator())
    close(B @ A, pairs[0][0] @ pairs[0][1], atol=1e-12)
    assert cut < 1e-7
