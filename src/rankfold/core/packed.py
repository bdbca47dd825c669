"""Weights in few bits: what a code stands for, how codes lie in bytes, and the linear layer that multiplies by them."""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from rankfold.core import eightbit
from rankfold.core.activations import FLOATS, Activations, float8, rounded
from rankfold.core.compiled import compiled
from rankfold.errors import RankfoldError

Format = Literal["int8", "int4", "int3", "int2", "ternary", "nf4", "fp4", "fp4-e3m0", "fp8", "fp8-e5m2"]
BITS = {
    "int8": 8, "int4": 4, "int3": 3, "int2": 2, "ternary": 1.6, "nf4": 4, "fp4": 4, "fp4-e3m0": 4, "fp8": 8,
    "fp8-e5m2": 8,
}  # fmt: skip
PACK = {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1), 1.6: (5, 1)}  # so many codes in so many bytes
_TILE = 2**18  # numbers
_FEW = 8  # tokens
_WORTH = 2**16  # bytes
_CPU, _CUDA = "rankfold.core.packed_cpu", "rankfold.core.packed_cuda"
# The 16 quantiles of a normal distribution that QLoRA takes (arXiv 2305.14314), as bitsandbytes rounds them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of E2M1
E3M0 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Scheme(BaseModel):
    """How a weight W (out, in) is kept: a code q for each of its numbers, and a scale s for each group of them.

    `int` formats stand for `ŵ = s (q − z)`, with a z for each group (a whole number where `zeros` is uint8) or, with
    `symmetric`, the middle of the range; ternary for `s (q − 1)`; `nf4`, `fp4` (E2M1), `fp4-e3m0`, `fp8` (E4M3) and
    `fp8-e5m2` for `s t_q` with a table t. A group is a run of `group` numbers along a row (over the inputs) or, with
    `along="out"`, down a column; the last of a row may be shorter. `group="channel"` is a whole row or column,
    `"tensor"` the whole weight. Codes of a row begin at a byte. `activations` rounds what goes into the layer too,
    with a scale for each token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format = "int4"
    group: Annotated[int, Field(ge=1)] | Literal["channel", "tensor"] = 64
    along: Literal["in", "out"] = "in"
    symmetric: bool = False
    scales: Annotated[Literal["float32", "float16", "bfloat16"], Field(description="dtype that s is kept in")] = (
        "float16"
    )
    zeros: Annotated[Literal["uint8", "float32", "float16"], Field(description="dtype that z is kept in")] = "uint8"
    double: Annotated[
        bool, Field(description="s in 8 bits itself: less their mean, in blocks of 256, of bitsandbytes' table (QLoRA)")
    ] = False
    ordered: Annotated[
        bool, Field(description="groups are of inputs in an order that the layer keeps, as act_order's")
    ] = False
    balanced: Annotated[bool, Field(description="inputs are divided by numbers that the layer keeps, as AWQ's")] = False
    activations: Annotated[Activations | None, Field(description="8 bits of the inputs")] = None

    @model_validator(mode="before")
    @classmethod
    def _only_ints_have_zeros(cls, values: Any) -> Any:
        if isinstance(values, dict) and not str(values.get("format", "int4")).startswith("int"):
            values = {**values, "symmetric": True}
        if isinstance(values, dict) and values.get("double"):
            values = {**values, "scales": "float32"}
        return values

    @model_validator(mode="after")
    def _orders_inputs(self) -> "Scheme":
        if self.ordered and self.along == "out":
            raise ValueError('an order of the inputs has a meaning for groups along them only: along="in"')
        return self

    @property
    def levels(self) -> int:
        """How many values a code has."""
        return 3 if self.format == "ternary" else 2 ** int(BITS[self.format])

    @property
    def offset(self) -> int:
        """z where no group has its own: the code of 0."""
        return 1 if self.format == "ternary" else self.levels // 2

    @property
    def table(self) -> tuple[float, ...] | None:
        """t, for formats whose values are not evenly spaced: rising, or by the bits of a number of 8 bits."""
        if self.format == "nf4":
            return NF4
        if self.format in FLOATS:
            return _float8_table(self.format)
        half = {"fp4": FP4, "fp4-e3m0": E3M0}.get(self.format)
        return None if half is None else (*(-t for t in half[:0:-1]), 0.0, *half)

    def layout(self, out: int, in_: int) -> tuple[int, int, int, int]:
        """Rows of codes, codes of a row, groups of a row (of the whole, per tensor), and bytes of a row."""
        rows, n = (out, in_) if self.along == "in" else (in_, out)
        groups = math.ceil(n / self.group) if isinstance(self.group, int) else 1
        codes, size = PACK[BITS[self.format]]
        return rows, n, groups, math.ceil(n / codes) * size

    def bits(self, out: int, in_: int) -> float:
        """Bits that a number of W takes, scales and zero points counted."""
        rows, _, groups, size = self.layout(out, in_)
        of_groups = (1 if self.group == "tensor" else rows) * groups
        per_group = 1 if self.double else getattr(torch, self.scales).itemsize
        per_group += 0 if self.symmetric else getattr(torch, self.zeros).itemsize
        blocks = 4 * (1 + math.ceil(of_groups / eightbit.BLOCK)) if self.double else 0
        of_inputs = 4 * in_ * (self.ordered + self.balanced)
        return 8 * (rows * size + of_groups * per_group + blocks + of_inputs) / (out * in_)


class Packed(NamedTuple):
    """A weight as kept: codes (rows, bytes) in uint8; scales and zeros (rows, groups), or no zeros.

    Rows are those of W, or its columns where groups run along these. Per tensor there is one scale (1, 1). `order`
    (in,), where the scheme has one, says which input each column of the codes is; `balance` (in,), in float32, what
    each input is divided by, its column having been multiplied by that before it was rounded.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None = None
    balance: Tensor | None = None


