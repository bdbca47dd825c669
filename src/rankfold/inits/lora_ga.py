"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang, Yu & Li 2024, arXiv 2407.05000."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core import Init, Site, Start
from rankfold.core.calibration import Calibration, MeanGradient, Statistic
from rankfold.core.linalg import leading_svd
from rankfold.errors import RankfoldError


class LoRAGA(Init):
    """Start so that the first step of `B A` is, up to a factor, the best rank-2r approximation of full fine-tuning's.

        G = ∂L/∂W = U diag(σ) Vᵀ,  A₀ = c [v_1 … v_r]ᵀ,  B₀ = c [u_{r+1} … u_{2r}],  c = out^{1/4} / √γ

    σ is not used. A step of plain gradient descent moves `s B A` by `−η s² (G A₀ᵀA₀ + B₀B₀ᵀG)`, which for disjoint
    choices is `−η s² c² Σ_{i ≤ 2r} σ_i u_i v_iᵀ`. The core takes `s B₀A₀` out of the base as an offset. Needs
    r ≤ min(in, out) / 2. The paper takes `s = α / √r`: `LoRA(rank=8, alpha=16, rslora=True)`.

    `directions` says which of the first 2r triples go to A and to B: "ArB2r" (A the first r, B the next), "A2rBr" (the
    other way round), "ArBr" (B the 1st, 3rd, …, A the 2nd, 4th, …), "random" (a random disjoint split). `scale` says
    what c is: "stable" as above, "unit" 1, "gd" 1/s, "weightS" the mean of √(σ_i(W) / s) over i ≤ r. `clip` shrinks
    both factors by √ρ, `ρ = max|W| / max|s B₀A₀|`, where ρ < 1: c is large for narrow layers.

    PEFT's port multiplies B by σ and c and leaves A alone, and its "random" takes the same triples for both; this
    is the authors' code. That one takes 4r directions in its randomised SVD; here it is 2r + 10.
    """

    slug: ClassVar[str] = "lora-ga"
    title: ClassVar[str] = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    source: ClassVar[str] = "arXiv 2407.05000"

    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "weightS"] = "stable"
    gamma: Annotated[float, Field(gt=0, description='γ of the scale "stable"')] = 16.0
    clip: Annotated[bool, Field(description="keep the largest entry of the offset below the weight's")] = False

    def needs(self, rank: int) -> tuple[Statistic, ...]:
        return (MeanGradient(),)

    def factors(
        self, site: Site, W: Tensor, rank: int, scale: float, statistics: Calibration | None, rng: torch.Generator
    ) -> Start:
        assert statistics is not None  # attach collects what `needs` names
        if 2 * rank > min(site.out, site.in_):
            raise RankfoldError(
                f"lora-ga takes 2r = {2 * rank} singular triples of the gradient, and {site.name} "
                f"({site.out}×{site.in_}) has {min(site.out, site.in_)}: rank {min(site.out, site.in_) // 2} fits"
            )
        if scale <= 0 and self.scale in ("gd", "weightS"):
            raise RankfoldError(f"lora-ga's scale {self.scale!r} divides by α/r, which is {scale} at {site.name}")
        G = statistics.get(MeanGradient(), site.name).to(W)
        U, _, Vt = leading_svd(G, 2 * rank, rng)
        to_A, to_B = self._split(rank, rng)
        c = self._size(site, W, rank, scale, rng)
        B, A = c * U[..., to_B], c * Vt[..., to_A, :]
        if self.clip:
            largest = (scale * B @ A).abs().amax((-2, -1), keepdim=True)
            root = (W.abs().amax((-2, -1), keepdim=True) / largest).clamp(max=1).sqrt()
            B, A = root * B, root * A
        return Start(B, A, offset=True)

    def _split(self, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which of the first 2r triples A takes, and which B."""
        i = torch.randperm(2 * r, generator=rng) if self.directions == "random" else torch.arange(2 * r)
        match self.directions:
            case "A2rBr":
                return i[r:], i[:r]
            case "ArBr":
                return i[1::2], i[::2]
            case _:
                return i[:r], i[r:]

    def _size(self, site: Site, W: Tensor, r: int, s: float, rng: torch.Generator) -> float | Tensor:
        match self.scale:
            case "stable":
                return site.out**0.25 / self.gamma**0.5
            case "gd":
                return 1 / s
            case "weightS":
                return (leading_svd(W, r, rng)[1] / s).sqrt().mean(-1)[..., None, None]
            case _:
                return 1.0
