"""Merges that work entry by entry on task vectors, in one of two spaces."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.compose._merge import Merge, Pair, widest
from rankfold.core.linalg import leading_svd
from rankfold.core.method import Iterations
from rankfold.errors import RankfoldError

Space = Annotated[Literal["delta", "factors"], Field(description="what is merged: the products B A, or B and A apart")]


class EntryMerge(Merge):
    """A rule `merge(τ_1, …, τ_N)` for tensors of one shape, entry by entry.

    In `space="delta"` τ_i is a layer's `ΔW_i = B_i A_i`, and what comes out is cut by SVD to `rank`, by default the
    largest of the adapters' ranks. In `space="factors"` A and B are merged apart, with `sgn(w_i) √|w_i|` for A and
    `√|w_i|` for B, as PEFT does: no SVD, but `B A` then has cross terms `B_i A_j`, and the ranks must be equal.
    """

    space: Space = "delta"
    iterations: Iterations = 4

    def merge(self, taus: Sequence[Tensor], weights: Sequence[float], rng: torch.Generator, seen: Any) -> Tensor:
        raise NotImplementedError

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        if self.space == "factors":
            return *self._factors(pairs, weights, rank, rng, seen), 0.0
        M = self.merge([B @ A for B, A in pairs], weights, rng, seen)
        U, S, Vh = leading_svd(M, rank or widest(pairs), rng, self.iterations)
        B, A = U * S.sqrt()[..., None, :], S.sqrt()[..., None] * Vh
        whole = M.norm()
        return B, A, float((M - B @ A).norm() / whole) if whole > 0 else 0.0

    def _factors(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any
    ) -> Pair:
        ranks = {A.shape[-2] for _, A in pairs} - {0}
        if len(ranks) > 1 or rank not in (None, *ranks):
            raise RankfoldError(
                f"{self.slug} in the space of factors mixes equal ranks and keeps them; here are {sorted(ranks)}"
                + (f", and rank {rank} is asked for" if rank else "")
                + '. Take space="delta", or squeeze the adapters to one rank first'
            )
        # An adapter that leaves the layer alone has zeros there.
        Bs, As = zip(*(pair if pair[1].shape[-2] else _zeros(pair, *ranks) for pair in pairs), strict=True)
        roots = [abs(w) ** 0.5 for w in weights]
        signed = [root if w >= 0 else -root for root, w in zip(roots, weights, strict=True)]
        A = self.merge(As, signed, rng, seen)
        return self.merge(Bs, roots, rng, seen), A

    def vectors(self, pair: Pair) -> Iterable[Tensor]:
        """The parts of one adapter's task vector that lie in a layer; none where the adapter leaves it alone."""
        B, A = pair
        if A.shape[-2] == 0:
            return ()
        return (A, B) if self.space == "factors" else (B @ A,)


def _zeros(pair: Pair, rank: int) -> Pair:
    B, A = pair
    return B.new_zeros(*B.shape[:-1], rank), A.new_zeros(*A.shape[:-2], rank, A.shape[-1])
