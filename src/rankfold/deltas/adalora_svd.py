"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023, arXiv 2303.10512."""

from typing import ClassVar

import torch
from torch import nn

from rankfold.core import Factored, LowRank, Site, fill


class AdaLoRASVD(LowRank):
    """AdaLoRA's parameterisation: `ΔW = s B diag(λ) A`, all three trained; λ₀ = 0, A and B ~ N(0, 0.02²).

    The paper writes P Λ Q. Its regulariser, which pulls B and A towards orthonormal vectors, is the callback
    `orthogonality`; λᵢ = 0 takes the i-th component out of the product.

    `s = α / r`, where PEFT divides by r + 1e-5.
    """

    slug: ClassVar[str] = "adalora-svd"
    title: ClassVar[str] = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    source: ClassVar[str] = "arXiv 2303.10512"

    def delta(self, site: Site, shared: nn.Module | None) -> "AdaLoRASVDDelta":
        return AdaLoRASVDDelta(site, self.rank, self.scale, self.dropout)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_ + site.out + 1)


class AdaLoRASVDDelta(Factored):
    """B (out, r), lam (r,), A (r, in)."""

    middle: ClassVar[str] = "lam"
    trained: ClassVar[frozenset[str]] = frozenset({"B", "lam", "A"})
    lam: torch.Tensor

    def start(self, rng: torch.Generator) -> None:
        fill(self.A, rng, std=0.02)
        fill(self.B, rng, std=0.02)
        nn.init.zeros_(self.lam)
