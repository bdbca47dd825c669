"""SVD merge: a weighted sum of adapters, cut to a rank. PEFT's "svd" of `add_weighted_adapter`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.compose._merge import Merge, Pair, stacked, widest
from rankfold.core.linalg import truncate


class SVDMerge(Merge):
    """`M = Σ w_i B_i A_i = U diag(σ) Vᵀ`, `B = U_t σ_t^½`, `A = σ_t^½ V_tᵀ`; t is the largest of the adapters' ranks.

    The best of that rank for the weighted sum: what is lost is `Σ_{i>t} σ_i²`. M is not formed, only the small core
    between the QR factors of `[B_1 … B_N]` and of the stacked A_i. PEFT forms and decomposes M, gives all of σ to B,
    and can clamp the entries of both at a quantile, which is no longer the best; here each gets √σ.
    """

    slug: ClassVar[str] = "svd-merge"
    title: ClassVar[str] = "Weighted sum of adapters, cut to a rank by SVD"
    source: ClassVar[str] = "PEFT"

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        B, A = stacked(pairs, weights)
        B, A, error = truncate(B, A, min(rank or widest(pairs), *B.shape[-2:], A.shape[-1]))
        return B, A, float(error.amax())
