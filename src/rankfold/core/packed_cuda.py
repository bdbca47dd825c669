"""Products of few tokens with codes of 4 bits on CUDA, in one Triton kernel: no Ŵ is written."""

# pyright: reportInvalidTypeForm=false

import functools
import importlib

import torch
from torch import Tensor

from rankfold.core.packed import Packed, Scheme

triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")


@triton.jit
def _multiply(
    x, codes, scales, zeros, table, y, out, n, size, groups, group, offset,
    ZEROS: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A block of rows of Ŵ, times one token. A byte's low half is the code of an even input, its high of the next."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, size, BYTES):
        j = first + tl.arange(0, BYTES)[None, :]
        byte = tl.load(codes + rows * size + j, mask=(rows < out) & (j < size), other=0).to(tl.int32)
        for half in tl.static_range(2):
            k = 2 * j + half
            inside = (rows < out) & (k < n)
            at = rows * groups + k // group
            q = (byte >> (4 * half)) & 15
            if TABLE:
                v = tl.load(table + q)
            elif ZEROS:
                v = q.to(tl.float32) - tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
            else:
                v = q.to(tl.float32) - offset
            s = tl.load(scales + at, mask=inside, other=0).to(tl.float32)
            total += tl.sum(v * s * tl.load(x + token * n + k, mask=k < n, other=0).to(tl.float32), 1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + token * out + rows, total, mask=rows < out)


@functools.lru_cache(maxsize=16)
def _table(values: tuple[float, ...] | None, device: torch.device) -> Tensor:
    return torch.tensor(values or (0.0,), device=device)


def product(packed: Packed, n: int, scheme: Scheme, x: Tensor) -> Tensor:
    """x Ŵᵀ for x (tokens, n), in its dtype; sums are in float32."""
    (out, size), x = packed.codes.shape, x.contiguous()
    scales = packed.scales.detach().expand(out, -1).contiguous()
    zeros = scales if packed.zeros is None else packed.zeros.expand(out, -1).contiguous()
    table = _table(scheme.table, x.device)
    y = torch.empty(len(x), out, dtype=x.dtype, device=x.device)
    group = scheme.group if isinstance(scheme.group, int) else n
    with torch.cuda.device_of(x):
        _multiply[(triton.cdiv(out, 16), len(x))](
            x, packed.codes.contiguous(), scales, zeros, table, y, out, n, size, scales.shape[1], group, scheme.offset,
            ZEROS=packed.zeros is not None, TABLE=scheme.table is not None, ROWS=16, BYTES=64,
        )  # fmt: skip
    return y
