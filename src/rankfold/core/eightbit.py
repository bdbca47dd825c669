"""Numbers as bytes of a table that is fine near zero, with a scale for each 256. Dettmers et al. 2021, 8-bit Optimizers
via Block-wise Quantization, arXiv 2110.02861."""

import functools

import torch
from torch import Tensor

BLOCK = 256  # numbers that share one scale


@functools.lru_cache(maxsize=16)
def codes(signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 256 values of a byte, rising: decades from 1e-6 to 1, each with twice the steps of the one below; 0 and 1.

    Computed in float32, as bitsandbytes does, so that they are its values to the last bit.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
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
