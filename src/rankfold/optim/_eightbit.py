"""Moments in 8 bits. Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.optim._rules import AdamW

BLOCK = 256  # numbers that share one scale
SMALLEST = 4096  # fewer numbers than this stay as they are


@functools.lru_cache(maxsize=16)
def codes(signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 256 values of a byte, rising: decades from 1e-6 to 1, each with twice the steps of the one below; 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        steps = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        decade = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += decade + [-value for value in decade] * signed
    return torch.tensor(sorted(values), dtype=torch.float64).to(device=device, dtype=dtype)


def quantise(x: Tensor, code: Tensor, largest: Tensor, signed: bool) -> None:
    """Write x (n,) as places in the table, uint8 (n,), of x over its block's largest magnitude (blocks,)."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest.copy_(blocks.abs().amax(1))
    table = codes(signed, x.dtype, x.device)
    scaled = blocks / torch.where(largest > 0, largest, 1).to(x.dtype).unsqueeze(1)
    nearest = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    if not signed:  # a v that became zero beside an m that did not would make the next step a million times too long
        nearest.masked_fill_((nearest == 0) & (blocks > 0), 1)
    code.copy_(nearest.view(-1)[: len(x)])


def dequantise(code: Tensor, largest: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    """What `quantise` kept: (n,)."""
    values = codes(signed, dtype, code.device)[code.int()]
    return values * largest.to(dtype).repeat_interleave(BLOCK)[: len(code)]


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
