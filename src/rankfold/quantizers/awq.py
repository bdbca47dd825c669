"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration. Lin et al. 2023, arXiv 2306.00978."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core.calibration import Calibration, InputCovariance, InputMagnitude, Statistic
from rankfold.core.calibration.blocks import Window
from rankfold.core.packed import Packed, Scheme, dequantise, rows_of, totals
from rankfold.quantizers._quantizer import Quantizer, weight
from rankfold.quantizers.rtn import nearest


class AWQ(Quantizer):
    """Columns that large inputs meet are made larger before rounding to nearest, and these inputs smaller.

        Ŵ = Q(W diag(t)) diag(t)⁻¹,  t_j = (mean|X_j|)^α / √(max t · min t),  α = argmin over `grid` ‖X (W − Ŵ)ᵀ‖²

    with `grid` values of α in [0, 1] (published code stops before 1). Then each group takes the range, of `clips` from
    the whole down to half of it, whose own error of the output is least; a row keeps its whole ranges where its output
    is nearer with them. So the layer is no further off than by `rtn`, which is α = 0.

    The paper folds 1/t into the norm or the layer before; here it stays with the layer, which then needs nothing of
    its surroundings, and q, k and v choose their own. Published code measures at the enclosing module, and does not
    clip q and k.
    """

    slug: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
    source: ClassVar[str] = "arXiv 2306.00978"

    grid: Annotated[int, Field(ge=2, description="values of α that are tried")] = 20
    clips: Annotated[int, Field(ge=1, description="ranges that are tried; 1 for the whole range alone")] = 10

    def needs(self) -> tuple[Statistic[Any], ...]:
        return InputMagnitude(), InputCovariance()

    def pack(self, window: Window, scheme: Scheme) -> Iterator[tuple[str, Packed, Scheme]]:
        for path in window.due:
            packed = self.quantise(weight(window.layers[path]), scheme, window.statistics, path)
            yield path, packed, scheme.model_copy(update={"balanced": True})

    def quantise(self, W: Tensor, scheme: Scheme, statistics: Calibration | None, site: str) -> Packed:
        assert statistics is not None  # quantize collects what `needs` names
        sizes, C = statistics.get(InputMagnitude(), site).mean.to(W), statistics.get(InputCovariance(), site).to(W)
        found: list[tuple[float, Tensor]] = []
        for alpha in torch.linspace(0, 1, self.grid).tolist():
            t = sizes.clamp(min=1e-4) ** alpha
            t = (t / (t.max() * t.min()).sqrt()).float().to(W)  # as it is kept
            E = W - dequantise(nearest(W * t, scheme), W.shape, scheme, W.dtype) / t
            found.append((float((E @ C * E).sum()), t))
        _, t = min(found, key=lambda one: one[0])
        packed = self.clipped(W * t, C / (t * t[:, None]), scheme)
        return packed._replace(balance=t.float())

    def clipped(self, W: Tensor, C: Tensor, scheme: Scheme) -> Packed:
        """W (out, in) rounded with the best range for each group, C (in, in) being the second moment of its inputs."""
        rows, _, groups, _ = scheme.layout(*W.shape)
        whole = W.new_ones(1 if scheme.group == "tensor" else rows, groups)
        ratios = [1 - 0.5 * i / self.clips for i in range(self.clips)]
        group = torch.arange(W.shape[1], device=W.device)  # of each input, where C between groups plays no part
        if scheme.along == "in" or scheme.group == "tensor":
            group = group // scheme.group if isinstance(scheme.group, int) else group * 0
        own = C * (group == group[:, None])

        def error(shrink: Tensor) -> Tensor:
            return W - dequantise(nearest(W, scheme, shrink), W.shape, scheme, W.dtype)

        errors = [totals(rows_of(E @ own * E, scheme), scheme) for E in (error(whole * ratio) for ratio in ratios)]
        best = W.new_tensor(ratios)[torch.stack(errors).argmin(0)]
        before, after = ((E @ C * E).sum(1, keepdim=True) for E in (error(whole), error(best)))
        if scheme.along == "out" or scheme.group == "tensor":  # groups cross the rows
            before, after = before.sum(), after.sum()
        return nearest(W, scheme, torch.where(after < before, best, whole))
