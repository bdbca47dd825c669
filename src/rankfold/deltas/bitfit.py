"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site


class BitFit(Method):
    """`b' = b + Δb` for the biases there are; no weight changes and none is added. Δb starts at 0.

    `targets="biases"` takes every bias of the model, layer norms' included; name layers to leave those out. The paper
    also trains the head: `modules_to_save`. Training Δb from 0 is training b itself.
    """

    slug: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models"
    source: ClassVar[str] = "arXiv 2106.10199"
    bias_only: ClassVar[bool] = True

    def delta(self, site: Site, shared: nn.Module | None) -> "BitFitDelta":
        return BitFitDelta(site)

    def count(self, site: Site) -> int:
        return site.out

    def refuses(self, site: Site) -> str | None:
        return None if site.bias else "the layer has no bias"


class BitFitDelta(Delta):
    """bias (out,): Δb."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.bias = site.parameter_like(site.out)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.bias)

    def bias_update(self, b: Tensor | None) -> Tensor:
        return self.bias if b is None else self.bias.view(b.shape)  # a layer norm over several dimensions has them all
