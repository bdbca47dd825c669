"""SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation.

Hu et al. 2024, arXiv 2409.06633.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core import Site
from rankfold.core.layers import as_matrix
from rankfold.core.quantized import dense
from rankfold.core.sparse import Sparse, SparseMethod


class SaRA(SparseMethod):
    """Train the entries that matter least to the pretrained weight: `M = |W| < t`, `W'[M] = W[M] + φ`, φ from 0.

    `threshold` is t (the paper: 2e-3 for Stable Diffusion, some 10 to 20 % of its weights); weights without an entry
    below t are left alone. Without it each weight trains the `density` of its entries that are smallest, so that t is
    a quantile. The callbacks `sara-nuclear` (the penalty `λ ‖W' ⊙ M‖_*`) and `sara-reselect` (the progressive step)
    are the rest of the method; without them this is AdamW on a mask. A low-bit base has many equal small weights, of
    which some are taken: choose another method there.

    The paper trains w = W'[M] itself, so its weight decay draws towards 0 and not, as here, towards the pretrained
    value, which is within t of 0. Its code writes |w| into the model at the first and at the progressive step; this
    does not. Its learning rate is `1e-3 exp(−350 t)`.
    """

    slug: ClassVar[str] = "sara"
    title: ClassVar[str] = (
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation"
    )
    source: ClassVar[str] = "arXiv 2409.06633"

    density: Annotated[float, Field(gt=0, le=1, description="share of each weight's entries, the smallest")] = 0.1
    threshold: Annotated[float | None, Field(gt=0, description="t: train the entries with |W| < t")] = None

    def spread(self, sites: Sequence[Site], seed: int) -> dict[str, dict[str, Any] | None]:
        if self.threshold is None:
            return {}
        small = {site.name: int((_weight(site).abs() < self.threshold).sum()) for site in sites}
        return {name: {"k": k} if k else None for name, k in small.items()}

    def delta(self, site: Site, shared: Any) -> "SaRADelta":
        return SaRADelta(site, self.values(site), self.threshold)


def _weight(site: Site) -> Tensor:
    return as_matrix(site, dense(site.stored, site.layer))


class SaRADelta(Sparse):
    """φ (K,) at the K entries of smallest |W|."""

    frozen: Tensor | None

    def __init__(self, site: Site, k: int, threshold: float | None):
        super().__init__(site, k)
        self.threshold = threshold
        self.register_buffer("frozen", None, persistent=False)  # which entries the progressive step has stopped

    def start(self, rng: torch.Generator) -> None:
        small = self.W.detach().abs().flatten().topk(self.phi.numel(), largest=False).indices
        self.place(small.sort().values)

    @property
    def w(self) -> Tensor:
        """W[M] (K,), as pretrained."""
        return self.W.detach().reshape(-1).index_select(0, self.indices).to(self.phi.dtype)

    def values(self) -> Tensor:
        """W'[M] (K,)."""
        return self.w + self.phi

    def small(self) -> Tensor:
        """Which entries are below t (K,): the one that was given, or just over the largest that a share chose."""
        now = self.values().detach().abs()
        return now <= self.w.abs().max() if self.threshold is None else now < self.threshold
