"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al. 2023, arXiv 2311.06243."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site
from rankfold.deltas.oft import blockwise, cayley


class BOFT(Method):
    """`W' = diag(s) W Rᵀ`, `R = R̃_m ⋯ R̃_2 R̃_1`: OFT's rotation in m butterfly factors, and an output gain s.

    A factor is block-diagonal up to a permutation, `R̃_i = P_i blockdiag(R_i1, R_i2, …) P_iᵀ`: it cuts the inputs into
    half blocks and turns each of them together with the one 2^(i−1) half blocks further on, as a step of the fast
    Fourier transform does. So m factors mix groups of b·2^(m−1) inputs. `R_ij = (I + Q)⁻¹ (I − Q)` with
    `Q = (R − Rᵀ)/2` of a trained R (b, b) that starts at 0; s starts at 1 and leaves the bias alone.

    `block_size=None` is the largest power of two up to 8 for which the groups divide `in`; b = 8 and m = 2 are a
    setting of the paper. PEFT's default is b = 4 and m = 1, and without its CUDA kernel it takes m = 1 whatever m it
    is told. A convolution is rotated in the inputs of its flattened kernel.
    """

    slug: ClassVar[str] = "boft"
    title: ClassVar[str] = "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"
    source: ClassVar[str] = "arXiv 2311.06243"
    size: ClassVar[str] = "m"

    block_size: Annotated[int | None, Field(ge=2, description="side b of a block; None fits it to each layer")] = None
    m: Annotated[int, Field(ge=1, le=31, description="butterfly factors")] = 2

    def block_at(self, site: Site) -> int:
        """b at a site."""
        fitting = (b for b in (8, 4, 2) if site.in_ % (b << self.m - 1) == 0)
        return self.block_size or next(fitting, 1)

    def delta(self, site: Site, shared: nn.Module | None) -> "BOFTDelta":
        return (RotatedInput if site.kind in ("linear", "conv1d") else BOFTDelta)(site, self)

    def count(self, site: Site) -> int:
        return self.m * site.in_ * self.block_at(site) + site.out

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are ids: a rotation of them would mix the rows of the vocabulary"
        b = self.block_at(site)
        if b == 1 or site.in_ % (b << self.m - 1):
            wanted = (2 if b == 1 else b) << self.m - 1
            return f"its {site.in_} inputs are no multiple of {wanted}, the group that {self.m} butterfly factors mix"
        return "a butterfly pairs half blocks: block_size must be even" if self.m > 1 and b % 2 else None


class BOFTDelta(Delta):
    """R (m, in/b, b, b), s (out,)."""

    def __init__(self, site: Site, method: BOFT):
        super().__init__(site)
        b = method.block_at(site)
        self.R = site.parameter_like(method.m, site.in_ // b, b, b)
        self.s = site.parameter_like(site.out)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.R)
        nn.init.ones_(self.s)

    def rotation(self) -> Tensor:
        """R, whose blocks are the groups of g = b·2^(m−1) inputs: (in/g, g, g).

        The factors are multiplied here and not with the inputs: a group is small, and there are many tokens.
        """
        m, _, b, _ = self.R.shape[-4:]
        blocks = cayley((self.R - self.R.mT) / 2).unflatten(-3, (-1, 1 << m - 1))  # (m, in/g, g/b, b, b)
        product = torch.eye(b << m - 1, dtype=self.R.dtype, device=self.R.device)  # a row for each input of a group
        for i in reversed(range(m)):
            half = (2, 1 << i, b // 2) if i else (1, 1, b)
            rows = product.unflatten(-1, (-1, *half)).transpose(-3, -2).flatten(-2)  # partners come side by side
            rows = rows.flatten(-3, -2).transpose(-3, -2) @ blocks.select(-5, i)
            rows = rows.transpose(-3, -2).unflatten(-2, (-1, half[1])).unflatten(-1, (half[0], half[2]))
            product = rows.transpose(-3, -2).flatten(-4)
        return product

    def transform(self, W: Tensor) -> Tensor:
        return self.s[..., None] * blockwise(W, self.rotation().mT)


class RotatedInput(BOFTDelta):
    """`W' x = s ⊙ W (Rᵀ x)`: a linear layer needs no W'."""

    def inputs(self, x: Tensor) -> Tensor:
        return blockwise(x, self.rotation().to(x.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b = self.b
        return y * self.s if b is None else (y - b) * self.s + b
