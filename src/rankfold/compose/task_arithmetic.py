"""Task arithmetic: Editing Models with Task Arithmetic. Ilharco et al. 2022, arXiv 2212.04089."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.compose._entries import EntryMerge
from rankfold.compose._merge import Pair, stacked
from rankfold.errors import RankfoldError


class TaskArithmetic(EntryMerge):
    """`τ = Σ w_i τ_i`, the weighted sum of task vectors; a negative w_i takes an adapter away.

    In the space of products it is exact, and nothing is decomposed: `ΔW = Σ w_i B_i A_i`, with `B = [B_1 … B_N]` and
    the `w_i A_i` above one another ("cat" in PEFT), of rank Σ r_i, or the layer's size if that is less. In the space of
    factors it is PEFT's "linear": `A = Σ sgn(w_i) √|w_i| A_i`, `B = Σ √|w_i| B_i`, of rank r. That saves rank and
    destroys much: factors of adapters from different starts have nothing to do with each other.

    The paper sums changes of whole models with λ = 0.3 to 0.4, or tunes one λ on validation data; here w_i = 1/N.
    """

    slug: ClassVar[str] = "task-arithmetic"
    title: ClassVar[str] = "Editing Models with Task Arithmetic"
    source: ClassVar[str] = "arXiv 2212.04089"

    def merge(self, taus: Sequence[Tensor], weights: Sequence[float], rng: torch.Generator, seen: Any) -> Tensor:
        return weighted_sum(taus, weights)

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        if self.space == "factors":
            return super().combine(pairs, weights, rank, rng)
        if rank is not None:
            raise RankfoldError("task-arithmetic keeps every component of every adapter: svd-merge cuts to a rank")
        return *stacked(pairs, weights), 0.0


def weighted_sum(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_i τ_i`."""
    total = weights[0] * taus[0]
    for tau, w in zip(taus[1:], weights[1:], strict=True):
        total.add_(tau, alpha=w)
    return total
