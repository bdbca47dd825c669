"""Bi-LoRA. Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy.

Jie et al. 2023, arXiv 2307.16867.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, LowRank, Site, fill
from rankfold.core.levels import MOST_BITS, quantise


class BiLoRA(LowRank):
    """`ΔW = s Q(B) Q(A)`: LoRA trained with factors of `2^bits` levels each, `w_q = σ Q(ŵ) + μ` by factor.

    B and A themselves stay in full precision while they train (see `rankfold.core.levels` for Q and its gradient), and
    so does what `rankfold.save` writes, so that a run can be resumed. `rankfold.compress(how="onebit")` stores the
    codes, μ and σ, `bits · numel + 64` bits a factor: as a plain LoRA that computes the same to the last bit.

    A starts uniform on ±1/√in, B truncated normal with standard deviation 1e-3, cut at ±2e-3. The paper has rank 32 on
    q and v, no α / r but s itself from {0.01, 0.1, 1, 10} (α = s · r here), and dropout 0.1 between the factors, where
    ours is on the input. The authors' code gives a weight on a boundary the number between the levels; here it gets the
    higher level, so that there are never more than 2^bits. Of their two models Bi-AdaptFormer is not here: it is no ΔW.
    """

    slug: ClassVar[str] = "bi-lora"
    title: ClassVar[str] = "Precision Redundancy: one-bit adapters (Bi-LoRA)"
    source: ClassVar[str] = "arXiv 2307.16867"
    departs: ClassVar[str | None] = "of two levels none is zero: the start is a small product"

    bits: Annotated[int, Field(ge=1, le=MOST_BITS, description="of each number of the factors")] = 1

    def delta(self, site: Site, shared: nn.Module | None) -> "BiLoRADelta":
        return BiLoRADelta(site, self)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_ + site.out)


class BiLoRADelta(Delta):
    """B (out, r), A (r, in), before they are quantised."""

    def __init__(self, site: Site, method: BiLoRA):
        super().__init__(site)
        self.scale, self.dropout, self.bits = method.scale, method.dropout, method.bits
        self.A = site.parameter_like(method.rank, site.in_)
        self.B = site.parameter_like(site.out, method.rank)

    def start(self, rng: torch.Generator) -> None:
        fill(self.A, rng, bound=self.site.in_**-0.5)
        drawn = torch.empty(self.B.shape)
        nn.init.trunc_normal_(drawn, std=1e-3, a=-2e-3, b=2e-3, generator=rng)
        with torch.no_grad():
            self.B.copy_(drawn)

    def factors(self) -> tuple[Tensor, Tensor]:
        return quantise(self.B, self.bits), quantise(self.A, self.bits)

    @torch.no_grad()
    def set_start(self, B: Tensor, A: Tensor, M: Tensor | None = None, *, offset: bool = False) -> None:
        """As ever, but a factor of zeros stays the small random one: all its levels would be one, for good."""
        own = self.B.clone(), self.A.clone()
        super().set_start(B, A, M, offset=offset)
        for factor, before in zip((self.B, self.A), own, strict=True):
            if not factor.any():
                factor.copy_(before)

    def set_offset(self, B0: Tensor, A0: Tensor) -> None:
        """Take out what the quantised factors are, so that the change starts at zero."""
        super().set_offset(quantise(B0, self.bits), quantise(A0, self.bits))
