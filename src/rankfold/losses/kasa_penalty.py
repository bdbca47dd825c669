"""KaSA's two penalties. Wang et al. 2024, arXiv 2412.06071."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback, Factored
from rankfold.errors import RankfoldError
from rankfold.losses.orthogonality import departure


class KaSAPenalty(Callback):
    """`(1/N) Σ_layers [β ‖λ‖² + γ (‖Bᵀ B − I‖_F + ‖A Aᵀ − I‖_F)]`: small values λ, orthonormal vectors B and A.

    Norms of the r×r Gram matrices, not squared. For every delta `s B diag(λ) A` that trains all three (`kasa`,
    `adalora-svd`, `sorsa`); N counts the layers, each expert as one. The authors average as here, PEFT sums: N times
    as much. The authors' code takes the in×in and out×out Gram matrices, which cannot be the identity; the paper and
    PEFT those above.
    """

    slug: ClassVar[str] = "kasa-penalty"
    title: ClassVar[str] = "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models (its penalties)"
    source: ClassVar[str] = "arXiv 2412.06071"

    beta: Annotated[float, Field(ge=0, description="β: weight of the squared singular values")] = 1e-4
    gamma: Annotated[float, Field(ge=0, description="γ: weight of the departure from orthonormal vectors")] = 1e-3
    _deltas: list[Factored] = PrivateAttr(default_factory=list)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._deltas = [delta for delta in adapter.deltas.values() if _is_trained_svd(delta)]
        if not self._deltas:
            raise RankfoldError(
                f"kasa-penalty is a penalty on B, λ and A, and no delta of adapter {adapter.name!r} trains these three"
            )

    def penalty(self) -> Tensor:
        layers = [
            self.beta * delta.M.square().sum(-1).reshape(-1) + self.gamma * (departure(delta.B.mT) + departure(delta.A))
            for delta in self._deltas
        ]
        return torch.cat(layers).mean()


def _is_trained_svd(delta: Any) -> bool:
    return isinstance(delta, Factored) and not delta.full and {"B", delta.middle, "A"} <= delta._parameters.keys()
