"""NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models. Guo et al. 2025, arXiv 2502.14482."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core import Init, Site, Start
from rankfold.core.calibration import Calibration
from rankfold.core.linalg import wide


class NLoRA(Init):
    """Start the three factors of `s B N A` at columns, corner and rows of W: no decomposition of W.

        B₀ = W_{:, :r},  A₀ = W_{:r, :},  W₁₁ = W_{:r, :r},  N₀ = W₁₁⁺ (`middle="pinv"`) or W₁₁ (`middle="block"`)

    With the pseudo-inverse B₀N₀A₀ is Nyström's approximation of W: exact where W has the rank of W₁₁. Singular values
    of W₁₁ below `rcond` times the largest count as zero, since 1/σ would blow N₀ up. With `absorb` the start is taken
    out of W as an offset; it is not divided by s.

    **The authors' code has N₀ = W₁₁ and does not absorb**: `middle="block", absorb=False`. Then the model starts at
    `W + s B₀W₁₁A₀`, away from W by about r w³ an entry, w the size of W's entries.

    On `slora` this is NLoRA. IntTune, which trains N alone, is this init on `lora-xs`. A method without a full N takes
    N₀ into its B.
    """

    slug: ClassVar[str] = "nlora"
    title: ClassVar[str] = "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models"
    source: ClassVar[str] = "arXiv 2502.14482"

    middle: Literal["pinv", "block"] = "pinv"
    absorb: bool = True
    rcond: Annotated[float, Field(ge=0, lt=1, description="relative cut-off of the corner's singular values")] = 1e-3

    def factors(
        self, site: Site, W: Tensor, rank: int, scale: float, statistics: Calibration | None, rng: torch.Generator
    ) -> Start:
        W = wide(W)
        B, A, corner = W[..., :rank], W[..., :rank, :], W[..., :rank, :rank]
        N = torch.linalg.pinv(corner, rtol=self.rcond) if self.middle == "pinv" else corner
        return Start(B, A, N, offset=self.absorb)
