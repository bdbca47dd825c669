"""Moments in 8 bits. Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.core.eightbit import BLOCK, dequantise, quantise
from rankfold.optim._rules import AdamW

SMALLEST = 4096  # fewer numbers than this stay as they are


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """AdamW whose m and v are kept as bytes, with a float32 scale for each 256: 2 n + 8 ⌈n/256⌉ bytes for n numbers."""

    moments: ClassVar[tuple[str, ...]] = ()

    def start(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        n = math.prod(shape)
        if n < SMALLEST:
            return super().start(p, shape, dtype)
        state = {f"{name}.code": p.new_zeros(n, dtype=torch.uint8) for name in "mv"}
        return state | {f"{name}.largest": p.new_zeros(-(-n // BLOCK), dtype=torch.float32) for name in "mv"}

    def direction(self, R: Tensor, state: dict[str, Any], t: int) -> tuple[Tensor, float]:
        if "m" in state:
            return super().direction(R, state, t)
        wide = {
            name: dequantise(state[f"{name}.code"], state[f"{name}.largest"], name == "m", R.dtype).view_as(R)
            for name in "mv"
        }
        out = super().direction(R, wide, t)
        for name, value in wide.items():
            quantise(value.flatten(), state[f"{name}.code"], state[f"{name}.largest"], name == "m")
        return out
