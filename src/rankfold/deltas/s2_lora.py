"""Sparsely Shared LoRA on Whisper for Child Speech Recognition. Liu et al. 2023, arXiv 2309.11756."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Dropout, Method, Rank, Site, fill
from rankfold.core.pool import Pool, grouped, shape_of
from rankfold.errors import RankfoldError


class S2LoRA(Method):
    """`ΔW_i = B diag(λ_i) A`: one A (r, in) and one B (out, r) for all layers of a shape, and λ_i (r,) of each layer.

    All three are trained. Together with the callback `proximal-l1` on λ, layers drop the rank-one parts that they do
    not need: layer i ends at rank ‖λ_i‖₀. λ starts at 0, A and B normal with deviation 0.02, as in AdaLoRA (what the
    authors start from is not published, nor is their code).

    The product does not change when B shrinks and λ grows, so an l1 penalty on λ alone could be had for nothing.
    `normalise` closes that: the rows of A and the columns of B count with length 1. (AdaLoRA's orthogonality penalty,
    the other way to do it, asks for one more weight to choose and holds B and A only about there.)

    The experts of a fused weight share a pair too. r may be over a layer's size, since the layers choose from it.
    """

    slug: ClassVar[str] = "s2-lora"
    title: ClassVar[str] = "Sparsely Shared LoRA on Whisper for Child Speech Recognition"
    source: ClassVar[str] = "arXiv 2309.11756"

    rank: Rank = 32
    normalise: Annotated[bool, Field(description="rows of A and columns of B count with length 1")] = True
    dropout: Dropout = 0.0

    def shared(self, sites: Sequence[Site], seed: int) -> Pool:
        pool = Pool()
        for shape, members in grouped(sites, shape_of).items():
            first, rng = members[0], members[0].rng(seed)
            A = torch.empty(self.rank, first.in_, dtype=first.dtype)
            B = torch.empty(first.out, self.rank, dtype=first.dtype)
            pool.put(shape, fill(A, rng, std=0.02), fill(B, rng, std=0.02))
        return pool

    def shared_count(self, sites: Sequence[Site]) -> int:
        return self.rank * sum(members[0].in_ + members[0].out for members in grouped(sites, shape_of).values())

    def delta(self, site: Site, shared: Any) -> "S2LoRADelta":
        return S2LoRADelta(site, self, shared)

    def count(self, site: Site) -> int:
        return self.rank


class S2LoRADelta(Delta):
    """lambda_ (r,) of its own; A and B in the pool."""

    def __init__(self, site: Site, method: S2LoRA, shared: Pool):
        super().__init__(site)
        self.shared, self.group = shared, shape_of(site)
        self.dropout, self.normalise = method.dropout, method.normalise
        if method.rank != shared.A[self.group].shape[0]:
            raise RankfoldError(f"s2-lora: {site.name} asks for rank {method.rank}, other than the pair it shares")
        self.lambda_ = site.parameter_like(method.rank)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.lambda_)

    @property
    def diagonal(self) -> nn.Parameter:
        return self.lambda_

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.shared.A[self.group].to(self.lambda_.dtype), self.shared.B[self.group].to(self.lambda_.dtype)
        if self.normalise:
            A, B = F.normalize(A, dim=-1), F.normalize(B, dim=-2)
        B = B * self.lambda_[..., None, :]
        return B, A.expand(*self.site.batch, *A.shape)
