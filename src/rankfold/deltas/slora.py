"""SLoRA, the delta of NLoRA: Nyström-Initiated Low-Rank Adaptation. Guo et al. 2025, arXiv 2502.14482."""

from typing import ClassVar

import torch
from torch import nn

from rankfold.core import Factored, LowRank, Site, fill
from rankfold.deltas.lora import start_product


class SLoRA(LowRank):
    """`ΔW = s B N A` with a trained N (r, r) between LoRA's factors, all three trained; `s = α / r`.

    B and A start as LoRA's (B = 0), N uniform on ±1/√r: N = 0 would stop every gradient. The first step moves B alone.
    With init `nlora` this is NLoRA; to train N only (IntTune), put that init on `lora-xs`.
    """

    slug: ClassVar[str] = "slora"
    title: ClassVar[str] = "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models (its SLoRA)"
    source: ClassVar[str] = "arXiv 2502.14482"

    def delta(self, site: Site, shared: nn.Module | None) -> "SLoRADelta":
        return SLoRADelta(site, self.rank, self.scale, self.dropout)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_ + site.out + self.rank)


class SLoRADelta(Factored):
    """B (out, r), N (r, r), A (r, in)."""

    middle: ClassVar[str] = "N"
    full: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"B", "N", "A"})
    N: torch.Tensor

    def start(self, rng: torch.Generator) -> None:
        start_product(self.site, self.B, self.A, "uniform", rng)
        fill(self.N, rng, bound=self.N.shape[-1] ** -0.5)
