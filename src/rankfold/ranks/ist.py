"""Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large
Language Models (IST). Yao et al. 2024, arXiv 2410.11772.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from rankfold.core import Delta
from rankfold.core.targets import layer_of
from rankfold.errors import RankfoldError
from rankfold.optim._blocks import BlockSchedule

_TRIES = 100  # draws for a set of layers that is not there yet, where few are likely


class IST(BlockSchedule):
    """Each step trains ⌊L/4⌋ of the L layers, drawn without replacement with weights `σ(−φ_l)`, φ₀ = 0.

    Every `period` steps K distinct sets S_k of ⌊L/2⌋ layers are drawn with weights σ(φ_l); with the changes of their
    layers damped to a quarter, the loss of one batch (the same for all, in eval mode, without gradient) gives

        R_k = exp(−loss_k),   φ_l += η (R_k − mean R) σ(φ_l) (1 − σ(φ_l))   for every k and every l in S_k

    with σ(φ) from before the update. So φ grows where damping helps: it is unimportance, the paper's importance is −φ.
    Of any delta the whole change is damped. Layers asleep keep their moments and are not stepped; what is in no layer
    is trained all the time. At least one layer is trained and one damped. Batches have the size of the training's; the
    authors' have 16 rows. The first update comes before step `period`, counted from 0.
    """

    slug: ClassVar[str] = "ist"
    title: ClassVar[str] = (
        "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of "
        "Large Language Models"
    )
    source: ClassVar[str] = "arXiv 2410.11772"
    without_adapter: ClassVar[bool] = False  # it damps an adapter's changes
    reads: ClassVar[Literal["training", "validation"] | None] = "training"

    every: Annotated[int, Field(ge=1, description="steps between draws of the layers that are trained")] = 1
    on_switch: Annotated[Literal["drop", "keep"], Field(description="the optimiser's state of layers asleep")] = "keep"
    trained: Annotated[float, Field(gt=0, le=1, description="share of the layers that is trained")] = 0.25
    damped: Annotated[float, Field(gt=0, lt=1, description="share of the layers that is damped in a probe")] = 0.5
    factor: Annotated[float, Field(ge=0, lt=1, description="how much of a damped layer's change acts")] = 0.25
    period: Annotated[int, Field(ge=1, description="steps between updates of φ")] = 10
    probes: Annotated[int, Field(ge=2, description="sets K that are compared")] = 3
    rate: Annotated[float, Field(ge=0, description="step size η of φ")] = 10.0

    _model: Any = PrivateAttr(None)
    _deltas: dict[str, list[Delta]] = PrivateAttr(default_factory=dict)
    _batch_at: Callable[[int], Mapping[str, Any]] | None = PrivateAttr(None)
    _phi: Tensor | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _fits(self) -> "IST":
        if self.period % self.every:
            raise ValueError("period must be a multiple of every: φ changes when layers are drawn")
        return self

    @property
    def scores(self) -> dict[str, float]:
        """φ of each layer."""
        return dict(zip(self._blocks, self._score(len(self._blocks)).tolist(), strict=True))

    def chosen(self, interval: int, count: int) -> Sequence[int]:
        weights = (-self._score(count)).sigmoid()
        return torch.multinomial(weights, max(1, int(self.trained * count)), generator=self.rng(interval)).tolist()

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        if adapter is None:
            raise RankfoldError("ist damps the changes of an adapter: attach one")
        super().on_attach(adapter, model)
        self._model, self._deltas = model, {}
        for site, delta in adapter.deltas.items():
            if (layer := layer_of(f"{site}.")) in self._blocks:
                self._deltas.setdefault(layer, []).append(delta)  # type: ignore[arg-type]
        if len(self._blocks) < 2:
            raise RankfoldError("ist compares layers, and the adapter is in one only")

    def on_data(self, batch_at: Callable[[int], Mapping[str, Any]]) -> None:
        self._batch_at = batch_at

    def after_step(self, step: int) -> None:
        if (step + 1) % self.period == 0:
            sets = self._damped_sets(step + 1)
            if len(sets) > 1:
                losses = [self._loss((step + 1) // self.period - 1, layers) for layers in sets]
                self._phi = learn(self._score(len(self._blocks)), sets, losses, self.rate)
        super().after_step(step)

    def _score(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64) if self._phi is None else self._phi

    def _damped_sets(self, t: int) -> list[list[int]]:
        """K different sets, or as many as there are."""
        count, rng = len(self._blocks), self.rng(-t)
        size = max(1, int(self.damped * count))
        weights, sets = self._score(count).sigmoid(), []
        for _ in range(_TRIES):
            drawn = sorted(torch.multinomial(weights, size, generator=rng).tolist())
            if drawn not in sets:
                sets.append(drawn)
            if len(sets) == min(self.probes, math.comb(count, size)):
                break
        return sets

    @torch.no_grad()
    def _loss(self, batch: int, layers: Sequence[int]) -> float:
        if self._batch_at is None:
            raise RankfoldError("ist measures the loss of training batches: call on_data(batch_at)")
        names = list(self._blocks)
        damped = [delta for i in layers for delta in self._deltas.get(names[i], ())]
        before = [delta.strength for delta in damped]
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            for delta, strength in zip(damped, before, strict=True):
                delta.strength = lambda own=strength: self.factor * (1.0 if own is None else own())
            self._model.eval()
            loss = float(self._model(**self._batch_at(batch)).loss)
        finally:
            for delta, strength in zip(damped, before, strict=True):
                delta.strength = strength
            for module, mode in modes:
                module.training = mode
        if math.isnan(loss):
            raise RankfoldError("ist: the loss of a batch with damped layers is NaN")
        return loss

    def on_save(self) -> dict[str, Any]:
        return {**super().on_save(), "phi": self._phi}

    def on_load(self, state: Mapping[str, Any]) -> None:
        super().on_load(state)
        self._phi = state["phi"]


def learn(phi: Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float) -> Tensor:
    """φ (L,) after the losses that damping each of the sets gave."""
    rewards = torch.tensor([math.exp(-loss) for loss in losses], dtype=phi.dtype)
    slope, new = phi.sigmoid() * (1 - phi.sigmoid()), phi.clone()
    for layers, reward in zip(sets, rewards - rewards.mean(), strict=True):
        new[list(layers)] += rate * reward * slope[list(layers)]
    return new
