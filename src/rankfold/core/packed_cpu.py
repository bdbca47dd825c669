"""Packed weights on a processor, compiled by Numba: a row's bytes become its numbers in the cache."""

import functools
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.core.packed import BITS, PACK, Packed, Scheme, unpack

numba: Any = importlib.import_module("numba")
_compiled: Any = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy")
_SHARE = 2**21  # fewer numbers than this are not worth a thread


@_compiled()
def _values(codes: Any, bits: int, table: Any, v: Any) -> None:
    """What the codes of a row's bytes stand for, before zero and scale.

    All of a byte's values are read before the first is written: only so the compiler joins them in one move.
    """
    if bits == 8 and table.shape[0] == 0:
        for j in range(codes.size):
            v[j] = codes[j]
    elif bits == 4 and table.shape[0] == 0:
        for j in range(codes.size):
            v[2 * j] = codes[j] & 15
            v[2 * j + 1] = codes[j] >> 4
    elif bits == 3:  # two codes at a time
        for j in range(codes.size // 3):
            word = np.uint32(codes[3 * j]) | np.uint32(codes[3 * j + 1]) << 8 | np.uint32(codes[3 * j + 2]) << 16
            for i in range(4):
                at = np.uint32(word >> 6 * i) & np.uint32(63)
                a, b = table[at, 0], table[at, 1]
                v[8 * j + 2 * i] = a
                v[8 * j + 2 * i + 1] = b
    elif table.shape[1] == 1:
        for j in range(codes.size):
            v[j] = table[codes[j], 0]
    elif table.shape[1] == 2:
        for j in range(codes.size):
            a, b = table[codes[j], 0], table[codes[j], 1]
            v[2 * j] = a
            v[2 * j + 1] = b
    elif table.shape[1] == 4:
        for j in range(codes.size):
            at = codes[j]
            a, b, c, d = table[at, 0], table[at, 1], table[at, 2], table[at, 3]
            v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3] = a, b, c, d
    else:
        for j in range(codes.size):
            at = codes[j]
            a, b, c, d, e = table[at, 0], table[at, 1], table[at, 2], table[at, 3], table[at, 4]
            v[5 * j], v[5 * j + 1], v[5 * j + 2], v[5 * j + 3], v[5 * j + 4] = a, b, c, d, e


@_compiled()
def _scale(v: Any, z: Any, s: Any) -> None:
    for j in range(v.size):
        v[j] = (v[j] - z) * s


@_compiled(fastmath=True)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@_compiled()
def _rows(
    codes: Any, scales: Any, zeros: Any, offset: Any, bits: int, table: Any, group: int,
    x: Any, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Rows first to last of `out` (rows, n); or, where x (tokens, n) has tokens, of products (tokens, rows)."""
    n = x.shape[1]
    v = np.empty(codes.shape[1] * 8, np.float32)
    for r in range(first, last):
        _values(codes[r], bits, table, v)
        for g in range(scales.shape[1]):
            _scale(v[g * group : min(g * group + group, n)], zeros[r, g] if zeros.size else offset, scales[r, g])
        if x.shape[0]:
            for t in range(x.shape[0]):
                out[t, r] = _dot(x[t], v)
        else:
            out[r] = v[:n]


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rankfold-packed")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along


@functools.lru_cache(maxsize=32)
def _table(scheme: Scheme) -> Any:
    """The values of all codes of a byte, (256, codes), or of two codes of 3 bits; none for whole numbers of 4 and 8."""
    if scheme.format in ("int8", "int4"):
        return np.empty((0, 0), np.float32)
    byte = torch.arange(64 if scheme.format == "int3" else 256, dtype=torch.uint8)[:, None]
    q = (
        torch.cat([byte & 7, byte >> 3], 1)
        if scheme.format == "int3"
        else unpack(byte, PACK[BITS[scheme.format]][0], scheme)
    )
    return (q.float() if scheme.table is None else torch.tensor(scheme.table)[q.int()]).contiguous().numpy()


def rows(packed: Packed, n: int, scheme: Scheme, x: Tensor | None = None) -> Tensor:
    """Ŵ (rows, n), to the bit what `decode` gives; or x Ŵᵀ for x (tokens, n) of few tokens. All is in float32."""
    codes, height = packed.codes.detach(), len(packed.codes)
    per = (height, packed.scales.shape[1])
    zeros = torch.empty(0, 0) if packed.zeros is None else packed.zeros.detach().float().expand(per).contiguous()
    out = torch.empty(height, n) if x is None else torch.empty(len(x), height)
    arguments = (
        codes.contiguous().numpy(),
        packed.scales.detach().float().expand(per).contiguous().numpy(),
        zeros.numpy(),
        np.float32(0 if scheme.table is not None else scheme.offset),
        int(BITS[scheme.format]),
        _table(scheme),  # type: ignore[arg-type]  # it is hashable
        scheme.group if isinstance(scheme.group, int) else n,
        (torch.empty(0, n) if x is None else x.detach().contiguous()).numpy(),
        out.numpy(),
    )
    parts = max(1, min(torch.get_num_threads(), height * n // _SHARE))
    ends = [height * part // parts for part in range(parts + 1)]
    others = [_pool(parts).submit(_rows, *arguments, *ends[part : part + 2]) for part in range(1, parts)]
    _rows(*arguments, *ends[:2])
    for other in others:
        other.result()
    return out
