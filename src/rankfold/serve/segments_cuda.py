"""Products of many adapters in one batch on CUDA, in two Triton kernels: into the ranks, and out of them.

Punica: Chen et al. 2023, arXiv 2310.18547 (SGMV: shrink, then expand). S-LoRA: Sheng et al. 2023, arXiv 2311.03285
(each segment's own rank, from pages that lie anywhere). A program that has no component or no row ends at once, so a
low rank beside a high one costs what it costs alone.
"""

# pyright: reportInvalidTypeForm=false

import importlib

import torch
from torch import Tensor

from rankfold.serve.segments import Table

triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")
_ROWS, _RANK, _WIDE = 16, 16, 64  # a tile's rows, components, inputs or outputs


@triton.jit
def _shrink(
    x, numbers, pieces, t, n, width, ROWS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """t[row, c + i] = x[row] · A_i for a piece's rows and components i, the first of which is its segment's c-th."""
    piece = pieces + tl.program_id(0) * 6
    row = tl.load(piece) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(2) * RANK + tl.arange(0, RANK)
    stop, a, k, c = tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 4), tl.load(piece + 5)
    if (tl.load(piece) + tl.program_id(1) * ROWS < stop) & (tl.program_id(2) * RANK < k):
        total = tl.zeros((ROWS, RANK), tl.float32)
        for first in range(0, n, WIDE):
            j = first + tl.arange(0, WIDE)
            own = tl.load(x + row * n + j[None, :], mask=(row < stop) & (j[None, :] < n), other=0)
            A = tl.load(numbers + a + i[None, :] * n + j[:, None], mask=(i[None, :] < k) & (j[:, None] < n), other=0)
            total += tl.dot(own, A, input_precision="ieee")
        tl.store(t + row * width + c + i[None, :], total, mask=(row < stop) & (i[None, :] < k))


@triton.jit
def _expand(
    y, numbers, pieces, ends, t, m, width, ROWS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """y[row] += Σ_i t[row, i] B_i over all pieces of a segment."""
    first, last = tl.load(ends + tl.program_id(0)), tl.load(ends + tl.program_id(0) + 1)
    start, stop = tl.load(pieces + first * 6), tl.load(pieces + first * 6 + 1)
    if start + tl.program_id(1) * ROWS < stop:
        row = start + tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        j = tl.program_id(2) * WIDE + tl.arange(0, WIDE)[None, :]
        inside = (row < stop) & (j < m)
        total = tl.load(y + row * m + j, mask=inside, other=0).to(tl.float32)
        for p in range(first, last):
            piece = pieces + p * 6
            b, k, c = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
            for lowest in range(0, k, RANK):
                i = lowest + tl.arange(0, RANK)
                own = tl.load(t + row * width + c + i[None, :], mask=(row < stop) & (i[None, :] < k), other=0)
                B = tl.load(numbers + b + i[:, None] * m + j, mask=(i[:, None] < k) & (j < m), other=0)
                total += tl.dot(own, B.to(tl.float32), input_precision="ieee")
        tl.store(y + row * m + j, total, mask=inside)


def add_products(y: Tensor, x: Tensor, table: Table) -> None:
    """As `segments.add_products`; x and y are contiguous and of the numbers' dtype; sums are in float32."""
    n, m, tiles = x.shape[1], y.shape[1], triton.cdiv(table.rows, _ROWS)
    t = torch.empty(len(x), table.width, dtype=torch.float32, device=x.device)
    tile = {"ROWS": _ROWS, "RANK": _RANK, "WIDE": _WIDE}
    with torch.cuda.device_of(x):
        ranks = triton.cdiv(table.width, _RANK)
        _shrink[(len(table.pieces), tiles, ranks)](x, table.numbers, table.pieces, t, n, table.width, **tile)
        segments = len(table.ends) - 1
        _expand[(segments, tiles, triton.cdiv(m, _WIDE))](
            y, table.numbers, table.pieces, table.ends, t, m, table.width, **tile
        )
