"""EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation. Liu et al. 2024, arXiv
2410.21271."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core.calibration import Calibration, InputCovariance, Statistic
from rankfold.errors import RankfoldError
from rankfold.quantizers._quantizer import Compensation


class EoRA(Compensation):
    """LoRC in the eigenspace of the inputs: the product of rank r that makes the error of this layer's output least.

        C = XᵀX = Q diag(λ) Qᵀ,  S = Q diag(√λ),  (W − Ŵ) S = U diag(σ) Vᵀ
        B = U_r diag(σ_r)^½,  A = diag(σ_r)^½ V_rᵀ S⁻¹

    Then `‖X (W − Ŵ − B A)ᵀ‖² = Σ_{i>r} σ_i²`. Published code sets negative eigenvalues to the smallest positive one,
    leaves an exact 0, and divides by it; here all get the rounding of their mean on top. Its C forgets earlier
    samples, since it multiplies the sum by n/(n+1) for each; here every token counts alike, as in the paper. There X is
    that of the float block.
    """

    slug: ClassVar[str] = "eora"
    title: ClassVar[str] = "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation"
    source: ClassVar[str] = "arXiv 2410.21271"

    rank: Annotated[int, Field(ge=1, description="r")] = 128

    def needs(self) -> tuple[Statistic[Any], ...]:
        return (InputCovariance(),)

    def factors(self, E: Tensor, statistics: Calibration | None, site: str) -> tuple[Tensor, Tensor]:
        assert statistics is not None  # quantize collects what `needs` names
        C = statistics.get(InputCovariance(), site)
        if not C.any():
            raise RankfoldError(f"eora: all inputs of {site} are zero in the calibration data")
        return eigenspace(E, C.to(E), self.rank)


def eigenspace(E: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) for the error E (out, in) and the second moment C (in, in) of the inputs.

    Of `E S` only U and σ are needed, as `V_rᵀ S⁻¹ = diag(σ_r)⁻¹ U_rᵀ E`: those of the smaller of its Gram matrices.
    """
    (out, n), error, C = E.shape, E.double(), C.double()
    C = C + torch.eye(n).to(C) * (C.trace() / n * torch.finfo(E.dtype).eps)  # inputs that are always zero
    if out <= n:
        squares, U = _leading(error @ C @ error.mT, rank)
        sigma = squares.sqrt()
    else:
        values, Q = torch.linalg.eigh(C)
        root = error @ (Q * values.clamp(min=0).sqrt())
        squares, V = _leading(root.mT @ root, rank)
        sigma = squares.sqrt()
        U = root @ V / torch.where(sigma > 0, sigma, 1)
    half = sigma.sqrt()
    A = (U / torch.where(half > 0, half, 1)).mT @ error
    return (U * half).to(E.dtype), A.to(E.dtype)


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a Gram matrix M (n, n), and their vectors (n, r), both from the largest one on."""
    values, vectors = torch.linalg.eigh(M)
    return values[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1)
