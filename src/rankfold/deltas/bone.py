"""Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models.

Kang and Yin 2024, arXiv 2409.15371: version 1 is Bat, the later versions Bone.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankfold.core import Delta, Method, Rank, Site
from rankfold.deltas.miss import MiSSDelta


class Bone(Method):
    """One small trained block for every column block of W. No α and no scale; starts at 0.

    `variant="bat"`, the first version's: W is cut into r×r blocks, `W'_ij = W_ij (I + D_i) + D_i`, D (out/r, r, r).
    `variant="bone"`, the later one: `ΔW = [Dᵀ Dᵀ … Dᵀ]`, D (r, out), which went on as MiSS (`rankfold.MiSS`).

    `rank=None` is the largest power of two up to 64 that divides in and out. In PEFT these are `MissConfig` with
    `init_weights="bat"` and `init_weights=True`: what PEFT does by default is not what the first version describes.
    """

    slug: ClassVar[str] = "bone"
    title: ClassVar[str] = (
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models"
    )
    source: ClassVar[str] = "arXiv 2409.15371"

    rank: Rank | None = None
    variant: Literal["bat", "bone"] = "bat"

    def rank_at(self, site: Site) -> int:
        """r at a site."""
        if self.rank is not None:
            return self.rank
        return next(r for r in (64, 32, 16, 8, 4, 2, 1) if site.in_ % r == 0 and site.out % r == 0)

    def delta(self, site: Site, shared: nn.Module | None) -> "BatDelta | MiSSDelta":
        return BatDelta(site, self.rank_at(site)) if self.variant == "bat" else MiSSDelta(site, self.rank_at(site))

    def count(self, site: Site) -> int:
        return self.rank_at(site) * site.out

    def refuses(self, site: Site) -> str | None:
        r = self.rank_at(site)
        if self.variant == "bat" and (site.in_ % r or site.out % r):
            return f"the weight cannot be cut into {r}×{r} blocks: rank must divide both sides (or variant='bone')"
        return f"rank {r} is over the layer's input size" if r > site.in_ else None


class BatDelta(Delta):
    """D (out/r, r, r)."""

    def __init__(self, site: Site, r: int):
        super().__init__(site)
        self.D = site.parameter_like(site.out // r, r, r)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.D)

    def transform(self, W: Tensor) -> Tensor:
        i, r, _ = self.D.shape[-3:]
        blocks = W.unflatten(-1, (-1, r)).unflatten(-3, (i, r))  # (out/r, r, in/r, r): W_ij is blocks[i, :, j]
        change = torch.einsum("...iajb,...ibc->...iajc", blocks.to(self.D.dtype), self.D) + self.D.unsqueeze(-2)
        return W + change.reshape(W.shape)
