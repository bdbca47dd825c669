"""The lottery of Composable Sparse Fine-Tuning for Cross-Lingual Transfer. Ansell et al. 2022, arXiv 2110.07560."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback
from rankfold.core.sparse import Sparse, forget
from rankfold.errors import RankfoldError


class LTSFTLottery(Callback):
    """Train every entry for `steps` N₁ updates, keep the K largest |θ₁ − θ₀| over all weights, start again on those.

    K is what the adapter has on its own, so that a weight gets the share of it that its changes earn, perhaps none.
    Then θ ← θ₀, the modules that are trained in full included, and the optimiser starts anew; the learning rate goes on
    as planned for the run. Ties at the threshold are broken (the authors keep all of them), so there are K exactly.
    `steps=None` is half of the run. The dense phase needs the memory of full fine-tuning of the adapted weights.

    `l1` and `l1_sparse` are the λ of the penalty `(λ/N) Σ|θ − θ₀|` in the two phases, N being how many entries train.
    In the published code its derivative cancels. Its variant with several iterations is left out.
    """

    slug: ClassVar[str] = "lt-sft-lottery"
    title: ClassVar[str] = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer (its lottery)"
    source: ClassVar[str] = "arXiv 2110.07560"

    steps: Annotated[int | None, Field(ge=1, description="updates N₁ of the dense phase; None is half")] = None
    l1: Annotated[float, Field(ge=0)] = 0.0
    l1_sparse: Annotated[float, Field(ge=0)] = 0.0

    _adapter: Any = PrivateAttr(None)
    _model: Any = PrivateAttr(None)
    _deltas: dict[str, Sparse] = PrivateAttr(default_factory=dict)
    _optimizer: Any = PrivateAttr(None)
    _until: int = PrivateAttr(0)
    _drawn: bool = PrivateAttr(False)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._adapter, self._model = adapter, model
        self._deltas = {site: delta for site, delta in adapter.deltas.items() if isinstance(delta, Sparse)}
        if not self._deltas:
            raise RankfoldError(f"lt-sft-lottery chooses sparse indices; no delta of adapter {adapter.name!r} has any")

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        if steps is None and self.steps is None:
            raise RankfoldError("lt-sft-lottery: say how many steps the dense phase has, or plan a number of steps")
        self._optimizer = optimizer
        self._until = self.steps if self.steps is not None else max(1, (steps or 0) // 2)
        for delta in self._deltas.values():
            if not self._drawn and delta.phi.numel() < delta.size:  # else this goes on where a dense phase stopped
                forget(optimizer, [delta.phi])
                delta.place(torch.arange(delta.size, device=delta.phi.device))

    def penalty(self) -> Tensor | None:
        weight = self.l1_sparse if self._drawn else self.l1
        if not weight:
            return None
        phis = [delta.phi for delta in self._deltas.values()]
        return weight * torch.stack([phi.abs().sum() for phi in phis]).sum() / sum(phi.numel() for phi in phis)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self._drawn or step + 1 < self._until:
            return
        k = sum(self._method(site).values(delta.site) for site, delta in self._deltas.items())
        chosen = largest({site: delta.phi for site, delta in self._deltas.items()}, k)
        for site, delta in self._deltas.items():
            delta.place(chosen[site])
        for path, copied in self._adapter.modules.items():
            base = self._model.get_submodule(path).state_dict()
            copied.module.load_state_dict({name: base[name] for name in copied.module.state_dict()})
        forget(self._optimizer, list(self._adapter.parameters()))
        self._settle()

    def _method(self, site: str) -> Any:
        return self._adapter.methods.get(site, self._adapter.method)

    def _settle(self) -> None:
        """The shares that the lottery gave are the sites' own hyperparameters from now on: a file says so."""
        self._drawn = True
        for site, delta in self._deltas.items():
            self._adapter.methods[site] = self._method(site).model_copy(update={"k": delta.phi.numel()})

    def on_save(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def on_load(self, state: Mapping[str, Any]) -> None:
        if state["drawn"]:
            self._settle()


def largest(changes: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The places of the k entries of largest |change| over all tensors together, for each of them, sorted."""
    sizes = torch.tensor([change.numel() for change in changes.values()])
    flat = torch.cat([change.detach().abs().flatten().cpu() for change in changes.values()])
    places = flat.topk(k, sorted=False).indices.sort().values
    ends = sizes.cumsum(0)
    cuts = torch.searchsorted(places, ends[:-1]).tolist()
    parts = zip(changes.items(), places.tensor_split(cuts), (ends - sizes).tolist(), strict=True)
    return {name: (part - begin).to(change.device) for (name, change), part, begin in parts}
