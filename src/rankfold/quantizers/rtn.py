"""Round to nearest: every weight by itself to the nearest value of a grid that its group's extremes fix."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from rankfold.core.calibration import Calibration
from rankfold.core.packed import Packed, Scheme, encode, grouped, pack, rows_of
from rankfold.quantizers._quantizer import Quantizer


class RTN(Quantizer):
    """Round to nearest, for every format; b bits, a group's smallest and largest number, range widened to hold 0:

        asymmetric   s = (max − min) / (2ᵇ − 1),  z = round(−min / s),  q = clamp(round(w / s) + z, 0, 2ᵇ − 1)
        symmetric    s = max|w| / (2ᵇ⁻¹ − 1),  z = 2ᵇ⁻¹
        ternary      s = mean|w|        nf4, fp4, fp8, ...   s = max|w| / max|t|, t the format's numbers

    Codes are chosen for the scales as they are kept. A group of zeros has the smallest scale there is.
    """

    slug: ClassVar[str] = "rtn"
    title: ClassVar[str] = "Round to nearest"
    source: ClassVar[str] = "AWQ's pseudo_quantize_tensor, with GPTQ's range"

    def quantise(self, W: Tensor, scheme: Scheme, statistics: Calibration | None, site: str) -> Packed:
        return nearest(W, scheme)


def nearest(W: Tensor, scheme: Scheme, shrink: Tensor | None = None) -> Packed:
    """W (out, in) rounded to nearest; `shrink` (rows, groups) makes the groups' ranges smaller, by these factors."""
    M = rows_of(W, scheme)
    groups = grouped(M, scheme)
    scales, zeros = ranges(groups if shrink is None else groups * shrink[..., None], scheme)
    return Packed(pack(encode(M, scales, zeros, scheme), scheme), scales, zeros)


def ranges(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales, as they are kept, and zeros of groups (rows, groups, g): both (rows, groups)."""
    dtype = getattr(torch, scheme.scales)
    least = torch.finfo(dtype).tiny
    if scheme.format.startswith("int") and not scheme.symmetric:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / (scheme.levels - 1)).clamp(min=least).to(dtype)
        zeros = (-low / scales.to(low.dtype)).round().clamp(0, scheme.levels - 1)
        return scales, zeros.to(getattr(torch, scheme.zeros))
    size = groups.abs().mean(-1) if scheme.format == "ternary" else groups.abs().amax(-1)
    most = 1.0 if scheme.format == "ternary" else scheme.levels / 2 - 1
    if scheme.table is not None:
        most = max(abs(t) for t in scheme.table if math.isfinite(t))
    return (size / most).clamp(min=least).to(dtype), None
