"""The progressive step of SaRA. Hu et al. 2024, arXiv 2409.06633."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback
from rankfold.core.sparse import forget
from rankfold.deltas.sara import SaRADelta
from rankfold.errors import RankfoldError


class SaRAReselect(Callback):
    """After `step` n₀ updates, M becomes `|W'| < t`: entries that have grown beyond t stay what they are from then on.

    The others go on training, with a new optimiser state. t is the method's threshold or, for one that chose by share,
    the largest |W| it chose in the weight. In the paper n₀ is 2500, half of the training: `step=None` is half of the
    run. The authors' code writes absolute values into the model here, and one version skips that update.
    """

    slug: ClassVar[str] = "sara-reselect"
    title: ClassVar[str] = (
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation (its second step)"
    )
    source: ClassVar[str] = "arXiv 2409.06633"

    step: Annotated[int | None, Field(ge=1, description="updates n₀ before the progressive step; None is half")] = None

    _deltas: dict[str, SaRADelta] = PrivateAttr(default_factory=dict)
    _optimizer: Any = PrivateAttr(None)
    _at: int = PrivateAttr(0)
    _kept: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # what the frozen entries are, by site

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._deltas = {site: delta for site, delta in adapter.deltas.items() if isinstance(delta, SaRADelta)}
        if not self._deltas:
            raise RankfoldError(f"sara-reselect is a step of sara, and adapter {adapter.name!r} is none")

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        if steps is None and self.step is None:
            raise RankfoldError("sara-reselect: say after how many updates, or plan a number of steps")
        self._optimizer = optimizer
        self._at = self.step if self.step is not None else max(1, (steps or 0) // 2)

    def before_step(self, step: int) -> None:
        frozen = {site: delta for site, delta in self._deltas.items() if delta.frozen is not None}
        self._kept = {site: delta.phi.detach()[delta.frozen] for site, delta in frozen.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for site, kept in self._kept.items():  # against momentum, weight decay and whatever else moves them
            self._deltas[site].phi[self._deltas[site].frozen] = kept
        if step + 1 == self._at:
            for delta in self._deltas.values():
                delta.frozen = ~delta.small()
            forget(self._optimizer, [delta.phi for delta in self._deltas.values()])

    def on_save(self) -> dict[str, Any]:
        frozen = {site: delta.frozen for site, delta in self._deltas.items()}
        return {"frozen": {site: mask.clone() for site, mask in frozen.items() if mask is not None}}

    def on_load(self, state: Mapping[str, Any]) -> None:
        for site, mask in state["frozen"].items():
            self._deltas[site].frozen = mask.to(self._deltas[site].phi.device)
