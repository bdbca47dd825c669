"""MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing.

Kang and Yin 2024, arXiv 2409.15371 in its later versions, which called the method Bone and DiSHA before.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Dropout, Method, Rank, Site


class MiSS(Method):
    """`ΔW = [Dᵀ Dᵀ … Dᵀ]`: one trained D (r, out) for every r columns, the last copy cut where r does not divide `in`.

    So `Δy = (Σ_j x_j) D` with x_j the j-th chunk of r inputs. With `mini=m` D is (r, m), repeated along out (m | out).
    D starts at 0 and gets a gradient at the first step. There is no α and no scale. `rank=None` is the authors' 64, or
    `in` where that is less. PEFT's `MissConfig` with `init_weights=True`, or `"mini"` and its `mini_r`.
    """

    slug: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing"
    source: ClassVar[str] = "arXiv 2409.15371"

    rank: Rank | None = None
    mini: Annotated[int | None, Field(ge=1, description="width m of D; None is out")] = None
    dropout: Dropout = 0.0

    def rank_at(self, site: Site) -> int:
        """r at a site."""
        return min(64, site.in_) if self.rank is None else self.rank

    def delta(self, site: Site, shared: nn.Module | None) -> "MiSSDelta":
        return MiSSDelta(site, self.rank_at(site), self.mini, self.dropout)

    def count(self, site: Site) -> int:
        return self.rank_at(site) * (self.mini or site.out)

    def refuses(self, site: Site) -> str | None:
        if self.mini is not None and site.out % self.mini:
            return f"D of width {self.mini} cannot be repeated along {site.out} outputs: mini must divide them"
        r = self.rank_at(site)
        return f"rank {r} is over the layer's input size" if r > site.in_ else None


class MiSSDelta(Delta):
    """D (r, m), m = out unless it is given."""

    def __init__(self, site: Site, r: int, m: int | None = None, dropout: float = 0.0):
        super().__init__(site)
        self.dropout = dropout
        self.D = site.parameter_like(r, m or site.out)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.D)

    def factors(self) -> tuple[Tensor, Tensor]:
        """ΔW = Dᵀ [I I … I]: summing the length-r chunks of x is a product with identities side by side."""
        (r, m), n = self.D.shape[-2:], self.site.in_
        identities = torch.eye(r, dtype=self.D.dtype, device=self.D.device).repeat(1, -(-n // r))[:, :n]
        return self.D.tile(self.site.out // m).mT, identities.expand(*self.site.batch, r, n)
