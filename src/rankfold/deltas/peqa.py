"""PEQA: Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization.

Kim et al. 2023, arXiv 2305.14152.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site


class PEQA(Method):
    """`Ŵ = (s₀ + Δs) ⊙ W̄₀`: the codes W̄₀ of a packed weight stay, its scales are trained; Δs = 0 at start.

    The base comes from `rankfold quantize`, per channel (`group="channel"`) as in the paper, or in groups. `s₀ + Δs` is
    rounded to the dtype that the base keeps its scales in, at training as well, so that merging changes no output and
    leaves a packed model. Δs itself is float32, and a step may be smaller than that rounding. Many adapters share one
    base and can be mixed in a batch. Rates are well below LoRA's, as a scale moves a whole group.

    Scales that are held in 8 bits themselves (`double`) are refused: a step is far below what those bits tell apart,
    and merged they could only become floats, a layer of another scheme than the base has and its other adapters know.
    Without `double` they are these floats from the start.
    """

    slug: ClassVar[str] = "peqa"
    title: ClassVar[str] = (
        "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization"
    )
    source: ClassVar[str] = "arXiv 2305.14152"
    over: ClassVar[tuple[str, ...]] = ("packed",)

    def delta(self, site: Site, shared: nn.Module | None) -> "PEQADelta":
        return PEQADelta(site)

    def count(self, site: Site) -> int:
        return math.prod(site.layer.scales.shape)

    def refuses(self, site: Site) -> str | None:
        double = "its scales are held in 8 bits themselves (double), too few to train: quantise it without"
        return double if site.layer.scheme.double else None


class PEQADelta(Delta):
    """Δs (rows, groups), as the packed layer has its scales."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.ds = site.parameter_like(*site.layer.scales.shape)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.ds)

    def scales(self, s: Tensor) -> Tensor:
        return s + self.ds
