"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al. 2023, arXiv 2310.11454."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Dropout, Method, Rank, Site
from rankfold.core.seeded import Bases, kaiming_bound, uniform
from rankfold.errors import RankfoldError


class VeRA(Method):
    """`ΔW = Λ_b B Λ_d A`: one frozen random pair A (r, max in), B (max out, r) for all layers, sliced to each.

    Trained a layer: the diagonals λ_d (r,), from `d_initial`, and λ_b (out,), from 0. No α/r scaling. A and B are
    uniform on ±√(6/fan_in), drawn from the adapter's seed in PEFT's order, so PEFT's `projection_prng_key` gives the
    same pair to float32 rounding. The experts of a fused weight share the slice and have diagonals of their own.
    """

    slug: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA: Vector-based Random Matrix Adaptation"
    source: ClassVar[str] = "arXiv 2310.11454"

    rank: Rank = 256
    d_initial: Annotated[float, Field(description="where λ_d starts")] = 0.1
    dropout: Dropout = 0.0

    def shared(self, sites: Sequence[Site], seed: int) -> Bases:
        wide, tall, rng = max(s.in_ for s in sites), max(s.out for s in sites), torch.Generator().manual_seed(seed)
        A = uniform(rng, self.rank, wide, bound=kaiming_bound(wide))
        B = uniform(rng, tall, self.rank, bound=kaiming_bound(self.rank))
        return Bases(A=A, B=B)

    def delta(self, site: Site, shared: Any) -> "VeRADelta":
        return VeRADelta(site, self, shared)

    def count(self, site: Site) -> int:
        return self.rank + site.out


class VeRADelta(Delta):
    """lambda_d (r,), lambda_b (out,)."""

    def __init__(self, site: Site, method: VeRA, shared: Bases):
        super().__init__(site)
        self.shared, self.d_initial, self.dropout = shared, method.d_initial, method.dropout
        if method.rank > shared.A.shape[0]:
            raise RankfoldError(
                f"vera: {site.name} asks for rank {method.rank}, but the shared pair has {shared.A.shape[0]}"
            )
        self.lambda_d = site.parameter_like(method.rank)
        self.lambda_b = site.parameter_like(site.out)

    def start(self, rng: torch.Generator) -> None:
        nn.init.constant_(self.lambda_d, self.d_initial)
        nn.init.zeros_(self.lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        r = self.lambda_d.shape[-1]
        A = self.shared.A[:r, : self.site.in_].to(self.lambda_d)
        B = self.shared.B[: self.site.out, :r].to(self.lambda_b)
        return self.lambda_b[..., None] * B, self.lambda_d[..., None] * A
