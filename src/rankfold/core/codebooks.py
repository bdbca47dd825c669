"""Weights as vectors out of codebooks: what a code stands for, and the linear layer that multiplies by them."""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BITS = (1, 2, 4, 8, 16)


class Codebooks(BaseModel):
    """How a weight W (out, in) is kept: `ŵ_ij = S_i Σ_m C_m[code_ijm]` for the j-th run of `width` numbers of row i.

    There are `books` tables C_m of 2^bits vectors, and a scale S for each row. A code takes `bits`, so a number of the
    weight takes `books · bits / width`, besides tables and scales.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    books: Annotated[int, Field(ge=1, description="M")] = 1
    bits: Annotated[int, Field(description="of a code: 1, 2, 4, 8 or 16")] = 8
    width: Annotated[int, Field(ge=1, description="d_g, numbers of a vector")] = 8

    @model_validator(mode="after")
    def _fit_bytes(self) -> "Codebooks":
        if self.bits not in _BITS:
            raise ValueError(f"codes of {self.bits} bits fill no bytes: 1, 2, 4, 8 or 16")
        return self

    def bytes(self, in_: int) -> int:
        """Bytes of the codes of a row."""
        return math.ceil(math.ceil(in_ / self.width) * self.books * self.bits / 8)

    def per_number(self, out: int, in_: int) -> float:
        """Bits that a number of W takes, tables and scales (16 bits) counted."""
        tables = 16 * self.books * 2**self.bits * self.width
        return (8 * out * self.bytes(in_) + tables + 16 * out) / (out * in_)


def pack(codes: Tensor, scheme: Codebooks) -> Tensor:
    """Codes (out, runs, M) in bytes (out, bytes), the first in the lowest bits."""
    flat = codes.flatten(1).int()
    if scheme.bits >= 8:
        return torch.stack([flat >> 8 * i & 255 for i in range(scheme.bits // 8)], -1).flatten(1).to(torch.uint8)
    a_byte = 8 // scheme.bits
    flat = F.pad(flat, (0, -flat.shape[1] % a_byte)).unflatten(1, (-1, a_byte))
    return (flat << scheme.bits * torch.arange(a_byte, device=flat.device)).sum(-1).to(torch.uint8)


def unpack(data: Tensor, in_: int, scheme: Codebooks) -> Tensor:
    """The codes (out, runs, M) that were packed."""
    runs = math.ceil(in_ / scheme.width)
    if scheme.bits >= 8:
        parts = data.int().unflatten(1, (-1, scheme.bits // 8))
        flat = sum(parts[..., i] << 8 * i for i in range(scheme.bits // 8))
        assert isinstance(flat, Tensor)
    else:
        shifts = scheme.bits * torch.arange(8 // scheme.bits, device=data.device)
        flat = (data.int()[..., None] >> shifts & 2**scheme.bits - 1).flatten(1)
    return flat[:, : runs * scheme.books].unflatten(1, (runs, scheme.books))


def decode(codes: Tensor, books: Tensor, scales: Tensor, in_: int) -> Tensor:
    """Ŵ (out, in) of codes (out, runs, M), books (M, 2^b, width) and scales (out, 1); gradients reach both."""
    vectors = sum(books[m][codes[..., m]] for m in range(len(books)))
    assert isinstance(vectors, Tensor)
    return (vectors.flatten(1) * scales)[:, :in_]


class CodebookLinear(nn.Linear):
    """A linear layer over codes: `weight` holds them, `books` and `scales` what they stand for.

    All three are in its state_dict. For the backward pass it keeps its input only, and makes Ŵ again.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: Codebooks, bias: bool, dtype: torch.dtype, device: Any
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme, self.dtype = in_features, out_features, scheme, dtype
        codes = torch.empty(out_features, scheme.bytes(in_features), dtype=torch.int8, device=device)
        books = torch.empty(scheme.books, 2**scheme.bits, scheme.width, dtype=torch.float16, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.books = nn.Parameter(books, requires_grad=False)
        self.scales = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float16, device=device), False)
        bias_ = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_)

    @classmethod
    def of(cls, layer: nn.Linear, codes: Tensor, books: Tensor, scales: Tensor, scheme: Codebooks) -> "CodebookLinear":
        """The layer with codes (out, runs, M) in place of its weight; the bias is the same parameter."""
        made = cls(layer.in_features, layer.out_features, scheme, False, layer.weight.dtype, layer.weight.device)
        with torch.no_grad():
            made.weight.copy_(pack(codes, scheme).view(torch.int8))
            made.books.copy_(books)
            made.scales.copy_(scales)
        made.bias = layer.bias
        return made.train(layer.training)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ (out, in), in the dtype of the weight that was packed."""
        codes, dtype = unpack(self.weight.view(torch.uint8), self.in_features, self.scheme), dtype or self.dtype
        return decode(codes, self.books.to(dtype), self.scales.to(dtype), self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        def product(x: Tensor) -> Tensor:
            return F.linear(x, self.dequantise(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

        if not torch.is_grad_enabled():
            return product(x)
        y: Any = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
        return y

    def extra_repr(self) -> str:
        scheme = self.scheme
        return f"{super().extra_repr()}, {scheme.books}x{scheme.bits}, width={scheme.width}"