# ---- codes in bytes


def pack(q: Tensor, scheme: Scheme) -> Tensor:
    """Codes q (rows, n) in bytes (rows, bytes), the first in the lowest bits; a row is filled up with zeros."""
    codes, size = PACK[BITS[scheme.format]]
    q = F.pad(q.to(torch.uint8), (0, -q.shape[-1] % codes)).unflatten(-1, (-1, codes)).int()
    base = 3 if scheme.format == "ternary" else scheme.levels
    word = (q * base ** torch.arange(codes, dtype=torch.int32, device=q.device)).sum(-1, dtype=torch.int32)
    return torch.stack([word >> 8 * i & 255 for i in range(size)], -1).flatten(-2).to(torch.uint8)


def unpack(data: Tensor, n: int, scheme: Scheme) -> Tensor:
    """The codes (rows, n), uint8, that were packed."""
    bits, data = BITS[scheme.format], data.view(torch.uint8)
    if bits == 8:
        q = data
    elif scheme.format == "ternary":
        q = _trits(data.device)[data.int()].flatten(-2)
    elif bits == 3:
        low, middle, high = data.unflatten(-1, (-1, 3)).int().unbind(-1)
        word = low | middle << 8 | high << 16
        q = torch.stack([word >> 3 * i & 7 for i in range(8)], -1).flatten(-2).to(torch.uint8)
    else:
        bits = int(bits)
        q = torch.stack([data >> bits * i & 2**bits - 1 for i in range(8 // bits)], -1).flatten(-2)
    return q[..., :n]


@functools.lru_cache(maxsize=8)
def _trits(device: torch.device) -> Tensor:
    """The five codes of each byte: (256, 5)."""
    return torch.arange(256, dtype=torch.uint8, device=device)[:, None] // 3 ** torch.arange(
        5, dtype=torch.uint8, device=device
    ) % 3  # fmt: skip


# ---- numbers and codes


def rows_of(W: Tensor, scheme: Scheme) -> Tensor:
    """W (out, in) so that groups run along its rows, or back."""
    return W if scheme.along == "in" else W.mT


def grouped(M: Tensor, scheme: Scheme) -> Tensor:
    """M (rows, n) as (rows, groups, g); a last group that is shorter is filled up with its last number."""
    if scheme.group == "tensor":
        return M.reshape(1, 1, -1)
    if scheme.group == "channel":
        return M[:, None]
    missing = -M.shape[1] % scheme.group
    return torch.cat([M, M[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, scheme.group))


def spread(per_group: Tensor, n: int, scheme: Scheme) -> Tensor:
    """What each group has, (rows, groups), for each number: (rows, n), or what broadcasts to it."""
    if not isinstance(scheme.group, int):
        return per_group
    return per_group.repeat_interleave(scheme.group, 1)[:, :n]


def totals(M: Tensor, scheme: Scheme) -> Tensor:
    """What each group of M (rows, n) sums up to: (rows, groups)."""
    if not isinstance(scheme.group, int):
        return M.sum().reshape(1, 1) if scheme.group == "tensor" else M.sum(1, keepdim=True)
    return F.pad(M, (0, -M.shape[1] % scheme.group)).unflatten(1, (-1, scheme.group)).sum(-1)


def encode(M: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The codes (rows, n) of the values nearest to M (rows, n); rounding is half to even."""
    s = spread(scales.to(M.dtype), M.shape[1], scheme)
    if scheme.format in FLOATS:
        return float8(M / s, scheme.format).view(torch.uint8)
    if scheme.table is not None:
        t = torch.tensor(scheme.table, dtype=M.dtype, device=M.device)
        return torch.bucketize((M / s).contiguous(), (t[1:] + t[:-1]) / 2).to(torch.uint8)
    z = scheme.offset if zeros is None else spread(zeros.to(M.dtype), M.shape[1], scheme)
    return ((M / s).round() + z).clamp(0, scheme.levels - 1).to(torch.uint8)


def decode(q: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The values (rows, n) that codes stand for; gradients reach the scales."""
    n = q.shape[1]
    if scheme.table is not None:
        values = torch.tensor(scheme.table, dtype=dtype, device=q.device)[q.int()]
    elif zeros is None:
        values = q.to(dtype) - scheme.offset
    else:
        values = q.to(dtype) - spread(zeros.to(dtype), n, scheme)
    return values * spread(scales.to(dtype), n, scheme)


def dequantise(packed: Packed, shape: Sequence[int], scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Ŵ (out, in). Decoded a tile of rows after the other, so that what lies between is small."""
    rows, n, _, _ = scheme.layout(*shape)
    if (loops := _loops(packed, dtype)) is not None:
        W = rows_of(loops.rows(packed, n, scheme), scheme)
    else:
        every: list[Any] = [t if t is None else t.expand(rows, -1) for t in packed[:3]]
        step = max(1, _TILE // n)
        tiles = [[t if t is None else t[a : a + step] for t in every] for a in range(0, rows, step)]
        W = rows_of(torch.cat([decode(unpack(q, n, scheme), s, z, scheme, dtype) for q, s, z in tiles]), scheme)  # type: ignore[arg-type]
    W = W if packed.order is None else W[:, packed.order.argsort()]
    return W if packed.balance is None else W / packed.balance.to(dtype)


def _product(x: Tensor, packed: Packed, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """x Ŵᵀ, of few tokens without a Ŵ where there is compiled code."""
    few = x.device.type in ("cpu", "cuda") and 0 < x.numel() // shape[1] <= _FEW and scheme.along == "in"
    if few and not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling():
        y, tokens = None, x.reshape(-1, shape[1])
        if (loops := _loops(packed, x.dtype)) is not None:
            y = loops.rows(packed, shape[1], scheme, tokens)
        elif x.is_cuda and BITS[scheme.format] == 4 and (kernel := compiled("triton", _CUDA)) is not None:
            y = kernel.product(packed, shape[1], scheme, tokens)
        if y is not None:
            return y.view(*x.shape[:-1], shape[0])
    return F.linear(x, dequantise(packed, shape, scheme, x.dtype))


def _loops(packed: Packed, dtype: torch.dtype) -> Any:
    """`packed_cpu` where Numba is installed: for float32 without gradients, and weights that are worth compiling."""
    codes, scales = packed.codes, packed.scales
    fits = codes.device.type == "cpu" and dtype == torch.float32 and codes.numel() >= _WORTH
    if not fits or torch.compiler.is_compiling() or type(codes) not in (Tensor, nn.Parameter):
        return None
    return None if scales.requires_grad and torch.is_grad_enabled() else compiled("numba", _CPU)


@functools.lru_cache(maxsize=2)
def _float8_table(kind: str) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8).view(FLOATS[kind]).float().tolist())


# ---- scales in 8 bits


def halve(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as bytes, and in float32 (1 + blocks,) their mean and the largest distance from it in each 256."""
    mean = scales.float().mean()
    flat = scales.float().flatten() - mean
    codes, blocks = torch.empty_like(flat, dtype=torch.uint8), flat.new_empty(math.ceil(len(flat) / eightbit.BLOCK))
    eightbit.quantise(flat, codes, blocks, signed=True)
    return codes.view(scales.shape), torch.cat([mean[None], blocks])


def whole(codes: Tensor, blocks: Tensor) -> Tensor:
    """The scales that `halve` kept."""
    wide = eightbit.dequantise(codes.flatten(), blocks[1:], True, blocks.dtype)
    return (wide + blocks[0]).view(codes.shape)


# ---- the layer


class _Multiply(torch.autograd.Function):
    """x Ŵᵀ. For the backward pass the codes are kept, which it dequantises again, and x where the scales train."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, shape: Any, scheme: Scheme
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, codes, scales, zeros)
        ctx.shape, ctx.scheme = shape, scheme
        return _product(x, Packed(codes, scales, zeros), shape, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        (x, codes, scales, zeros), scheme, dx, ds = ctx.saved_tensors, ctx.scheme, None, None
        if ctx.needs_input_grad[0]:
            dx = dy @ dequantise(Packed(codes, scales, zeros), ctx.shape, scheme, dy.dtype)
        if ctx.needs_input_grad[2]:
            G = dy.flatten(0, -2).mT @ x.flatten(0, -2).to(dy.dtype)
            units = dequantise(Packed(codes, torch.ones_like(scales), zeros), ctx.shape, scheme, dy.dtype)
            ds = totals(rows_of(G * units, scheme), scheme).to(scales.dtype)
        return dx, None, ds, None, None, None


class PackedLinear(nn.Linear):
    """A linear layer over a packed weight: `weight` holds the codes, `scales` and `zeros` what the groups have.

    All three are in its state_dict; with a double scheme `scales` are bytes, and `blocks` what these stand for; with
    an ordered one `order` too, with a balanced one `balance`. It has no float weight at any time but for the length
    of a product. Gradients reach its input, and its scales where these require them.
    """

    scales: nn.Parameter
    zeros: Tensor | None
    blocks: Tensor | None
    order: Tensor | None
    balance: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: bool, dtype: torch.dtype, device: Any
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme, self.dtype = in_features, out_features, scheme, dtype
        rows, _, groups, size = scheme.layout(out_features, in_features)
        per = (1 if scheme.group == "tensor" else rows, groups)
        # T5 casts a layer's inputs to the type of its weight, unless that is int8.
        codes = torch.empty(rows, size, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        kept = torch.uint8 if scheme.double else getattr(torch, scheme.scales)
        self.scales = nn.Parameter(torch.empty(per, dtype=kept, device=device), requires_grad=False)
        blocks = 1 + math.ceil(math.prod(per) / eightbit.BLOCK)
        self.register_buffer("blocks", torch.empty(blocks, device=device) if scheme.double else None)
        order = torch.empty(in_features, dtype=torch.int32, device=device) if scheme.ordered else None
        self.register_buffer("order", order)
        self.register_buffer("balance", torch.empty(in_features, device=device) if scheme.balanced else None)
        zeros = None if scheme.symmetric else torch.empty(per, dtype=getattr(torch, scheme.zeros), device=device)
        self.register_buffer("zeros", zeros)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def of(cls, layer: nn.Linear, packed: Packed, scheme: Scheme) -> "PackedLinear":
        """The layer with a packed weight in place of its own; the bias is the same parameter."""
        made = cls(layer.in_features, layer.out_features, scheme, False, layer.weight.dtype, "meta")
        if scheme.ordered and packed.order is None:
            raise RankfoldError("this quantiser takes inputs as they stand: gptq with act_order has an ordered scheme")
        if scheme.balanced and packed.balance is None:
            raise RankfoldError("this quantiser takes inputs as they are: only awq's and cbq's schemes are balanced")
        scales, made.blocks = halve(packed.scales) if scheme.double else (packed.scales, None)
        made.order, made.balance = packed.order, packed.balance
        for name, tensor in (("weight", packed.codes.view(torch.int8)), ("scales", scales)):
            if tensor.shape != getattr(made, name).shape or tensor.dtype != getattr(made, name).dtype:
                raise RankfoldError(f"{name} of {tuple(tensor.shape)} are not those of {scheme} for {layer}")
            setattr(made, name, nn.Parameter(tensor, requires_grad=False))
        made.zeros, made.bias = packed.zeros, layer.bias
        return made.train(layer.training)

    @property
    def packed(self) -> Packed:
        scales = self.scales if self.blocks is None else whole(self.scales, self.blocks)
        return Packed(self.weight.view(torch.uint8), scales, self.zeros, self.order, self.balance)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ (out, in), in the dtype of the weight that was packed."""
        return dequantise(self.packed, (self.out_features, self.in_features), self.scheme, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.scales if self.blocks is None else self.packed.scales)

    def multiply(self, x: Tensor, scales: Tensor) -> Tensor:
        """The layer's output with these scales in place of its own."""
        shape = (self.out_features, self.in_features)
        x = x if self.balance is None else x / self.balance.to(x.dtype)
        x = rounded(x, self.scheme.activations)
        x = x if self.order is None else x[..., self.order]
        codes, zeros = self.weight.view(torch.uint8), self.zeros
        y: Any
        if torch.is_grad_enabled() and (x.requires_grad or scales.requires_grad):
            y = _Multiply.apply(x, codes, scales, zeros, shape, self.scheme)
        else:
            y = _product(x, Packed(codes, scales, zeros), shape, self.scheme)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme.format}, group={self.scheme.group}"
