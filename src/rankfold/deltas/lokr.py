"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation.

Yeh et al. 2023, arXiv 2309.14859.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Rank, Site, fill


class LoKr(Method):
    """`ΔW = s (C ⊗ D)`, C (out_l, in_m), D (out_k, in_n), `out = out_l·out_k`, `in = in_m·in_n`, `s = α / r`.

    Each side is cut into the two factors nearest its root, the smaller first (256 = 16·16, 128 = 8·16, 127 = 1·127);
    `factor=f` makes the first one f where f divides the side, and at most f where not. Where r is below half the larger
    side of D, D is a product `D_b D_a` through r; with `decompose_both` C is treated alike. In a convolution the
    channels are cut, and the kernel stays with D.

    C starts at 0 and D uniform on ±1/√(its columns), as in PEFT; LyCORIS has it the other way round. Where nothing is
    factorised LyCORIS also sets s = 1. `alpha=None` means α = r, so s = 1.
    """

    slug: ClassVar[str] = "lokr"
    title: ClassVar[str] = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    source: ClassVar[str] = "arXiv 2309.14859"

    rank: Rank = 8
    alpha: float | None = None
    factor: Annotated[int | None, Field(ge=1, description="first factor of each side; None is the nearest root")] = None
    decompose_both: Annotated[bool, Field(description="C through r too, where r is below half its larger side")] = False

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, site: Site, shared: nn.Module | None) -> "LoKrDelta":
        return (LinearLoKr if site.kind in ("linear", "conv1d") else LoKrDelta)(site, self)

    def count(self, site: Site) -> int:
        return sum(rows * columns for rows, columns in self.shapes(site).values())

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """The trained matrices at a site: C or C_b, C_a, and D or D_b, D_a."""
        kernel = site.layer.weight[0, 0].numel() if site.kind == "conv" else 1
        out_l, out_k = split(site.out, self.factor)
        in_m, in_n = split(site.in_ // kernel, self.factor)
        r = self.rank
        C = {"C": (out_l, in_m)}
        D = {"D": (out_k, in_n * kernel)}
        if self.decompose_both and 2 * r < max(out_l, in_m):
            C = {"C_b": (out_l, r), "C_a": (r, in_m)}
        if 2 * r < max(out_k, in_n):
            D = {"D_b": (out_k, r), "D_a": (r, in_n * kernel)}
        return C | D


class LoKrDelta(Delta):
    """C (out_l, in_m) or C_b (out_l, r), C_a (r, in_m); D (out_k, in_n) or D_b (out_k, r), D_a (r, in_n)."""

    def __init__(self, site: Site, method: LoKr):
        super().__init__(site)
        self.scale = method.scale
        for name, shape in method.shapes(site).items():
            self.register_parameter(name, site.parameter_like(*shape))

    def start(self, rng: torch.Generator) -> None:
        for name, tensor in self.named_parameters():
            if name in ("C", "C_b"):
                nn.init.zeros_(tensor)
            else:
                fill(tensor, rng, bound=tensor.shape[-1] ** -0.5)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """C and D."""
        own: dict[str, Any] = self._parameters
        C = own["C"] if "C" in own else own["C_b"] @ own["C_a"]
        return C, own["D"] if "D" in own else own["D_b"] @ own["D_a"]

    def update(self) -> Tensor:
        C, D = self.pairs()
        return (self.scale * C[..., :, None, :, None] * D[..., None, :, None, :]).flatten(-2).flatten(-3, -2)


class LinearLoKr(LoKrDelta):
    """`(C ⊗ D) x` is `C X Dᵀ`, x seen as a matrix X (in_m, in_n): a linear layer needs no ΔW."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        C, D = (part.to(x.dtype) for part in self.pairs())
        X = x.unflatten(-1, (C.shape[-1], D.shape[-1]))
        return y + self.scale * (C @ (X @ D.mT)).flatten(-2).to(y.dtype)


def split(size: int, factor: int | None = None) -> tuple[int, int]:
    """Two factors of the size, the smaller first: nearest to its root, or the first one `factor` or just below."""
    if factor is not None and size % factor == 0:
        return factor, size // factor
    first = next(d for d in range(min(factor or size, math.isqrt(size)), 0, -1) if size % d == 0)
    return first, size // first
