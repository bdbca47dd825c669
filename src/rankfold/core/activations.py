"""What goes into a layer, rounded to 8 bits with a scale for each token."""

from typing import Any, Literal

import torch
from torch import Tensor

Activations = Literal["int8", "fp8", "fp8-e5m2"]
FLOATS: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


def float8(x: Tensor, kind: str) -> Tensor:
    """x as numbers of 8 bits (E4M3 or E5M2), nearest, ties to even; what is too large becomes the largest."""
    dtype = FLOATS[kind]
    most = torch.finfo(dtype).max
    return x.float().clamp(-most, most).to(dtype)


class _Rounded(torch.autograd.Function):
    """Rounding whose gradient is that of x itself, so that adapters on the layers before it train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        if kind == "int8":
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
            s = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
            z = (-low / s).round()
            return (((x / s).round() + z).clamp(0, 255) - z) * s
        most = torch.finfo(FLOATS[kind]).max
        s = (x.abs().amax(-1, keepdim=True) / most).clamp(min=torch.finfo(x.dtype).tiny)
        return float8(x / s, kind).to(x.dtype) * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def rounded(x: Tensor, kind: Activations | None) -> Tensor:
    """x (..., n) with every token's n numbers rounded:

    int8      s = (max − min) / 255,  z = round(−min / s),  x̂ = s (clamp(round(x / s) + z, 0, 255) − z)
    fp8       s = max|x| / 448 (57344 for E5M2),  x̂ = s · float8(x / s)
    """
    y: Any = x if kind is None else _Rounded.apply(x, kind)
    return y
