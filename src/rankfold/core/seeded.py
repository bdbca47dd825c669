"""Frozen random bases that a seed brings back, bit for bit the same on every machine.

Two kinds, for two uses:

- *Drawn once and kept* (VeRA, RandLoRA): `uniform` and `ternary` from a CPU generator. Only uniform draws, because a
  normal draw passes through vectorised logarithms and sines, whose last bits differ between processors. What is done
  to a draw afterwards is exact or rounded once, in separate operations that no compiler can fuse.
- *Never kept* (NOLA): k matrices M_1 … M_k that `combine` and `correlate` make again, a few at a time, whenever they
  are needed. Entry after entry they come from SplitMix64 (Steele, Lea and Flood 2014), a counter through an integer
  hash: whole-number arithmetic, so any device gives the same bits and none has to wait for a generator on the CPU.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

_AT_ONCE = 2**17  # numbers made at a time: enough to keep a device busy, few enough to stay in a processor's cache


class Bases(nn.Module):
    """Frozen tensors shared by all layers of an adapter. No checkpoint holds them: the seed does."""

    A: Tensor
    B: Tensor

    def __init__(self, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def keep(self, **tensors: Tensor) -> None:
        """Put bases from elsewhere in the place of the seed's. Checkpoints hold these from then on."""
        for name, tensor in tensors.items():
            own = self.get_buffer(name)
            self.register_buffer(name, tensor.to(own.device, torch.promote_types(tensor.dtype, own.dtype)))


def uniform(rng: torch.Generator, *shape: int, bound: float = 1.0) -> Tensor:
    """float32 numbers uniform on [−bound, bound), drawn in row-major order."""
    drawn = torch.empty(shape, dtype=torch.float32).uniform_(generator=rng)  # multiples of 2⁻²⁴
    return drawn.mul_(2).sub_(1).mul_(bound)  # the first two are exact


def ternary(rng: torch.Generator, *shape: int, sparsity: float) -> Tensor:
    """float32 −1, 0, +1 with probabilities 1/(2·sparsity), 1 − 1/sparsity, 1/(2·sparsity)."""
    drawn = torch.empty(shape, dtype=torch.float32).uniform_(generator=rng)
    edge = 1 / (2 * sparsity)
    return (drawn > 1 - edge).float() - (drawn < edge).float()


def unit_std(basis: Tensor) -> Tensor:
    """The basis divided by its own standard deviation, taken in float64 and then rounded to float32.

    So the order in which a machine adds numbers up does not reach the result. A basis that is all zero stays so.
    """
    wide = basis.double()
    variance = (wide - wide.mean()).square().sum() / max(basis.numel() - 1, 1)
    return basis / (variance.sqrt().float() if variance > 0 else 1.0)


def combine(coefficients: Tensor, seed: int, rows: int, columns: int) -> Tensor:
    """`Σᵢ cᵢ Mᵢ`: coefficients (..., k) -> (..., rows, columns), each Mᵢ with entries uniform on (−1, 1) from the seed.

    Its gradient makes the M again instead of keeping them. Works under `torch.compile` and `torch.func`.
    """
    return _Combine.apply(coefficients, seed, rows, columns)


def correlate(G: Tensor, seed: int, k: int) -> Tensor:
    """`⟨G, Mᵢ⟩` for i = 1 … k: G (..., rows, columns) -> (..., k). The adjoint of `combine`."""
    return _Correlate.apply(G, seed, k)


class _Combine(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, seed: int, rows: int, columns: int) -> Tensor:
        return _combine(coefficients, seed, rows, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.seed, ctx.k = inputs[1], inputs[0].shape[-1]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return correlate(G, ctx.seed, ctx.k), None, None, None


class _Correlate(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(G: Tensor, seed: int, k: int) -> Tensor:
        return _correlate(G, seed, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.seed, ctx.shape = inputs[1], inputs[0].shape[-2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return combine(g, ctx.seed, *ctx.shape), None, None


# The loops over the matrices are operators of their own, so that a compiler does not unroll them.


@torch.library.custom_op("rankfold::combine", mutates_args=())
def _combine(coefficients: Tensor, seed: int, rows: int, columns: int) -> Tensor:
    lead, k, size = coefficients.shape[:-1], coefficients.shape[-1], rows * columns
    wide = coefficients.reshape(-1, k).to(_wide(coefficients))
    total = wide.new_zeros(wide.shape[0], size)
    for i, M in _matrices(seed, k, size, wide):
        total.addmm_(wide[:, i : i + len(M)], M)
    return total.reshape(*lead, rows, columns).to(coefficients.dtype)


@torch.library.custom_op("rankfold::correlate", mutates_args=())
def _correlate(G: Tensor, seed: int, k: int) -> Tensor:
    lead, size = G.shape[:-2], G.shape[-2] * G.shape[-1]
    wide = G.reshape(-1, size).to(_wide(G))
    return torch.cat([wide @ M.T for _, M in _matrices(seed, k, size, wide)], -1).reshape(*lead, k).to(G.dtype)


@_combine.register_fake
def _(coefficients: Tensor, seed: int, rows: int, columns: int) -> Tensor:
    return coefficients.new_empty(*coefficients.shape[:-1], rows, columns)


@_correlate.register_fake
def _(G: Tensor, seed: int, k: int) -> Tensor:
    return G.new_empty(*G.shape[:-2], k)


# Both take any leading dimensions, so a batch of them is one more.
_combine.register_vmap(lambda info, dims, c, *rest: (_combine(c.movedim(dims[0], 0), *rest), 0))
_correlate.register_vmap(lambda info, dims, G, *rest: (_correlate(G.movedim(dims[0], 0), *rest), 0))


def _wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _matrices(seed: int, k: int, size: int, like: Tensor):
    """(i, M (n, size)) for the matrices Mᵢ … Mᵢ₊ₙ₋₁, flattened, up to M_k; what they hold does not depend on n."""
    words, n = -(-size // 4), max(1, _AT_ONCE // size)
    for i in range(0, k, n):
        count = min(n, k - i)
        bits = _splitmix64(seed, i * words, count * words, like.device)
        # Four 16-bit whole numbers h a word; (h + ½) / 2¹⁵ is symmetric about 0, exact in float32, and never ±1.
        M = bits.view(torch.int16).view(count, 4 * words)[:, :size].to(like.dtype)
        yield i, M.add_(0.5).mul_(2.0**-15)


def _splitmix64(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """`count` 64-bit words of the sequence that the seed starts, from the `first`."""
    x = torch.arange(first + 1, first + 1 + count, device=device)
    x.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(seed))
    x.bitwise_xor_((x >> 30) & (1 << 34) - 1).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_((x >> 27) & (1 << 37) - 1).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_((x >> 31) & (1 << 33) - 1)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the signed number of the same bits: torch multiplies those modulo 2⁶⁴ all the same."""
    word %= 1 << 64
    return word - (1 << 64) if word >> 63 else word


def basis_matrices(seed: int, k: int, rows: int, columns: int) -> Tensor:
    """All of M (k, rows, columns) at once, in float32: to look at, and to test with."""
    return torch.cat([M for _, M in _matrices(seed, k, rows * columns, torch.empty(0))]).view(k, rows, columns)


def kaiming_bound(fan_in: int) -> float:
    """The bound of He's uniform start with gain √2: √(6 / fan_in)."""
    return math.sqrt(6 / fan_in)
