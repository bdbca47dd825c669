"""Column feedback: what changing one column of a weight costs, the columns behind it make good (GPTQ, SparseGPT)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rankfold.errors import RankfoldError


def column_feedback(
    W: Tensor, H: Tensor, change: Callable[[int, Tensor], Tensor], *, damping: float = 0.01, block: int = 128
) -> Tensor:
    """Ŵ (out, in) with `change`d columns and a small `tr((W − Ŵ) H (W − Ŵ)ᵀ)`: the error of X Wᵀ for H = XᵀX.

        H ← H + damping · mean(diag H) · I,  H⁻¹ = UᵀU with U upper triangular
        for each column j:  ŵ_j = change(j, W),  e = (w_j − ŵ_j) / U_jj,  W[:, j:] ← W[:, j:] − e U[j, j:]

    `change(j, W)` gets W as it is by then, and returns ŵ_j (out,). Columns of a block of so many see all feedback at
    once; those behind it when the block is done. An input that is always zero (H_jj = 0) has its column set to 0.

    Raises RankfoldError where H is no second moment: not positive, even damped.
    """
    W, H, n = W.clone(), H.double().clone(), W.shape[1]
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    root, failed = torch.linalg.cholesky_ex(H)
    if failed:
        raise RankfoldError(f"the inputs' second moment is not positive definite: raise the damping above {damping}")
    U = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True).to(W.dtype)
    for first in range(0, n, block):
        last = min(first + block, n)
        errors = torch.empty(W.shape[0], last - first, dtype=W.dtype, device=W.device)
        for j in range(first, last):
            changed = change(j, W)
            e = errors[:, j - first] = (W[:, j] - changed) / U[j, j]
            W[:, j + 1 : last].addr_(e, U[j, j + 1 : last], alpha=-1)
            W[:, j] = changed
        W[:, last:].addmm_(errors, U[first:last, last:], alpha=-1)
    return W
