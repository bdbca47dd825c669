"""NOLA: Networks as Linear Combination of Low Rank Random Basis. Koohpayegani et al. 2023, arXiv 2310.02556."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Dropout, Method, Rank, Site
from rankfold.core.seeded import combine, uniform


class NOLA(Method):
    """`A = A₀ + Σᵢ aᵢ Aᵢ`, `B = Σⱼ cⱼ Bⱼ`, `ΔW = s B A`, `s = α / r`: only the k coefficients of each are trained.

    The bases Aᵢ (r, in), Bⱼ (out, r) are uniform on (−1, 1), divided by √k, and never kept: the forward makes them from
    a seed, and the backward makes them again (`∂L/∂aᵢ = ⟨∂L/∂A, Aᵢ⟩`). a and c start at 0. The offset A₀, uniform on
    ±1/√in, is in the authors' code and not in the paper's formula; without it nothing would move from a = c = 0.

    Every matrix has a private sequence of its own, made from the adapter's seed and the layer's name (the authors
    reseed the global generator and do not bring its state back); the experts of one fused weight share theirs.
    """

    slug: ClassVar[str] = "nola"
    title: ClassVar[str] = "NOLA: Networks as Linear Combination of Low Rank Random Basis"
    source: ClassVar[str] = "arXiv 2310.02556"
    size: ClassVar[str] = "k"

    rank: Rank = 8
    alpha: Annotated[float | None, Field(description="s = alpha / rank; None is s = 1")] = None
    k: Annotated[int, Field(ge=1, description="random matrices that A, and that B, is a combination of")] = 128
    dropout: Dropout = 0.0

    def shared(self, sites: Sequence[Site], seed: int) -> "Seed":
        return Seed(seed)

    def delta(self, site: Site, shared: Any) -> "NOLADelta":
        return NOLADelta(site, self, shared)

    def count(self, site: Site) -> int:
        return 2 * self.k

    def refuses(self, site: Site) -> str | None:
        largest = min(site.in_, site.out)
        return f"rank {self.rank} is over the layer's size, at most {largest} fits" if self.rank > largest else None


class Seed(nn.Module):
    """The adapter's seed, for deltas that make their frozen numbers when they are made themselves."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed


class NOLADelta(Delta):
    """a (k,), c (k,)."""

    A_0: Tensor

    def __init__(self, site: Site, method: NOLA, shared: Seed):
        super().__init__(site)
        self.scale = 1.0 if method.alpha is None else method.alpha / method.rank
        self.dropout, self.r, self.k = method.dropout, method.rank, method.k
        self.a, self.c = site.parameter_like(self.k), site.parameter_like(self.k)
        rng = site.rng(shared.seed)
        self.seed_A, self.seed_B = torch.randint(2**62, (2,), generator=rng).tolist()
        self.register_buffer("A_0", site.empty(self.r, site.in_), persistent=False)
        self.A_0.copy_(uniform(rng, self.r, site.in_, bound=site.in_**-0.5))
        self._kept: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.c)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r), A (r, in); without gradients they are kept for as long as the coefficients stay what they are."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            self._kept = None
            return self._mixed()
        if self._kept is None or not (_same(self._kept[0], self.a) and _same(self._kept[1], self.c)):
            self._kept = self.a.detach().clone(), self.c.detach().clone(), self._mixed()
        return self._kept[2]

    def _mixed(self) -> tuple[Tensor, Tensor]:
        s = math.sqrt(self.k)
        A = self.A_0 + combine(self.a / s, self.seed_A, self.r, self.site.in_)
        return combine(self.c / s, self.seed_B, self.site.out, self.r), A


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
