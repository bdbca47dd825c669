"""Linear algebra of low-rank factors. Matrices may have leading batch dimensions (experts); float32 or float64 inside.

Signs: a singular pair (u, v) is fixed only up to a common sign. Everywhere here the entry of v that is largest in
magnitude is positive, so that the same matrix gives the same factors on any machine.
"""

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

OVERSAMPLE = 10  # extra directions of a randomised SVD: without them it is off by percents on flat spectra


def svd(M: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The exact thin SVD `M = U diag(S) Vh`: M (..., m, n) -> U (..., m, k), S (..., k) falling, Vh (..., k, n).

    k is min(m, n), or the `rank` leading components. Raises RankfoldError if M holds NaN or infinity.
    """
    U, S, Vh = torch.linalg.svd(wide(M), full_matrices=False)
    return _signed(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def randomised_svd(
    M: Tensor, rank: int, rng: torch.Generator, *, iterations: int = 4, oversample: int = OVERSAMPLE
) -> tuple[Tensor, Tensor, Tensor]:
    """About the `rank` leading components of M (..., m, n), as `svd` gives them, without decomposing M.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1: an orthonormal basis Q of M's range is
    found from `rank + oversample` random directions and `iterations` power iterations; then the small QᵀM is
    decomposed. Exact where rank + oversample reaches M's own rank. `rng` is a CPU generator.
    """
    M = wide(M)
    n = M.shape[-1]
    q = min(rank + oversample, *M.shape[-2:])
    directions = torch.randn(*M.shape[:-2], n, q, generator=rng).to(M)
    Q = orthonormalise(M @ directions)
    for _ in range(iterations):
        Q = orthonormalise(M @ orthonormalise(M.mT @ Q))
    V, S, Uh = torch.linalg.svd(M.mT @ Q, full_matrices=False)  # tall: two to three times as fast as wide
    return _signed(Q @ Uh[..., :rank, :].mT, S[..., :rank], V[..., :rank].mT)


def leading_svd(
    M: Tensor, rank: int, rng: torch.Generator, iterations: int | None = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading components of M, randomised with so many power iterations.

    Exact where `iterations` is None, where M is small and where nearly all of it is asked for.
    """
    if iterations is None or _not_worth_it(M, rank):
        return svd(M, rank)
    return randomised_svd(M, rank, rng, iterations=iterations)


def trailing_svd(M: Tensor, rank: int, rng: torch.Generator, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` last of the min(m, n) components of M, as `leading_svd` gives the first.

    They are the leading ones of M's inverse: the power iterations run on R⁻¹R⁻ᵀ, with `RᵀR = MᵀM + δ² I` and R from
    one QR decomposition. δ, a rounding error of M, is for a singular M, and leaves the components what they are. For
    a wide M its transpose is taken. Whatever Vh was found, `U diag(S) Vh` is all of M that is in its span.
    """
    if iterations is None or _not_worth_it(M, rank):
        U, S, Vh = svd(M)
        return U[..., -rank:], S[..., -rank:], Vh[..., -rank:, :]
    if M.shape[-2] < M.shape[-1]:
        V, S, Uh = trailing_svd(M.mT, rank, rng, iterations)
        return _signed(Uh.mT, S, V.mT)
    M = wide(M)
    n = M.shape[-1]
    delta = torch.finfo(M.dtype).eps * torch.linalg.matrix_norm(M)
    delta = torch.where(delta > 0, delta, 1)[..., None, None]
    R = torch.linalg.qr(torch.cat([M, delta * torch.eye(n).to(M).expand(*M.shape[:-2], n, n)], -2), mode="r")[1]
    V = torch.randn(*M.shape[:-2], n, rank + OVERSAMPLE, generator=rng).to(M)
    for _ in range(iterations + 1):
        V = orthonormalise(torch.linalg.solve_triangular(R.mT, V, upper=False))
        V = orthonormalise(torch.linalg.solve_triangular(R, V, upper=True))
    U, S, Wh = torch.linalg.svd(M @ V, full_matrices=False)
    return _signed(U[..., -rank:], S[..., -rank:], Wh[..., -rank:, :] @ V.mT)


def _not_worth_it(M: Tensor, rank: int) -> bool:
    return min(M.shape[-2:]) <= 4 * (rank + OVERSAMPLE)


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of `B A` from B (..., m, r) and A (..., r, n): U (..., m, k), S (..., k), Vh (..., k, n).

    k = min(m, r, n). With `B = Q_B R_B` and `Aᵀ = Q_A R_A` only the small `R_B R_Aᵀ` is decomposed; B A is not formed.
    """
    B, A = wide(B), wide(A)
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    return _signed(QB @ U, S, Vh @ QA.mT)


def spaces(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), S (rank,) and Vh (rank, in) of one product B A, without what is rounding."""
    U, S, Vh = svd_of_product(B, A)
    noise = S.amax() * max(U.shape[0], Vh.shape[1]) * torch.finfo(S.dtype).eps if len(S) else 0
    rank = int((noise < S).sum())
    return U[:, :rank], S[:rank], Vh[:rank]


def truncate(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of `B A` of that rank: `B' (..., m, rank)`, `A' (..., rank, n)`, and its relative error.

    B' and A' carry √σ each. The error (...) is `‖B A − B'A'‖ / ‖B A‖` (Frobenius), 0 for a product that is zero.
    """
    U, S, Vh = svd_of_product(B, A)
    if not 1 <= rank <= S.shape[-1]:
        raise RankfoldError(f"cannot cut a product of rank at most {S.shape[-1]} to rank {rank}")
    root = S[..., :rank].sqrt()
    whole = torch.linalg.vector_norm(S, dim=-1)
    error = torch.linalg.vector_norm(S[..., rank:], dim=-1) / torch.where(whole > 0, whole, 1)
    return U[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh[..., :rank, :], error


def orthonormalise(X: Tensor) -> Tensor:
    """Orthonormal columns that span X's: the Q (..., m, k) of X (..., m, n) = Q R with diag R ≥ 0, k = min(m, n)."""
    Q, R = torch.linalg.qr(wide(X))
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q).unsqueeze(-2)


def wide(M: Tensor) -> Tensor:
    """M in float64 if it is, else in float32. Raises RankfoldError if it holds NaN or infinity."""
    # A sum is finite only if every term is, and much cheaper; one that overflows is looked at again.
    if not bool(M.sum().isfinite()) and not bool(torch.isfinite(M).all()):
        raise RankfoldError(f"a matrix of shape {tuple(M.shape)} holds NaN or infinity and cannot be decomposed")
    return M if M.dtype == torch.float64 else M.float()


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vh)
    return U * sign.mT, S, Vh * sign
