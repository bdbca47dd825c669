"""AdaDim: Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models.
Heo et al. 2023, arXiv 2309.15531."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from rankfold.core.calibration import Statistic
from rankfold.core.calibration.blocks import Seen, Window, standing
from rankfold.core.component import build
from rankfold.core.packed import Packed, Scheme, dequantise
from rankfold.quantizers._quantizer import Quantizer, weight
from rankfold.quantizers.rtn import RTN


class AdaDim(Quantizer):
    """For each layer the better of two directions of the groups: along its inputs (per OC), or its outputs (per IC).

        along = argmin over {in, out} of ‖f(X; Ŵ_along) − f(X; W)‖²,  Ŵ by `rtn`,  per IC: Ŵ(W) = Ŵ(Wᵀ)ᵀ

    with f the module that the layer is a part of: attention, feed-forward. Few inputs carry outliers of activation;
    groups within these leave the other weights alone. Layers are decided in turn and kept, so that later ones are
    judged beside the packed ones before them; f(X; W) is from before the module's first. Published code measures o and
    down at the layer itself, which is the same where they come last. `rounding="gptq"` packs by `gptq` in the
    direction so chosen, with `act_order`; scales are from before the feedback in groups along the inputs.
    """

    slug: ClassVar[str] = "adadim"
    title: ClassVar[str] = (
        "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models"
    )
    source: ClassVar[str] = "arXiv 2309.15531"

    rounding: Literal["rtn", "gptq"] = "rtn"

    def rule(self, scheme: Scheme) -> Quantizer:
        if self.rounding == "rtn":
            return RTN()
        return build("gptq", act_order=True, static_groups=scheme.along == "in")

    def needs(self) -> tuple[Statistic[Any], ...]:
        return self.rule(Scheme()).needs()

    @property
    def span(self) -> tuple[int, int]:
        return 1, 0

    def pack(self, window: Window, scheme: Scheme) -> Iterator[tuple[str, Packed, Scheme]]:
        calls: dict[nn.Module, list[Seen]] = {}
        for path in window.due:
            module, layer, W = window.enclosing(path), window.layers[path], weight(window.layers[path])
            if module not in calls:
                calls = {module: window.seen(module)}  # with all before it packed
            found: list[tuple[float, Packed, Scheme]] = []
            for along in ("in", "out"):
                tried = scheme.model_copy(update={"along": along})
                packed = RTN().quantise(W, tried, None, path)
                with window.at_rest(), standing({layer: dequantise(packed, W.shape, tried, W.dtype)}):
                    found.append((distance(module, calls[module]), packed, tried))
            _, packed, chosen = min(found, key=lambda one: one[0])
            if self.rounding != "rtn":
                packed = self.rule(chosen).quantise(W, chosen, window.statistics, path)
            yield path, packed, chosen


def distance(module: nn.Module, calls: Sequence[Seen]) -> float:
    """Squared, of what the module gives now from what it gave in these calls."""
    return sum(float((one.again(module) - one.y).double().square().sum()) for one in calls)
