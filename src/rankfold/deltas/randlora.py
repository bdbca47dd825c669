"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models. Albert et al. 2025, arXiv 2502.00987."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rankfold.core import Delta, Dropout, Method, Rank, Site
from rankfold.core.seeded import Bases, ternary, uniform, unit_std
from rankfold.errors import RankfoldError


class RandLoRA(Method):
    """`M = s Σⱼ Bⱼ diag(Λⱼ) A diag(Γⱼ)`, j = 1 … n, of rank up to d: frozen random bases under trained gains.

    With D the longer and d the shorter side of W, `n = ⌈d/r⌉`; M is (D, d) and `ΔW = M` if in ≤ out, else `Mᵀ`. All
    layers share the Bⱼ (D, r) and the one A (r, d), sliced. Trained a layer: Λ (n, r), from 0, and Γ (n, d), from
    1/max(n, d). A larger r means fewer trained numbers. At the first step only Λ has a gradient.

    `scaling="bases"` is `s = α / (r √n)`, as in the authors' GPT-2 and LLM code, with `alpha=None` for 2 r. "rank" is
    `s = α / r`, as in PEFT and the authors' CLIP code, with `alpha=None` for PEFT's 20 r: ten times as large and more.

    `basis`: "uniform", "sparse" (−1, 0, +1 with 1/6, 2/3, 1/6) or "very-sparse" (±1 with 1/(2√d) each, d the shortest
    side of the widest layer; so do Li et al. 2006 and the code, though PEFT's description says 1/√d); all divided by
    their own standard deviation. PEFT and the authors flatten B by base and A by rank, which pairs bases with gains in
    another order than this formula: the same distribution, other numbers. Their generators may also count n by
    ⌊d/r⌋ + 1, one more where r divides d.
    """

    slug: ClassVar[str] = "randlora"
    title: ClassVar[str] = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models"
    source: ClassVar[str] = "arXiv 2502.00987"

    rank: Rank = 32
    alpha: float | None = None
    scaling: Literal["bases", "rank"] = "bases"
    basis: Literal["uniform", "sparse", "very-sparse"] = "uniform"
    dropout: Dropout = 0.0

    def bases(self, site: Site) -> int:
        """n at a site."""
        return math.ceil(min(site.in_, site.out) / self.rank)

    def scale(self, site: Site) -> float:
        if self.scaling == "rank":
            return (20 * self.rank if self.alpha is None else self.alpha) / self.rank
        return (2 * self.rank if self.alpha is None else self.alpha) / (self.rank * math.sqrt(self.bases(site)))

    def shared(self, sites: Sequence[Site], seed: int) -> Bases:
        D, d = max(max(s.in_, s.out) for s in sites), max(min(s.in_, s.out) for s in sites)
        n, rng = max(self.bases(s) for s in sites), torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            if self.basis == "uniform":
                return unit_std(uniform(rng, *shape))
            return unit_std(ternary(rng, *shape, sparsity=3 if self.basis == "sparse" else math.sqrt(d)))

        return Bases(A=draw(self.rank, d), B=draw(D, n * self.rank))  # B: the Bⱼ side by side

    def delta(self, site: Site, shared: Any) -> "RandLoRADelta":
        return RandLoRADelta(site, self, shared)

    def count(self, site: Site) -> int:
        return self.bases(site) * (self.rank + min(site.in_, site.out))


class RandLoRADelta(Delta):
    """Lambda (n, r), Gamma (n, d)."""

    def __init__(self, site: Site, method: RandLoRA, shared: Bases):
        super().__init__(site)
        self.shared, self.scale, self.dropout = shared, method.scale(site), method.dropout
        if method.rank != shared.A.shape[0]:
            raise RankfoldError(
                f"randlora: {site.name} asks for rank {method.rank}, but the shared bases have {shared.A.shape[0]}"
            )
        self.Lambda = site.parameter_like(method.bases(site), method.rank)
        self.Gamma = site.parameter_like(method.bases(site), min(site.in_, site.out))

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.Lambda)
        nn.init.constant_(self.Gamma, 1 / max(self.Gamma.shape[-2:]))

    def factors(self) -> tuple[Tensor, Tensor]:
        (n, r), d, D = self.Lambda.shape[-2:], self.Gamma.shape[-1], max(self.site.in_, self.site.out)
        gained = Gained.apply(self.Lambda, self.shared.A[:, :d].to(self.Lambda), self.Gamma).flatten(-3, -2)  # (n r, d)
        B = self.shared.B[:D, : n * r].to(self.Lambda).expand(*self.site.batch, D, n * r)
        return (B, gained) if self.site.in_ <= self.site.out else (gained.mT, B.mT)


class Gained(Function):
    """diag(Λⱼ) A diag(Γⱼ) for each j: Λ (..., n, r), A (r, d), Γ (..., n, d) -> (..., n, r, d).

    Keeps the three alone for the backward, where the composed expression keeps a copy of A for each base.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(Lambda: Tensor, A: Tensor, Gamma: Tensor) -> Tensor:
        return Lambda[..., None] * A * Gamma[..., None, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, Tensor]:
        Lambda, A, Gamma = ctx.saved_tensors
        G = G * A
        return (G @ Gamma[..., None]).squeeze(-1), None, (Lambda[..., None, :] @ G).squeeze(-2)
