"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition. Shi et al. 2024, arXiv 2410.13618."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankfold.core import Delta, Dropout, Method, Rank, Site, fill


class LoLDU(Method):
    """`W = P L D U` with partial pivoting; of the first r pivots only the diagonal z (r,) is trained, z₀ = D.

    `W' = W − s P L_r diag(D_r) U_r + s P L_r diag(z) U_r = W + s P L_r diag(z − D_r) U_r`, `s = α / r`. P L_r (out, r)
    and U_r (r, in), of unit diagonal, are frozen and saved. L and U are triangular, not orthogonal as the abstract
    has it.

    `start` as in the authors' code: "lu" is z₀ = D; the others take z₀ uniform on ±mean(D)/2, normal with D's mean and
    deviation, constant at D's mean, one or zero, and **change the layer's function**. z has the size of the pivots,
    so it wants a learning rate much above LoRA's. The authors also make s a parameter but never train it: here it is
    fixed. A pivot of (nearly) zero, where their code divides by it, gets a row of U with a one on the diagonal.
    """

    slug: ClassVar[str] = "loldu"
    title: ClassVar[str] = (
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning"
    )
    source: ClassVar[str] = "arXiv 2410.13618"

    rank: Rank = 4
    alpha: float = 1.0
    dropout: Dropout = 0.0
    start: Literal["lu", "uniform", "normal", "constant", "ones", "zeros"] = "lu"

    def delta(self, site: Site, shared: nn.Module | None) -> "LoLDUDelta":
        return LoLDUDelta(site, self)

    def count(self, site: Site) -> int:
        return self.rank

    def refuses(self, site: Site) -> str | None:
        largest = min(site.in_, site.out)
        return f"rank {self.rank} is over the layer's {largest} pivots" if self.rank > largest else None


class LoLDUDelta(Delta):
    """z (r,) trained; PL (out, r), U (r, in) and D (r,) frozen."""

    PL: Tensor
    U: Tensor
    D: Tensor

    def __init__(self, site: Site, method: LoLDU):
        super().__init__(site)
        self.scale, self.dropout, self.drawn = method.alpha / method.rank, method.dropout, method.start
        self.z = site.parameter_like(method.rank)
        self.register_buffer("PL", site.empty(site.out, method.rank))
        self.register_buffer("U", site.empty(method.rank, site.in_))
        self.register_buffer("D", site.empty(method.rank))

    @torch.no_grad()
    def start(self, rng: torch.Generator) -> None:
        PL, D, U = leading_ldu(self.W.to(self.D.dtype), self.z.shape[-1])
        self.PL.copy_(PL)
        self.D.copy_(D)
        self.U.copy_(U)
        mean = self.D.mean(-1, keepdim=True)
        match self.drawn:
            case "lu":
                self.z.copy_(self.D)
            case "uniform":
                fill(self.z, rng, bound=1.0).mul_(mean / 2)
            case "normal":
                fill(self.z, rng, std=1.0).mul_(self.D.std(-1, keepdim=True).nan_to_num()).add_(mean)
            case "constant":
                self.z.copy_(mean.expand_as(self.z))
            case "ones":
                self.z.fill_(1)
            case "zeros":
                self.z.fill_(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.PL * (self.z - self.D)[..., None, :], self.U


def leading_ldu(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`P L_{:, :r}` (out, r), D (r,) and `U_{:r}` (r, in) of `W (out, in) = P L diag(D) U` with partial pivoting.

    Column by column (left-looking), so that it costs r² (in + out) and not a whole factorisation: later pivots permute
    the rows of L and P alike and leave P L's first columns as they are.
    """
    *batch, out, n = W.shape
    L, D, U = W.new_zeros(*batch, out, r), W.new_zeros(*batch, r), W.new_zeros(*batch, r, n)
    taken = torch.zeros(*batch, out, dtype=torch.bool, device=W.device)  # rows that were pivots
    least = W.abs().amax((-2, -1))[..., None] * max(out, n) * torch.finfo(W.dtype).eps
    for i in range(r):
        column = W[..., i] - (L[..., :i] @ (D[..., :i] * U[..., :i, i])[..., None]).squeeze(-1)
        p = column.abs().masked_fill(taken, -1).argmax(-1, keepdim=True)
        pivot, is_p = column.gather(-1, p), torch.zeros_like(taken).scatter_(-1, p, True)
        dead = pivot.abs() <= least
        L[..., i] = torch.where(is_p, 1, (column / torch.where(dead, torch.inf, pivot)).masked_fill(taken, 0))
        D[..., i] = torch.where(dead, 0, pivot).squeeze(-1)
        p = p[..., None]
        row = W.take_along_dim(p, -2) - L.take_along_dim(p, -2)[..., :i] @ (D[..., :i, None] * U[..., :i, :])
        U[..., i, :] = (row / torch.where(dead, 1, pivot)[..., None]).squeeze(-2)
        U[..., i, :i], U[..., i, i] = 0, 1
        taken |= is_p
    return L, D, U
