"""Scaling Sparse Fine-Tuning to Large Language Models (SpIEL). Ansell et al. 2024, arXiv 2401.16405."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rankfold.core import Site
from rankfold.core.sparse import SparseMethod


class SFTSparse(SparseMethod):
    """`ΔW = scatter(I, φ)`: K trained values φ, from 0, at flat indices I of W, drawn at random.

    `K = ⌊density · numel(W)⌋`, at least 1; `k` sets it for a weight; `total` shares so many values out over all
    adapted weights, `⌊total · numel(W) / Σ numel⌋` each. The published density d is of the whole model's P parameters:
    here that is `total = d P`.

    Without more the indices stay where they are. The callback `sft-regrow` drops and regrows them while training, which
    is the method of the paper. Weight decay acts on φ: it pulls W' back to the pretrained weight.
    """

    slug: ClassVar[str] = "sft-sparse"
    title: ClassVar[str] = "Scaling Sparse Fine-Tuning to Large Language Models"
    source: ClassVar[str] = "arXiv 2401.16405"

    total: Annotated[int | None, Field(ge=1, description="values over all adapted weights; over density")] = None

    def spread(self, sites: Sequence[Site], seed: int) -> dict[str, dict[str, Any] | None]:
        if self.total is None:
            return {}
        sizes = {site.name: site.count * site.out * site.in_ for site in sites}
        shares = {name: self.total * size // sum(sizes.values()) for name, size in sizes.items()}
        return {name: {"k": k, "total": None} if k else None for name, k in shares.items()}
