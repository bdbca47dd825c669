"""OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning. Li et al. 2024,
arXiv 2405.18380.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core.calibration import Calibration, InputSecondMoment, calibrate
from rankfold.core.delta import Site
from rankfold.core.layers import as_matrix
from rankfold.core.quantized import dense
from rankfold.core.targets import all_linear, find, layer_of
from rankfold.errors import RankfoldError
from rankfold.optim.lisa import LISA


class OwLore(LISA):
    """LISA that draws layer l with the probability `p_l = D_l / ΣD`, and GaLore in the layers that are awake:

        A_ij = ‖X_j‖ |W_ij|,  D_l = the share of the layer's A_ij above τ · their mean

    D_l, the layer's share of outliers, is its score. Scores are counted over the linear layers from batches of training
    rows before the first step (in a bare loop `on_data` comes before `on_start`), or given: those of `outlier_ratios`,
    which takes a calibration that is there, or any others. All alike is LISA, 1, 2, … favours later layers, max D − D
    those without outliers. Layers with a score of 0 are never drawn. γ are drawn every K steps without replacement.

    GaLore is the optimiser `galore`, in the paper with rank=128, every=100, scale=1. Its state goes with the layers
    that fall asleep, so a layer that wakes has a basis of its first gradient; the authors keep what it had, basis and
    moments (`on_switch="keep"`). Their code reads the scores from a file.
    """

    slug: ClassVar[str] = "owlore"
    title: ClassVar[str] = (
        "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning"
    )
    source: ClassVar[str] = "arXiv 2405.18380"

    reads: ClassVar[Literal["training", "validation"] | None] = "training"

    scores: Annotated[
        dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None,
        Field(description="by layer, as model.layers.0, in proportion to the chance of being drawn; None counts D"),
    ] = None
    threshold: Annotated[float, Field(gt=0, description="τ: an outlier is so many times the mean")] = 13.0
    batches: Annotated[int, Field(ge=1, description="batches of training rows that D is counted from")] = 16
    layers: Annotated[int, Field(ge=0, description="layers γ awake at a time")] = 5
    every: Annotated[int, Field(ge=1, description="steps K between choices")] = 50
    _model: Any = PrivateAttr(None)
    _batch_at: Callable[[int], Mapping[str, Any]] | None = PrivateAttr(None)
    _counted: dict[str, float] | None = PrivateAttr(None)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._model = model
        super().on_attach(adapter, model)

    def on_data(self, batch_at: Callable[[int], Mapping[str, Any]]) -> None:
        self._batch_at = batch_at

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        if self.scores is None and self._counted is None:
            self._counted = self._count()
        super().on_start(optimizer, steps)

    def _count(self) -> dict[str, float]:
        if self._batch_at is None:
            raise RankfoldError("owlore counts outliers in training batches: call on_data(batch_at), or give scores")
        names = [name for name in all_linear(self._model) if layer_of(f"{name}.") in self._blocks]
        if not names:
            raise RankfoldError("owlore counts outliers in linear layers, and no trained layer has one: give scores")
        batches = map(self._batch_at, range(self.batches))
        statistics = calibrate(self._model, batches, [InputSecondMoment()], names, progress=False)
        return outlier_ratios(self._model, statistics, self.threshold)

    def chosen(self, interval: int, count: int) -> Sequence[int]:
        scores = self.scores if self.scores is not None else self._counted
        if scores is None:  # not counted yet: only how many there are can be checked
            return super().chosen(interval, count)
        if scores.keys() != self._blocks.keys():
            there, given = ", ".join(self._blocks), ", ".join(scores) or "none"
            raise RankfoldError(f"owlore: scores must name the trained layers, {there}; they name {given}")
        D = torch.tensor([scores[name] for name in self._blocks], dtype=torch.float64)
        if self.layers > int((D > 0).sum()):
            raise RankfoldError(f"owlore: {self.layers} layers awake, and {int((D > 0).sum())} have a score above 0")
        return torch.multinomial(D, self.layers, generator=self.rng(interval)).tolist() if self.layers else []

    def on_save(self) -> dict[str, Any]:
        return {**super().on_save(), "counted": self._counted}

    def on_load(self, state: Mapping[str, Any]) -> None:
        super().on_load(state)
        self._counted = state["counted"]


def outlier_ratios(model: nn.Module, statistics: Calibration, threshold: float = 13.0) -> dict[str, float]:
    """D of each layer, by name, from `calibrate(model, batches, [InputSecondMoment()])` and the weights of its sites.

    The matrices of a layer are taken together: one mean, one count.
    """
    layers: dict[str, list[Site]] = {}
    for target in find(model, statistics.sites):
        layer = layer_of(f"{target.site.name}.")
        if layer is not None and target.site.name in statistics.sites:
            layers.setdefault(layer, []).append(target.site)
    if not layers:
        raise RankfoldError("owlore: no site of the calibration is in a numbered layer")
    return {layer: _ratio(sites, statistics, threshold) for layer, sites in layers.items()}


@torch.no_grad()
def _ratio(sites: Sequence[Site], statistics: Calibration, threshold: float) -> float:
    def scores(site: Site) -> Tensor:
        W = as_matrix(site, dense(site.stored, site.layer))
        return W.abs() * statistics.get(InputSecondMoment(), site.name).to(W).sqrt()

    count = sum(site.out * site.in_ for site in sites)
    mean = sum(float(scores(site).sum(dtype=torch.float64)) for site in sites) / count
    return sum(int((scores(site) > threshold * mean).sum()) for site in sites) / count
