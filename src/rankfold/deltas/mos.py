"""MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards. Wang et al. 2024.

arXiv 2410.00938.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rankfold.core import Delta, Dropout, Method, Rank, Site, fill
from rankfold.core.pool import Pool, grouped, shape_of
from rankfold.errors import RankfoldError


class MoS(Method):
    """`ΔW_n = s B_n A_n`: layer n puts A_n and B_n together from shards in two trained pools of all N layers of a kind.

    A kind is a last path component (`q_proj`) and a shape; the matrices of a fused expert weight count as layers. With
    budget e, active rank r, private rank p and l shards a vector the pools are `PA (e N l, in/l)`, `PB (e N l, out/l)`.
    Their first (e − p) N l rows are public, and the n-th block of p l behind those is layer n's own.

        I_n = (r − p) l public rows drawn without repetition, then the p l private ones
        row t of A_n = PA[I_n[t l]], …, PA[I_n[t l + l − 1]] side by side;  B_n's columns likewise, by another draw

    The draws are fixed, and made again from the adapter's seed. PB starts at 0, PA uniform on ±1/√in. A kind trains as
    many numbers as a LoRA of rank e. `s = α / r`; e = r = p is LoRA. The abstract speaks of a mixture, but nothing is
    routed.

    A draw needs (r − p) ≤ (e − p) N. In a kind with fewer layers r is what there is to draw, p + (e − p) N (the
    authors' code stops there), so a layer alone in its kind has a LoRA of rank e.
    """

    slug: ClassVar[str] = "mos"
    title: ClassVar[str] = "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards"
    source: ClassVar[str] = "arXiv 2410.00938"
    size: ClassVar[str] = "budget"

    rank: Annotated[Rank, Field(description="active rank r")] = 8
    budget: Annotated[int, Field(ge=1, description="rank e of the LoRA with as many numbers")] = 2
    private: Annotated[int, Field(ge=0, description="private rank p of each layer")] = 1
    shards: Annotated[int, Field(ge=1, description="shards l that a vector is cut into")] = 4
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Dropout = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.private <= self.budget <= self.rank:
            raise ValueError(f"private <= budget <= rank must hold, not {self.private}, {self.budget}, {self.rank}")
        return self

    def shared(self, sites: Sequence[Site], seed: int) -> "Shards":
        return Shards(self, sites, seed)

    def shared_count(self, sites: Sequence[Site]) -> int:
        return sum(self.budget * site.count * (site.in_ + site.out) for site in sites)

    def delta(self, site: Site, shared: Any) -> "MoSDelta":
        return MoSDelta(site, self, shared)

    def count(self, site: Site) -> int:
        return 0

    def refuses(self, site: Site) -> str | None:
        if site.in_ % self.shards or site.out % self.shards:
            return f"its sides cannot be cut into {self.shards} shards: shards must divide both"
        return None


def kind_of(site: Site) -> str:
    return f"{site.name.rpartition('.')[2]}_{shape_of(site)}"


class Shards(Pool):
    """The pools PA and PB of each kind, and the indices of each site into them."""

    def __init__(self, method: MoS, sites: Sequence[Site], seed: int):
        super().__init__()
        self.of = (method.rank, method.budget, method.private, method.shards)
        self.indices: dict[str, tuple[Tensor, Tensor]] = {}
        r, e, p, cut = self.of
        for kind, members in grouped(sites, kind_of).items():
            first, rng = members[0], members[0].rng(seed)
            N = sum(site.count for site in members)
            PA = torch.empty(e * N * cut, first.in_ // cut, dtype=first.dtype)
            PB = torch.zeros(e * N * cut, first.out // cut, dtype=first.dtype)
            self.put(kind, fill(PA, rng, bound=first.in_**-0.5), PB)
            public, n = (e - p) * N * cut, 0
            for site in members:
                own = public + torch.arange(n * p * cut, (n + site.count) * p * cut).view(site.count, p * cut)
                drawn = [torch.randperm(public, generator=rng)[: (r - p) * cut] for _ in range(2 * site.count)]
                I_A, I_B = (torch.cat([half, own], 1) for half in torch.stack(drawn).chunk(2))
                self.indices[site.name] = I_A.view(*site.batch, -1), I_B.view(*site.batch, -1)
                n += site.count


class MoSDelta(Delta):
    """I_A (r l,) and I_B (r l,), fixed; everything trained is in the pools."""

    I_A: Tensor
    I_B: Tensor

    def __init__(self, site: Site, method: MoS, shared: Shards):
        super().__init__(site)
        if (method.rank, method.budget, method.private, method.shards) != shared.of:
            raise RankfoldError(f"mos: {site.name} asks for other ranks or shards than the pool that it draws from")
        self.shared, self.kind, self.l, self.dropout = shared, kind_of(site), method.shards, method.dropout
        for name, index in zip(("I_A", "I_B"), shared.indices[site.name], strict=True):
            self.register_buffer(name, index.to(site.device), persistent=False)
        self.scale = method.alpha * self.l / self.I_A.shape[-1]  # α / r

    def start(self, rng: torch.Generator) -> None:
        """The pools have theirs."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = (
            pool[self.kind][index].unflatten(-2, (-1, self.l)).flatten(-2)
            for pool, index in ((self.shared.A, self.I_A), (self.shared.B, self.I_B))
        )
        return B.mT, A
