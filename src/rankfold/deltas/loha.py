"""LoHa: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning.

Hyeon-Woo et al. 2021, arXiv 2108.06098; as LyCORIS has it, Yeh et al. 2023, arXiv 2309.14859.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.core import Delta, Method, Rank, Site, fill


class LoHa(Method):
    """`ΔW = s (B₁ A₁) ⊙ (B₂ A₂)`, A (r, in), B (out, r), `s = α / r`: of rank up to r² with the numbers of rank 2r.

    A₂ starts at 0, the others uniform on ±1/√(their columns), as in PEFT. `alpha=None` means α = r, so s = 1.
    """

    slug: ClassVar[str] = "loha"
    title: ClassVar[str] = "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
    source: ClassVar[str] = "arXiv 2108.06098"

    rank: Rank = 8
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, site: Site, shared: nn.Module | None) -> "LoHaDelta":
        thin = 2 * self.rank**2 <= min(site.in_, site.out)
        return (ThinLoHa if thin else DenseLoHa)(site, self)

    def count(self, site: Site) -> int:
        return 2 * self.rank * (site.in_ + site.out)


class LoHaDelta(Delta):
    """B1, B2 (out, r), A1, A2 (r, in)."""

    def __init__(self, site: Site, method: LoHa):
        super().__init__(site)
        self.scale = method.scale
        self.B1, self.B2 = site.parameter_like(site.out, method.rank), site.parameter_like(site.out, method.rank)
        self.A1, self.A2 = site.parameter_like(method.rank, site.in_), site.parameter_like(method.rank, site.in_)

    def start(self, rng: torch.Generator) -> None:
        for tensor in (self.B1, self.A1, self.B2):
            fill(tensor, rng, bound=tensor.shape[-1] ** -0.5)
        nn.init.zeros_(self.A2)


class DenseLoHa(LoHaDelta):
    def update(self) -> Tensor:
        return (self.scale * self.B1 @ self.A1) * (self.B2 @ self.A2)


class ThinLoHa(LoHaDelta):
    """Where r² is small: every product of a column of B₁ with one of B₂, and of the rows of A₁ and A₂ alike."""

    def factors(self) -> tuple[Tensor, Tensor]:
        B = self.B1[..., :, None] * self.B2[..., None, :]
        A = self.A1[..., :, None, :] * self.A2[..., None, :, :]
        return B.flatten(-2), A.flatten(-3, -2)
