"""SaRA's penalty on the rank of what it trains. Hu et al. 2024, arXiv 2409.06633."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback
from rankfold.deltas.sara import SaRADelta
from rankfold.errors import RankfoldError


class SaRANuclear(Callback):
    """`λ ‖W' ⊙ M‖_*`, the sum of the singular values of the trained entries, on one random weight for each update.

    W' ⊙ M holds the entries' values, not their changes. Drawn among the weights that are matrices with both sides over
    `min_side`. One of the two published optimisers puts the gradient on a detached tensor: λ does nothing there.
    """

    slug: ClassVar[str] = "sara-nuclear"
    title: ClassVar[str] = (
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation (its penalty)"
    )
    source: ClassVar[str] = "arXiv 2409.06633"

    weight: Annotated[float, Field(ge=0, description="λ")] = 5e-4
    min_side: Annotated[int, Field(ge=0, description="smaller matrices are passed over")] = 64
    seed: int = 0

    _deltas: list[SaRADelta] = PrivateAttr(default_factory=list)
    _rng: torch.Generator = PrivateAttr(default_factory=torch.Generator)
    _drawn: int | None = PrivateAttr(None)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._deltas = [
            delta
            for delta in adapter.deltas.values()
            if isinstance(delta, SaRADelta)
            and delta.site.kind not in ("conv", "experts")
            and min(delta.site.out, delta.site.in_) > self.min_side
        ]
        if not self._deltas:
            raise RankfoldError(
                f"sara-nuclear is a penalty on what sara trains in matrices with both sides over {self.min_side}, and "
                f"adapter {adapter.name!r} has none"
            )
        self._rng.manual_seed(self.seed)

    def penalty(self) -> Tensor:
        if self._drawn is None:
            self._drawn = int(torch.randint(len(self._deltas), (), generator=self._rng))
        return self.weight * torch.linalg.matrix_norm(masked(self._deltas[self._drawn]), "nuc")

    def after_step(self, step: int) -> None:
        self._drawn = None

    def on_save(self) -> dict[str, Any]:
        return {"rng": self._rng.get_state()}

    def on_load(self, state: Mapping[str, Any]) -> None:
        self._rng.set_state(state["rng"])


def masked(delta: SaRADelta) -> Tensor:
    """W' ⊙ M (out, in): the values of the entries that train."""
    values = delta.values() if delta.frozen is None else delta.values() * ~delta.frozen
    flat = delta.phi.new_zeros(delta.size).index_add(0, delta.indices, values)
    return flat.view(delta.site.out, delta.site.in_)
