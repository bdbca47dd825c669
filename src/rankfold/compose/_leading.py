"""The leading singular directions of a matrix with all singular values set to 1, as a differentiable function."""

from typing import Any

import torch
from torch import Tensor

from rankfold.core.linalg import OVERSAMPLE, randomised_svd, svd, wide

GUARD = 1e-7  # relative distance of two singular values at the cut below which the gradient is not to be trusted
ITERATIONS = 1  # power iterations, as in the published code


def leading(S: Tensor, kept: int, training: bool = False) -> Tensor:
    """`S̃ = U_m V_mᵀ` of S (..., a, b), with the `kept` = m leading directions; fewer where S has not that many.

    Published code takes the gradient through U and V one by one, which needs every two singular values apart, and
    while training puts 0 in the place of S̃ where two consecutive ones are closer than 1e-7. The gradient here is that
    of S̃ itself: with `f_i = 1` for i ≤ m and 0 behind, and `M = Uᵀ dS V`,

        dS̃ = U (D ∘ sym M + E ∘ skew M) Vᵀ + the parts of dS outside of U or V times f/σ,
        D_ij = (f_i − f_j) / (σ_i − σ_j),  E_ij = (f_i + f_j) / (σ_i + σ_j),

    so that only the last that is kept and the first that is not must be apart: the guard is about these two.
    Of large matrices the directions are found from random projections, always the same ones.
    """
    return _Leading.apply(S, kept, training)  # type: ignore[no-any-return]


class _Leading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, S: Tensor, kept: int, training: bool) -> Tensor:
        if min(S.shape[-2:]) <= 4 * kept:
            U, sigma, Vh = svd(S)
        else:
            rng = torch.Generator().manual_seed(0)
            U, sigma, Vh = randomised_svd(S, kept + OVERSAMPLE, rng, iterations=ITERATIONS, oversample=0)
        scale = sigma[..., :1]
        f = (sigma > scale * max(S.shape[-2:]) * torch.finfo(sigma.dtype).eps).to(sigma.dtype)
        f[..., kept:] = 0
        if training and kept < sigma.shape[-1]:
            gap = (sigma[..., kept - 1] - sigma[..., kept])[..., None]
            f = f * ((gap > GUARD * scale) | (f[..., kept - 1 : kept] == 0))
        ctx.save_for_backward(U, sigma, Vh, f)
        return ((U * f.unsqueeze(-2)) @ Vh).to(S.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        U, sigma, Vh, f = ctx.saved_tensors
        G = wide(gradients[0])
        M = U.mT @ G @ Vh.mT
        row, column = f.unsqueeze(-1), f.unsqueeze(-2)
        apart, both = row != column, row + column > 0
        D = (row - column) / torch.where(apart, sigma.unsqueeze(-1) - sigma.unsqueeze(-2), 1)
        E = (row + column) / torch.where(both, sigma.unsqueeze(-1) + sigma.unsqueeze(-2), 1)
        core = (D * (M + M.mT) + E * (M - M.mT)) / 2
        weight = (f / torch.where(f > 0, sigma, 1)).unsqueeze(-2)
        left = G @ Vh.mT - U @ M  # (I − U Uᵀ) G V
        right = U.mT @ G - M @ Vh  # Uᵀ G (I − V Vᵀ)
        out = U @ core @ Vh + (left * weight) @ Vh + (U * weight) @ right
        return out.to(gradients[0].dtype), None, None
