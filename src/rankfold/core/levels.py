"""A weight of few levels: the quantiser of one-bit adapters, for training with it and for storing what it gives.

Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy. Jie et al. 2023, arXiv
2307.16867.
"""

import itertools

import torch
from torch import Tensor

# By bits, the levels above 0 with the least expected **absolute** error under N(0, 1): boundaries are midpoints of
# neighbours, a level is the median of what lies between its boundaries. Written down, so that files mean the same
# wherever they are read.
_UPPER = {
    1: (0.67449,),
    2: (0.377754, 1.26572),
    3: (0.202624, 0.62542, 1.113729, 1.792025),
    4: (0.10555, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491),
}
MOST_BITS = max(_UPPER)
_EPS = 1e-5  # added to σ where w is divided by it, in the paper


def quantise(w: Tensor, bits: int) -> Tensor:
    """`w_q = σ Q(ŵ) + μ`, `ŵ = (w − μ) / (σ + 1e-5)`, for each matrix of w (..., m, n), or for a vector as a whole.

    μ and σ (unbiased) are the matrix's own, Q takes the nearest of `levels(bits)`. In the backward Q counts as the
    identity (straight through), and gradients also flow through μ and σ.
    """
    mean, std = statistics(w)
    scaled = (w - mean) / (std + _EPS)
    # The difference of equals is 0 to the last bit, so the value is Q's own: what a file of the codes gives back.
    Q = table(bits, w)[_codes(scaled.detach(), bits)] + (scaled - scaled.detach())
    return std * Q + mean


def encode(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes (w's shape, int64) of the levels that `quantise` takes, and μ and σ (..., 1, 1)."""
    mean, std = statistics(w)
    return _codes((w - mean) / (std + _EPS), bits), mean, std


def decode(codes: Tensor, mean: Tensor, std: Tensor, bits: int) -> Tensor:
    """What `quantise` gave, to the last bit, in the dtype of the mean."""
    return std * table(bits, mean)[codes] + mean


def statistics(w: Tensor) -> tuple[Tensor, Tensor]:
    """μ and the unbiased σ (..., 1, 1) of each matrix, (1,) of a vector. Where all numbers are one, σ is 0."""
    dims = (-2, -1) if w.dim() > 1 else (-1,)
    n = w.shape[-1] * (w.shape[-2] if w.dim() > 1 else 1)
    variance = w.var(dims, correction=int(n > 1), keepdim=True)
    some = variance > 0
    return w.mean(dims, keepdim=True), torch.where(some, variance, 1).sqrt() * some  # √ has no slope at 0


def table(bits: int, like: Tensor) -> Tensor:
    """`levels(bits)` as a tensor of the dtype and on the device of another."""
    return torch.tensor(levels(bits), dtype=like.dtype, device=like.device)


def _codes(scaled: Tensor, bits: int) -> Tensor:
    """The index of the nearest level; halfway, of the higher one."""
    values = levels(bits)
    between = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    return torch.bucketize(
        scaled.contiguous(), torch.tensor(between, dtype=scaled.dtype, device=scaled.device), right=True
    )


def levels(bits: int) -> tuple[float, ...]:
    """The `2^bits` levels, from the lowest to the highest."""
    upper = _UPPER[bits]
    return (*(-level for level in reversed(upper)), *upper)
