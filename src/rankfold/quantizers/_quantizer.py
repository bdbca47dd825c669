"""What a quantiser says, and `quantize`, which puts packed layers in the place of a model's linear ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.core.calibration import Calibration, Statistic, calibrate
from rankfold.core.component import Component, build
from rankfold.core.layers import Adapted
from rankfold.core.packed import Packed, PackedLinear, Scheme, dequantise
from rankfold.core.quantized import is_plain
from rankfold.core.targets import Targets, find
from rankfold.errors import RankfoldError, UnsupportedError


class Quantizer(Component):
    """Finds codes and scales of a weight: `quantise(W, scheme, statistics, site)`, W (out, in) in float32 or float64.

    `needs` names the statistics of the site that it reads.
    """

    axis: ClassVar[str] = "quantizers"

    def needs(self) -> tuple[Statistic[Any], ...]:
        return ()

    def quantise(self, W: Tensor, scheme: Scheme, statistics: Calibration | None, site: str) -> Packed:
        raise NotImplementedError


@dataclass(frozen=True)
class Quantised:
    """What became of a layer: bits a number, everything counted, and `‖W − Ŵ‖ / ‖W‖` (Frobenius)."""

    bits: float
    error: float


@torch.no_grad()
def quantize(
    model: nn.Module,
    scheme: Scheme,
    how: str | Quantizer = "rtn",
    *,
    targets: Targets = "all-linear",
    calibration: Calibration | Iterable[Any] | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, Quantised]:
    """Put a `PackedLinear` in the place of every linear layer that `targets` names, in the model itself.

    All weights are packed before the first layer is exchanged, so that an error leaves the model as it was.

    Args:
        model: with float weights there; without adapters.
        scheme: how the weights are kept.
        how: the quantiser, or its slug with its defaults.
        targets: which layers, as for `attach`.
        calibration: for quantisers that need statistics: batches of model inputs, or what `rankfold.calibrate` made.
        progress: called after each layer.

    Returns:
        what became of each layer, by its path.

    Raises:
        RankfoldError: a weight holds NaN or infinity, a layer is adapted, or statistics are missing.
        UnsupportedError: a layer is quantised already, or is no linear layer.
    """
    rule = build(how) if isinstance(how, str) else how
    if not isinstance(rule, Quantizer):
        raise RankfoldError(f"{how!r} quantises nothing; see `rankfold methods --axis quantizers`")
    layers: dict[str, Any] = {target.path: target.layer for target in find(model, targets)}
    for path, layer in layers.items():
        _check(path, layer)
    statistics = _statistics(model, rule, list(layers), calibration)
    made: dict[nn.Module, PackedLinear] = {}
    report: dict[str, Quantised] = {}
    for path, layer in layers.items():
        W = layer.weight.detach()
        wide = W if W.dtype == torch.float64 else W.float()
        packed, shape = rule.quantise(wide, scheme, statistics, path), (layer.out_features, layer.in_features)
        made[layer] = PackedLinear.of(layer, packed, scheme)
        norm, apart = wide.norm(), (wide - dequantise(packed, shape, scheme, wide.dtype)).norm()
        report[path] = Quantised(scheme.bits(*shape), float(apart / norm) if norm > 0 else 0.0)
        if progress is not None:
            progress()
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in made:
                module._modules[name] = made[child]
    return report


def _statistics(
    model: nn.Module, rule: Quantizer, paths: list[str], calibration: Calibration | Iterable[Any] | None
) -> Calibration | None:
    """What the rule needs; q, k and v share what they see."""
    needs = rule.needs()
    if not needs and calibration is not None:
        raise RankfoldError(f"calibration= was given, but {rule.slug} needs no statistics")
    if needs and calibration is None:
        raise RankfoldError(f"{rule.slug} needs statistics of the data: quantize(..., calibration=batches)")
    if not needs or isinstance(calibration, Calibration):
        return calibration  # type: ignore[return-value]
    return calibrate(model, calibration, needs, paths)  # type: ignore[arg-type]


def _check(path: str, layer: Any) -> None:
    if isinstance(layer, Adapted):
        raise RankfoldError(f"{path} is adapted: quantise the base model first, then attach or load the adapter")
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(f"{path} is a {type(layer).__name__}; only linear layers are packed: leave it out")
    if not is_plain(layer.weight):
        raise UnsupportedError(f"{path} is quantised already; take the model with its float weights")
    if layer.weight.is_meta:
        raise RankfoldError(f"{path} has no numbers (it is on the meta device): load its weights first")
    if not bool(layer.weight.isfinite().all()):
        raise RankfoldError(f"the weight of {path} holds NaN or infinity: no scale fits it")
