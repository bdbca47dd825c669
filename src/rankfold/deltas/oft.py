"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al. 2023, arXiv 2306.07280."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site


class OFT(Method):
    """`W' = W Rᵀ`, `R = blockdiag(R₁, R₂, …)`, `Rᵢ = (I + Qᵢ)⁻¹ (I − Qᵢ)`: the input is rotated, block by block.

    Qᵢ (b, b) is skew-symmetric; the b(b−1)/2 numbers above its diagonal are trained and start at 0, where Rᵢ = I. The
    rows of W keep their lengths and the angles between them. `block_size=None` is the largest divisor of `in` up to
    32. A convolution is rotated in the inputs of its flattened kernel.

    `neumann=n` takes n terms of a series for the inverse, `Rᵢ ≈ (I − Q) Σ_{k ≤ n−2} (−Q)^k`: quicker for large blocks,
    and only nearly orthogonal. That is PEFT's default, with n = 5, and there it is the series of the opposite rotation
    `(I − Q)⁻¹ (I + Q)`, so the same file means Rᵢᵀ with `use_cayley_neumann=False`; ours is one rotation either way.
    """

    slug: ClassVar[str] = "oft"
    title: ClassVar[str] = "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"
    source: ClassVar[str] = "arXiv 2306.07280"
    size: ClassVar[str] = "block_size"

    block_size: Annotated[int | None, Field(ge=2, description="side b of a block; None fits it to each layer")] = None
    neumann: Annotated[int | None, Field(ge=2, description="terms of a series for the inverse; None is exact")] = None

    def block_at(self, site: Site) -> int:
        """b at a site."""
        return self.block_size or next(b for b in range(32, 0, -1) if site.in_ % b == 0)

    def delta(self, site: Site, shared: nn.Module | None) -> "OFTDelta":
        return (RotatedInput if site.kind in ("linear", "conv1d") else OFTDelta)(site, self)

    def count(self, site: Site) -> int:
        return site.in_ * (self.block_at(site) - 1) // 2

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are ids: a rotation of them would mix the rows of the vocabulary"
        b = self.block_at(site)
        if b == 1:
            return f"nothing up to 32 divides its {site.in_} inputs, and a block of 1 cannot turn: name a block_size"
        return f"its {site.in_} inputs cannot be cut into blocks of {b}" if site.in_ % b else None


class OFTDelta(Delta):
    """q (in/b, b(b−1)/2): the numbers above the diagonal of each Q, row by row."""

    def __init__(self, site: Site, method: OFT):
        super().__init__(site)
        self.size, self.terms = method.block_at(site), method.neumann or 0
        self.q = site.parameter_like(site.in_ // self.size, self.size * (self.size - 1) // 2)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.q)

    def rotation(self) -> Tensor:
        """The blocks of R (in/b, b, b)."""
        i, j = torch.triu_indices(self.size, self.size, 1, device=self.q.device)
        upper = self.q.new_zeros(*self.q.shape[:-1], self.size**2).index_copy(-1, i * self.size + j, self.q)
        upper = upper.unflatten(-1, (self.size, self.size))
        return cayley(upper - upper.mT, self.terms)

    def transform(self, W: Tensor) -> Tensor:
        return blockwise(W, self.rotation().mT)


class RotatedInput(OFTDelta):
    """`W' x = W (Rᵀ x)`: a linear layer needs no W'."""

    def inputs(self, x: Tensor) -> Tensor:
        return blockwise(x, self.rotation().to(x.dtype))


def cayley(Q: Tensor, terms: int = 0) -> Tensor:
    """`(I + Q)⁻¹ (I − Q)`, orthogonal where Q (…, b, b) is skew-symmetric; or so many terms of its Neumann series."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not terms:
        return torch.linalg.solve(eye + Q, eye - Q)
    inverse = eye.expand_as(Q)
    for _ in range(terms - 2):
        inverse = eye - Q @ inverse
    return inverse - Q @ inverse


def blockwise(x: Tensor, R: Tensor) -> Tensor:
    """`x blockdiag(R)`: x (…, in), blocks R (in/b, b, b); of experts, x (E, …, in) and R (E, in/b, b, b)."""
    dtype = torch.promote_types(x.dtype, R.dtype)
    x = x.unflatten(-1, R.shape[-3:-1]).to(dtype)
    return torch.einsum("...kb,kbc->...kc" if R.dim() == 3 else "eokb,ekbc->eokc", x, R.to(dtype)).flatten(-2)
